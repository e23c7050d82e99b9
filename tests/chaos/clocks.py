"""The clock of the machine jumps, for the processes of flowkit only."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

from scenarios import LEFT_OUT, Messages, Promise, scenario
from scene import Scene
from workers import IN_HAND, JOBS

HOUR = 3_600

FLAKY = 50
"""Queued messages of which one fails at first."""


def build(directory: Path) -> Path:
    """The library that makes the clock jump: see ``clock.c``."""
    library = directory / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True, timeout=60)
    return library


def clock_jumps(scene: Scene) -> None:
    """The clock of all processes of flowkit and RQ jumps by an hour: forward, twice back, and forward. Some queued messages
    fail at first: what waits for its next attempt when the clock is set back waits for an hour longer.
    """
    scene.acts = lambda stream, number: "flaky" if stream == "queued" and number % FLAKY == FLAKY // 2 else ""
    clock = scene.directory / "clock"
    clock.write_bytes(bytes(8))
    scene.env |= {"LD_PRELOAD": str(build(scene.directory)), "CHAOS_CLOCK": str(clock)}
    scene.consumers(2)
    scene.workers(1)
    scene.workers(1, "rq")
    with clock.open("r+b") as file, mmap.mmap(file.fileno(), 8) as offset, scene.load():
        for number in scene.moments(4, apart=5):
            seconds = (HOUR, 0, -HOUR, HOUR)[number]
            with scene.disturbance(f"the clock is off by {seconds} s from now on"):
                offset[:] = struct.pack("q", seconds)


if shutil.which("cc"):
    scenario(
        "clock-jumps",
        Messages(inline=20_000, queued=20_000, rate=1_000),
        quick="it needs a C compiler",
        # `rq worker` kills a work horse that seems to have been at its job for an hour.
        promise=Promise(each=IN_HAND, recovered=15, of="every partition"),
        env=JOBS,
    )(clock_jumps)
else:
    LEFT_OUT["clock-jumps"] = "it needs a C compiler: `apt-get install gcc libc6-dev`"
