"""``flowkit run --daemon`` and ``flowkit stop``: a process that goes on in the background, known by its pid file.

Under systemd, Docker or Kubernetes none of this is needed: they want the process in the foreground. python-daemon would do the
forks, but its parent has gone before anybody knows whether the start went well, and its pid file has no lock of the system's.

A daemon holds a lock (flock) on its pid file as long as it lives, so a file left behind is told from one in use even where
another program has got the same pid. Its second line, written at the end, is the exit code, which ``stop`` reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .errors import ConfigurationError, DaemonError

START_TIMEOUT = 60.0
"""Seconds that a daemon may take until it is ready; then it is stopped again."""

STOP_TIMEOUT = 60.0
"""Seconds that ``flowkit stop`` waits; a stop takes ``shutdown_timeout`` (30 s) at most, if not set otherwise."""

SHOWN = 4_000
"""Bytes of the log, from its end, that are shown where a start failed."""


class PidFile:
    """A pid file and its lock. ``take`` makes it ours, ``close`` gives our hold of it up."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._fd = -1

    def take(self) -> bool:
        """Locks the file, made if it is not there. False if a living process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._lock():
                return False
            if self._is_there():
                os.ftruncate(self._fd, 0)  # the pid of an earlier one is nobody's business any more
                return True
            self.close()  # its daemon ended, and removed it, between the two lines above

    def look(self) -> bool:
        """Opens the file, and locks it if nobody else has. False if there is none."""
        try:
            self._fd = os.open(self.path, os.O_RDWR)
        except FileNotFoundError:
            return False
        return True

    def free(self) -> bool:
        """Whether the process that held the file has ended; its lock is then ours."""
        return self._lock()

    def read(self) -> tuple[int, int | None]:
        """The pid (0 if there is none) and the exit code (None if it ended without a word, or has not ended)."""
        lines = os.pread(self._fd, 100, 0).decode(errors="replace").split("\n")
        pid = int(lines[0]) if lines[0].isdigit() else 0
        return pid, int(lines[1]) if len(lines) > 1 and lines[1].isdigit() else None

    def write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def remove(self) -> None:
        """Removes the file, which we hold."""
        if self._is_there():
            self.path.unlink()

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _is_there(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        return False


class Daemon:
    """The process that goes on. ``ready`` lets the command that started it return."""

    def __init__(self, pid_file: PidFile, log: Path, door: int) -> None:
        self._pid_file = pid_file
        self._log = log
        self._door = door

    def ready(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # who waited for it was killed
            os.write(self._door, b"ready")
        os.close(self._door)

    def begin(self) -> None:
        """Lets go of what the caller had open; takes the log for its output, and opens it anew on SIGHUP, for logrotate."""
        self._pid_file.write(f"{os.getpid()}\n")
        at = 3
        for kept in sorted((self._pid_file.fileno(), self._door)):
            os.closerange(at, kept)
            at = kept + 1
        os.closerange(at, os.sysconf("SC_OPEN_MAX"))
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        self._open_log()
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        signal.signal(signal.SIGHUP, self._on_hangup)

    def end(self, code: int) -> None:
        self._pid_file.write(f"{os.getpid()}\n{code}\n")
        self._pid_file.remove()

    def _open_log(self) -> None:
        fd = _open_log(self._log)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        try:
            self._open_log()
        except OSError as error:
            os.write(
                2, f"flowkit: {self._log} could not be opened anew, going on with the old one: {error}\n".encode()
            )


@contextlib.contextmanager
def daemonized(pid_path: Path, log_path: Path) -> Iterator[Callable[[], None]]:
    """Runs the block in a daemon; gives what the block calls once it is ready.

    The process that calls this never enters the block: it exits, with 0 when the daemon is ready; else with the daemon's own
    exit code, or 1 if it was not ready after ``START_TIMEOUT`` seconds, and with what the daemon has logged.
    Raises ``DaemonError`` where the pid file is in use, ``ConfigurationError`` where it or the log cannot be written.
    """
    daemon = _detach(pid_path, log_path)
    daemon.begin()
    code = 0
    try:
        yield daemon.ready
    except BaseException as error:
        code = _exit_code(error)
        raise
    finally:
        daemon.end(code)


def _exit_code(error: BaseException) -> int:
    """The exit code with which an error is going to end the process: see ``reporting``, typer and ``sys.exit``."""
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    return 2 if isinstance(error, ConfigurationError) else 1


def _detach(pid_path: Path, log_path: Path) -> Daemon:
    """Forks twice, while there is one thread only. Returns in the daemon alone, which leads no session: no terminal is its."""
    pid_file = PidFile(pid_path)
    log = log_path.absolute()
    try:
        if not pid_file.take():
            pid, _ = pid_file.read()
            raise DaemonError(
                f"it runs already, with pid {pid} ({pid_file.path}): stop it with `flowkit stop --pid {pid_path}`, or give this"
                " one another file with --pid"
            )
        fd = _open_log(log)
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} cannot be written: {error.strerror}; see --pid and --log"
        ) from error
    begins = os.fstat(fd).st_size
    os.close(fd)
    sys.stdout.flush()
    sys.stderr.flush()
    starter = os.fork()
    if starter:
        _report(starter, pid_file, log, begins)
    os.setsid()
    opened, door = os.pipe()
    child = os.fork()
    if child:
        os.close(door)
        pid_file.close()
        os._exit(_wait_until_ready(child, opened))
    os.close(opened)
    return Daemon(pid_file, log, door)


def _open_log(log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


NOT_READY = 75
"""With this code the process between the two says that the time was over; it means a failure that may pass (sysexits.h)."""


def _wait_until_ready(child: int, opened: int) -> int:
    """In the process between the caller and the daemon: gives the caller's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))  # the caller gave up, with Ctrl-C
    found, _, _ = select.select([opened], [], [], START_TIMEOUT)
    if found and os.read(opened, 5):
        return 0
    if not found:
        os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return NOT_READY if not found else code if code > 0 else 1


