"""How the C library of this process keeps what was freed."""

from __future__ import annotations

import ctypes
import os
import sys

LARGE = 4 * 1024 * 1024
"""Bytes from which on a buffer is of its own, outside the heap."""

M_MMAP_THRESHOLD = -3


def give_back_large() -> None:
    """Makes glibc give each large buffer back to the system when it is freed, for the rest of this process.

    glibc takes the first of them from the system, and once they were freed others like them from its heap. kafka-python has
    answers of up to 8 MB for each partition: between what lives longer they left gaps, and a consumer of 4 partitions came to
    220 MB within a million or four messages, where 138 MB are enough. It costs no time that could be measured. Other C
    libraries have nothing like it, and where the environment says how glibc is to do it, that holds.
    """
    said = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and not said:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
