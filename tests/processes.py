"""Real processes for tests: ``flowkit run``, ``rq worker``, ... with their output at hand and no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

APPS = Path(__file__).parent / "apps"
"""Small applications that tests run; the working directory of every process unless another is given."""

BIN = Path(sys.executable).parent


def program(name: str) -> str:
    """Where a program is: beside this Python if it came with a package, so that no test needs an activated environment."""
    ours = BIN / name
    return str(ours) if ours.exists() else name


class Process:
    """A command as a child in a session of its own. Used as ``with Process("flowkit", "run", "relay:app") as process``."""

    def __init__(self, *command: str, cwd: Path = APPS, env: Mapping[str, str] | None = None, log: Path) -> None:
        self.command = command
        self.log = log
        with log.open("ab") as output:
            self._begin = output.seek(0, os.SEEK_END)
            self.popen = subprocess.Popen(
                [program(command[0]), *command[1:]],
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def output(self) -> str:
        """All that it (and those before it with the same log) printed."""
        return self.log.read_text(errors="replace")

    def _own_output(self) -> str:
        return self.log.read_bytes()[self._begin :].decode(errors="replace")

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Waits until it (or another one with the same log, since it was started) has printed ``text``."""
        deadline = time.monotonic() + timeout
        while text not in self._own_output():
            if time.monotonic() > deadline or (self.popen.poll() is not None and text not in self._own_output()):
                raise AssertionError(f"{' '.join(self.command)} did not print {text!r}:\n{self.output[-4000:]}")
            time.sleep(0.02)

    def children(self) -> list[int]:
        """The process ids of its direct children, for example the work horse of ``rq worker``."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.pid and fields[0] != "Z":
                    found.append(int(stat.parent.name))
        return found

    def kill(self) -> None:
        """SIGKILL, to it alone."""
        self.popen.kill()
        self.popen.wait()

    def kill_child(self, timeout: float = 60) -> int:
        """SIGKILL to a child of it, for example the work horse that has the job in hand, as soon as there is one.

        Gives the process id.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for pid in self.children():
                with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
                    return pid
            time.sleep(0.002)
        raise AssertionError(f"{' '.join(self.command)} had no child to kill within {timeout:g} s")

    def kill_with_children(self) -> list[int]:
        """SIGKILL to it and to its children, as when their machine fails. Gives the process ids.

        First to it, so that it sees no child die. The horse of ``rq worker`` is in a process group of its own.
        """
        self.popen.send_signal(signal.SIGSTOP)  # so that it has no other children afterwards
        children = self.children()
        self.popen.kill()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()
        return [self.pid, *children]

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self, timeout: float = 40) -> int:
        """SIGTERM; gives the exit code."""
        self.popen.terminate()
        return self.wait(timeout)

    def wait(self, timeout: float = 40) -> int:
        """Waits for the end; gives the exit code."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{' '.join(self.command)} did not end:\n{self.output[-4000:]}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait()