def _report(starter: int, pid_file: PidFile, log: Path, begins: int) -> NoReturn:
    """In the process that was called: waits until it is known how the start went, says so, and ends."""
    try:
        _, status = os.waitpid(starter, 0)
    except KeyboardInterrupt:
        os.kill(starter, signal.SIGTERM)
        _, status = os.waitpid(starter, 0)
    code = os.waitstatus_to_exitcode(status)
    if not code:
        print(f"flowkit: it runs, with pid {pid_file.read()[0]}; its output goes to {log}", file=sys.stderr)
    else:
        with log.open("rb") as opened:
            opened.seek(max(begins, log.stat().st_size - SHOWN))
            sys.stderr.write(opened.read().decode(errors="replace"))
        if code == NOT_READY:
            print(
                f"flowkit: it was not ready within {START_TIMEOUT:g} s, and is stopped again; what it waited for stands above,"
                f" and in {log}",
                file=sys.stderr,
            )
        else:
            print(f"flowkit: it could not be started; what it said stands above, and in {log}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1 if code == NOT_READY or code < 0 else code)


def stop(path: Path, timeout: float = STOP_TIMEOUT) -> str:
    """Sends SIGTERM to the daemon of a pid file and waits for its end; says how it ended.

    Raises ``DaemonError`` if none runs, if it did not end within ``timeout`` seconds, or if its end was not clean.
    """
    pid_file = PidFile(path)
    if not pid_file.look():
        raise DaemonError(
            f"there is no pid file {path}: nothing runs that was started with it; if it ended by itself, its log says why"
        )
    try:
        pid, _ = pid_file.read()
        if pid_file.free():
            pid_file.remove()
            raise DaemonError(
                f"{path} was left behind: its process {pid} is gone, and did not end by itself; the file is removed"
            )
        if not pid:
            raise DaemonError(f"{path} is in use, but holds no pid yet: what uses it is just starting; try again")
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            pass  # killed; the processes it had started hold the file until they end too
        except OSError as error:
            raise DaemonError(f"process {pid} could not be asked to end: {error.strerror}") from error
        deadline = time.monotonic() + timeout
        while not pid_file.free():
            if time.monotonic() > deadline:
                raise DaemonError(
                    f"process {pid} has not ended within {timeout:g} s: it finishes the messages in hand, for as long as"
                    " shutdown_timeout allows. Wait for longer with --timeout, or call `flowkit stop` again to end it at once:"
                    " then unfinished messages come again"
                )
            time.sleep(0.05)
        _, code = pid_file.read()
        if code is None:
            pid_file.remove()
            raise DaemonError(f"process {pid} has ended without finishing: it was killed, or asked twice to end")
    finally:
        pid_file.close()
    if code:
        raise DaemonError(f"process {pid} has ended with exit code {code}: not everything was finished; see its log")
    return f"process {pid} has ended: every message in hand was finished"
