"""`python -m rlhf_exp`."""

from __future__ import annotations

import sys

from rlhf_exp.cli import main

if __name__ == "__main__":
    sys.exit(main())
