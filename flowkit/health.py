"""Whether a process lives and is ready: told to systemd (sd_notify), to probes over HTTP, and by a file; all from one place.

``Server`` and ``Workers`` say how their parts are. Both let the loop that watches these parts call ``Doors.look``, so a loop
that stands still answers nobody: systemd and Kubernetes take that for what it is.
"""

from __future__ import annotations

import http
import http.server
import io
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from .errors import ConfigurationError

logger = logging.getLogger(__name__)

PROBES = ("/healthz", "/readyz")

PATIENCE = 0.3
"""Seconds that a probe may take to send its question, once it is connected."""

TOUCH_EVERY = 2.0
"""Seconds between the writings of the file that tells who has no port."""

AT_ONCE = 8
"""Probes answered in one look; others wait for the next."""


@dataclass(frozen=True, slots=True)
class Part:
    """One group's loop, or one worker process, and how it is."""

    name: str
    state: str
    ready: bool = False
    alive: bool = True


@dataclass(frozen=True, slots=True)
class Health:
    """How a process is. One that stops is no longer ready, and alive until its end."""

    parts: tuple[Part, ...]
    stopping: bool = False

    @property
    def alive(self) -> bool:
        return self.stopping or all(part.alive for part in self.parts)

    @property
    def ready(self) -> bool:
        return not self.stopping and bool(self.parts) and all(part.ready and part.alive for part in self.parts)

    @property
    def status(self) -> str:
        """One line for people: what is wrong or awaited, if anything, else how all of it is."""
        if self.stopping:
            return "stopping"
        if not self.parts:
            return "waiting"
        stuck = [part for part in self.parts if not part.alive]
        waiting = [part for part in self.parts if not part.ready]
        word = "stuck" if stuck else "waiting" if waiting else "ready"
        line = f"{word}: {', '.join(f'{part.name} {part.state}' for part in stuck or waiting or self.parts)}"
        return line if len(line) <= 200 else line[:197] + "..."

    def as_dict(self) -> dict[str, Any]:
        return {
            "alive": self.alive,
            "ready": self.ready,
            "status": self.status,
            "parts": [asdict(part) for part in self.parts],
        }


