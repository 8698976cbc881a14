"""The tiny model with random adapters, and a few pairs with a scorer whose preferences are known."""

from __future__ import annotations

import pytest

from rlhf_exp.data.records import Comparison
from rlhf_exp.probes.answers import Real
from tests.rollout.conftest import base, roles  # noqa: F401


@pytest.fixture
def real() -> list[Real]:
    """Three pairs of ids; token 2 is EOS."""

    def make(id: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> Real:
        return Real(
            Comparison(id, f"prompt {id}", f"chosen {id}", f"rejected {id}"), prompt, chosen, rejected
        )

    return [
        make(11, [5, 6], [7, 8, 9, 2], [7, 2]),
        make(12, [5], [10, 11, 2], [10, 11, 12, 2]),
        make(13, [6, 6, 6], [13, 2], [14, 15, 16, 2]),
    ]
