"""`python -m rlhf_exp`."""

from __future__ import annotations

from rlhf_exp import distributed
from rlhf_exp.cli import main

if __name__ == "__main__":
    distributed.leave(main())
