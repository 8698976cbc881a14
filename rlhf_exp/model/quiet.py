"""What libraries do unasked, kept from doing it: progress bars, and loading DeepSpeed where nobody uses it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No bars of transformers ("Loading weights", "Writing model shards") inside; as before afterwards."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def spare_deepspeed() -> None:
    """Do not let accelerate import DeepSpeed (seconds, and lines on the screen) to see whether a model is one of its.

    A model can only be DeepSpeed's once somebody has imported it.
    """
    from accelerate.utils import other

    other.is_deepspeed_available = lambda: "deepspeed" in sys.modules
