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

FAULTS = """
import resource
from flowkit.clients.heap import give_back_large
give_back_large()
def use() -> None:
    bytearray(3_000_000)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def number(code: str, *arguments: str, **environment: str) -> int:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**env, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def mapped(*arguments: str, **environment: str) -> int:
    """How many large buffers are outside the heap, of one that is made after a larger one was freed."""
    return number(HOW_MANY_ARE_MAPPED, *arguments, **environment)


def test_a_large_buffer_is_kept_in_the_heap_without_this() -> None:
    assert mapped() == 0


def test_a_large_buffer_is_outside_the_heap() -> None:
    assert mapped("set") == 1


def test_smaller_ones_are_used_again_as_ever() -> None:
    """Else each of these takes 700 pages from the system, which must be cleared."""
    assert number(FAULTS) < 700


def test_what_the_environment_says_holds() -> None:
    assert mapped("set", MALLOC_MMAP_THRESHOLD_=str(64 * 1024 * 1024)) == 0
    assert mapped("set", GLIBC_TUNABLES="glibc.malloc.mmap_threshold=67108864") == 0
    # with this one alone, glibc's own size holds: 128 KB
    assert mapped("set", MALLOC_TRIM_THRESHOLD_=str(64 * 1024 * 1024)) == 1