class Doors:
    """What systemd and probes are told. A ``with`` block opens the port; ``look`` is to be called several times a second.

    ``address`` is that of the setting ``health``, None for no port; ``file`` that of ``health_file``. ``on_ready`` is called
    once, as soon as all are ready. Raises ``ConfigurationError`` if the port or the file cannot be used.
    """

    def __init__(
        self,
        health: Callable[[], Health],
        address: str | None = None,
        on_ready: Callable[[], None] | None = None,
        file: str | None = None,
    ) -> None:
        self._health = health
        self._systemd = Systemd(os.environ)
        self._on_ready = on_ready
        self._was_ready = False
        self._status = ""
        self._listener = _listen(address) if address else None
        try:
            self._file = TouchFile(Path(file)) if file else None
        except ConfigurationError:
            self.leave()
            raise

    @property
    def port(self) -> int:
        """The port of the probes; 0 if there is none."""
        return int(self._listener.getsockname()[1]) if self._listener is not None else 0

    def look(self) -> None:
        """Tells systemd what has changed, and that the process lives if it does; answers the probes that have come."""
        health = self._health()
        told = []
        if health.ready and not self._was_ready:
            self._was_ready = True
            told.append("READY=1")
            if self._on_ready is not None:
                self._on_ready()
        if health.stopping and self._status != health.status:
            told.append("STOPPING=1")
        if health.status != self._status:
            self._status = health.status
            told.append(f"STATUS={health.status}")
        if health.alive and self._systemd.watchdog_due():
            told.append("WATCHDOG=1")
        if told:
            self._systemd.tell("\n".join(told))
        if self._file is not None and health.alive:
            self._file.touch("ready" if health.ready else "stopping" if health.stopping else "waiting")
        if self._listener is not None:
            _answer_all(self._listener, health)

    def leave(self) -> None:
        """Closes the port here, in a forked child or at the end."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def __enter__(self) -> Self:
        if self._listener is not None:
            host = self._listener.getsockname()[0]
            shown = f"[{host}]" if ":" in host else host
            logger.info("answering %s on http://%s:%d", " and ".join(PROBES), shown, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        if self._file is not None:
            self._file.remove()


class TouchFile:
    """A file whose age says how long ago the process was alive; in it stands one word. Not there after the end."""

    def __init__(self, path: Path) -> None:
        """Raises ``ConfigurationError`` where it cannot be written."""
        self.path = path
        self._word = ""
        self._due = 0.0
        self._failing = False
        try:
            self._write("waiting")
        except OSError as error:
            raise ConfigurationError(
                f"health_file: {path} cannot be written: {error.strerror or error}; name a file in a directory that is there"
                " and may be written to (FLOWKIT_HEALTH_FILE)"
            ) from error

    def touch(self, word: str) -> None:
        """Writes it anew if that is due, or if the word is another one."""
        if word == self._word and time.monotonic() < self._due:
            return
        try:
            self._write(word)
        except OSError as error:  # the disk is full, for example: that is no reason to end
            if not self._failing:
                logger.warning("health_file: %s cannot be written: %s", self.path, error)
            self._failing = True
        else:
            self._failing = False

    def _write(self, word: str) -> None:
        self._due = time.monotonic() + TOUCH_EVERY
        if word == self._word and self.path.exists():
            os.utime(self.path)
            return
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}")  # so that nobody finds half a word, or none
        new.write_text(f"{word}\n")
        new.replace(self.path)
        self._word = word

    def remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("health_file: %s is left behind: %s", self.path, error)


class Systemd:
    """The notification protocol of systemd: datagrams to NOTIFY_SOCKET. See sd_notify(3) and sd_watchdog_enabled(3)."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        micros = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self._every = int(micros) / 2e6 if self._address and mine and micros.isdigit() else 0.0
        self._due = 0.0
        self._failing = False

    def watchdog_due(self) -> bool:
        """Whether systemd waits for a sign of life: twice in the time after which it would end the process."""
        now = time.monotonic()
        if not self._every or now < self._due:
            return False
        self._due = now + self._every
        return True

    def tell(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
                door.settimeout(1.0)
                door.connect(self._address)
                door.sendall(message.encode())
        except OSError as error:
            if not self._failing:
                logger.warning("systemd could not be told %r at NOTIFY_SOCKET: %s", message, error)
            self._failing = True
        else:
            self._failing = False


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if not host and socket.has_dualstack_ipv6():
            listener = socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True, backlog=16)
        else:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, int(port)), family=family, backlog=16)
    except OSError as error:
        raise ConfigurationError(
            f"health: the port of the probes, {address}, cannot be used: {error.strerror or error}; stop the program that"
            " has it, or give another one (FLOWKIT_HEALTH)"
        ) from error
    listener.setblocking(False)
    return listener


def _answer_all(listener: socket.socket, health: Health) -> None:
    """Answers the probes that wait. Each may take a moment only: whoever calls this has other work."""
    for _ in range(AT_ONCE):
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # the other side has gone already, or files are used up
            logger.debug("a probe could not be taken: %r", error)
            return
        with connection:
            try:
                connection.settimeout(PATIENCE)
                connection.sendall(_Answer(connection.recv(8192), health).text)
                connection.shutdown(socket.SHUT_WR)
            except OSError as error:
                logger.debug("a probe was not answered: %r", error)


class _Answer(http.server.BaseHTTPRequestHandler):
    """The standard library's HTTP on bytes that were read already: its own reading could be held up by the other side."""

    protocol_version = "HTTP/1.1"
    server_version = "flowkit"
    sys_version = ""

    def __init__(self, request: bytes, health: Health) -> None:
        self.health = health
        self.client_address = ("", 0)
        self.rfile = io.BytesIO(request)
        self.wfile: Any = io.BytesIO()
        self.close_connection = True
        self.handle_one_request()
        self.text: bytes = self.wfile.getvalue()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path not in PROBES:
            self._send(http.HTTPStatus.NOT_FOUND, {"error": f"there is nothing here but {' and '.join(PROBES)}"})
            return
        good = self.health.ready if path == "/readyz" else self.health.alive
        status = http.HTTPStatus.OK if good else http.HTTPStatus.SERVICE_UNAVAILABLE
        self._send(status, self.health.as_dict())

    do_HEAD = do_GET

    def _send(self, status: http.HTTPStatus, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
