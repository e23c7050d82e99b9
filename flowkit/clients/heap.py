"""How the C library of this process keeps what was freed."""

from __future__ import annotations

import ctypes
import os
import sys

LARGE = 4 * 1024 * 1024
"""Bytes from which on a buffer is of its own, outside the heap: half of what kafka-python is given of one partition at most."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def give_back_large() -> None:
    """Makes glibc give each large buffer back to the system when it is freed, for the rest of this process.

    glibc takes the first of them from the system, and once they were freed others like them from its heap. kafka-python has
    answers of up to 8 MB for each partition: between what lives longer they left gaps, and a consumer of 4 partitions came to
    220 MB within a million or four messages, where 140 are enough, at the same rate. All that is smaller stays as it is: the
    end of the heap is kept up to twice the size, as glibc does it.

    Other C libraries have nothing like it. Where the environment says how glibc is to keep memory, that holds.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    said = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform == "linux" and not said:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE)
            mallopt(M_TRIM_THRESHOLD, 2 * LARGE)
