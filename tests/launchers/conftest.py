"""The plugins on the path, as in a checkout that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

LAUNCHERS = str(Path(__file__).resolve().parents[2] / "launchers")
if LAUNCHERS not in sys.path:
    sys.path.append(LAUNCHERS)
