"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from rlhf_exp.model import pages
if sys.argv[1] == "kept":
    pages.keep_freed()
def work():
    kept = [torch.ones(2**21) for _ in range(8)]  # 8 MB each
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep it")
def test_blocks_that_come_again_cost_no_new_pages():
    """8 blocks of 8 MB are 16,384 pages of 4 KB; five times over without being told."""
    faults = {
        kind: int(subprocess.check_output([sys.executable, "-c", COUNT, kind], text=True))
        for kind in ("kept", "plain")
    }
    assert faults["kept"] < 2 * 2048  # where the blocks fit may change once: a block of 2,048 pages
    assert faults["plain"] > 10 * faults["kept"]
