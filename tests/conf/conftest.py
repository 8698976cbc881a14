"""One Hydra for a whole module: starting one takes longer than composing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rlhf_exp import compose


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with compose.session():
        yield
