"""Memory that was freed is kept for what comes next: a page that the system hands out anew costs more than its use.

A training step frees and takes again the same few hundred MB. glibc gives blocks above 32 MB at most, and the end of
its heap, back to the system each time, and every page of 4 KB comes back through a fault.
"""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**30  # bytes at the end of the heap
LARGEST = 32 * 2**20  # of a block that the heap serves: glibc's own limit


def keep_freed() -> None:
    """For this process, where its C library is glibc; elsewhere nothing."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, KEPT)
