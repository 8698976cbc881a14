"""Freed memory stays with the process."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# What glibc's heap says of itself (<malloc.h>, mallinfo2): page faults would say it too, but some kernels count none.
COUNT = """
import ctypes, sys
from rlhf_exp.model import pages

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype = Heap, ctypes.c_void_p
if sys.argv[1] == "told":
    pages.keep_freed()
blocks = [ctypes.c_void_p(libc.malloc(8 * 2**20)) for _ in range(8)]
mapped = libc.mallinfo2().hblks
for block in reversed(blocks):
    libc.free(block)
print(mapped - libc.mallinfo2().hblks, libc.mallinfo2().fordblks // 2**20)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc's heap is told to keep it"
)
@pytest.mark.parametrize(("kind", "mapped", "kept"), [("told", 0, 64), ("plain", 8, 0)])
def test_blocks_that_were_freed_stay_in_the_heap(kind, mapped, kept):
    """8 blocks of 8 MB; one with a mapping of its own goes back to the system with its end."""
    found = subprocess.check_output([sys.executable, "-c", COUNT, kind], text=True)
    assert [int(number) for number in found.split()] == [mapped, kept]
