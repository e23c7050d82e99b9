"""Large buffers go back to the system: seen by what glibc says of itself, each time in a process of its own."""

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc, from 2.33 on, says how it keeps memory"
)

HOW_MANY_ARE_MAPPED = """
import ctypes, sys
from flowkit.clients.heap import LARGE, give_back_large
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in names]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
if "set" in sys.argv:
    give_back_large()
first = bytearray(2 * LARGE)
del first
before = mallinfo2().hblks
second = bytearray(LARGE)
print(mallinfo2().hblks - before)
"""


def mapped(*arguments: str, **environment: str) -> int:
    """How many large buffers are outside the heap, of one that is made after a larger one was freed."""
    command = [sys.executable, "-c", HOW_MANY_ARE_MAPPED, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_large_buffer_is_kept_in_the_heap_without_this() -> None:
    assert mapped() == 0


def test_a_large_buffer_is_outside_the_heap() -> None:
    assert mapped("set") == 1


def test_what_the_environment_says_holds() -> None:
    assert mapped("set", MALLOC_MMAP_THRESHOLD_=str(64 * 1024 * 1024)) == 0
    assert mapped("set", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=67108864") == 0
