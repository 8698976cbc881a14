"""Chromium without a window, for the tests of pages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars disable-dev-shm-usage"
)


def require() -> None:
    """Skips where there is no Chromium; with RLHF_EXP_REQUIRE_BROWSER=1 (CI) fails."""
    if not CHROMIUM:
        reason = "no Chromium: apt-get install chromium"
        if os.environ.get("RLHF_EXP_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def browse(page: Path, folder: Path, *options: str) -> tuple[str, str]:
    """What the browser prints, and its log; its profile is below `folder` while it runs."""
    command = [CHROMIUM, *(f"--{name}" for name in SWITCHES.split()), f"--user-data-dir={folder / 'profile'}"]
    try:
        done = subprocess.run(
            [*command, *options, page.as_uri()], capture_output=True, text=True, timeout=100, cwd=folder
        )
    finally:
        shutil.rmtree(folder / "profile", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
