"""``flowkit run --daemon`` and ``flowkit stop``: real processes, their pid files, logs and ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import NOBODY, Done, flowkit, python
from processes import APPS, BIN
from redis import Redis
from servers import Kafka, MakeTopic, WaitFor

from flowkit.daemon import Daemon, PidFile, stop
from flowkit.errors import DaemonError


class Background:
    """The application ``steady`` in the background, with a folder and a topic of its own."""

    def __init__(self, kafka: Kafka, topic: str, directory: Path) -> None:
        self.topic = topic
        self.pid_file = directory / "run" / "steady.pid"
        self.log = directory / "logs" / "steady.log"
        self.files = ("--pid", str(self.pid_file), "--log", str(self.log))
        self.env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "STEADY_IN": topic}
        self.seen: set[int] = set()

    def start(self, *options: str, command: str = "run", app: str = "steady:app", **env: str) -> Done:
        done = flowkit(command, app, "--daemon", *self.files, *options, env={**self.env, **env})
        if self.pid_file.exists() and (text := self.pid_file.read_text().strip()):
            self.seen.add(int(text))
        return done

    def stop(self, *options: str) -> Done:
        return flowkit("stop", "--pid", str(self.pid_file), *options)

    def send(self, word: str) -> None:
        assert flowkit("send", "steady:app", self.topic, json.dumps(word), env=self.env).code == 0

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def background(kafka: Kafka, topic: MakeTopic, tmp_path: Path) -> Iterator[Background]:
    made = Background(kafka, topic("daemon"), tmp_path)
    yield made
    for pid in made.seen:
        with contextlib.suppress(ProcessLookupError):
            if "flowkit" in Path(f"/proc/{pid}/cmdline").read_text() if Path(f"/proc/{pid}").exists() else False:
                os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_daemon_consumes_alone_and_is_stopped_clean(background: Background, wait_for: WaitFor) -> None:
    done = background.start()
    assert done.code == 0, done.err
    assert done.err == f"flowkit: it runs, with pid {background.pid}; its output goes to {background.log}\n"
    pid = background.pid
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    session, terminal = int(fields[3]), int(fields[4])
    assert session not in (pid, os.getsid(0))  # nobody's session, and it leads none
    assert terminal == 0
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    assert os.readlink(f"/proc/{pid}/cwd") == str(APPS)

    background.send("hello")
    wait_for(lambda: "got hello\n" in background.output)

    done = background.stop()
    assert (done.code, done.out) == (0, f"process {pid} has ended: every message in hand was finished\n")
    assert not runs(pid)
    assert not background.pid_file.exists()
    assert "stopped application=steady clean=True" in background.output


def test_what_the_caller_had_open_is_not_held_open(background: Background) -> None:
    opened, held = os.pipe()
    command = [str(BIN / "flowkit"), "run", "steady:app", "--daemon", *background.files]
    env = {**os.environ, **background.env}
    done = subprocess.run(command, cwd=APPS, env=env, pass_fds=[held], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    background.seen.add(background.pid)
    os.close(held)

    assert select.select([opened], [], [], 5)[0]  # its end: nobody else has the other side
    assert os.read(opened, 1) == b""
    os.close(opened)
    assert background.stop().code == 0


def test_a_second_one_is_refused_and_the_first_goes_on(background: Background) -> None:
    assert background.start().code == 0
    pid = background.pid
    done = background.start()

    assert done.code == 1
    assert f"it runs already, with pid {pid} ({background.pid_file}): stop it with `flowkit stop --pid" in done.err
    assert background.pid == pid
    assert runs(pid)
    assert background.stop().code == 0


def test_a_file_left_behind_is_replaced_whoever_has_its_pid_now(background: Background) -> None:
    background.pid_file.parent.mkdir()
    background.pid_file.write_text(f"{os.getpid()}\n")

    assert background.start().code == 0
    assert background.pid != os.getpid()
    assert background.stop().code == 0


@pytest.mark.parametrize(
    ("app", "env", "code", "error"),
    [
        ("steady:app", {"FLOWKIT_KAFKA_HOSTS": "a:b:c"}, 2, "kafka.hosts: 'a:b:c' is not host:port"),
        ("nowhere:app", {}, 2, "there is no module 'nowhere'"),
        ("crash:app", {}, 1, "could not be imported"),
        ("steady:app", {"FLOWKIT_HEALTH": "no.such.host.invalid:80"}, 2, "the port of the probes"),
    ],
)
def test_what_fails_at_the_start_is_seen_by_the_caller(
    background: Background, app: str, env: dict[str, str], code: int, error: str
) -> None:
    done = background.start(app=app, **env)

    assert done.code == code
    assert error in done.err
    assert f"it could not be started; what it said stands above, and in {background.log}" in done.err
    assert error in background.output
    assert not background.pid_file.exists()


def test_what_the_clients_refuse_later_is_seen_too(background: Background, tmp_path: Path) -> None:
    (tmp_path / "refused.py").write_text(
        "from flowkit import Flowkit\n"
        "app = Flowkit('refused', inline=True, kafka={'security_protocol': 'BOGUS'})\n"
        "@app.topic('numbers')\n"
        "def handle(number): ...\n"
    )
    done = flowkit("run", "refused:app", "--daemon", *background.files, cwd=tmp_path, env=background.env)

    assert done.code == 2
    assert "kafka.security_protocol" in done.err
    assert not background.pid_file.exists()


SOON = "import flowkit.cli, flowkit.daemon; flowkit.daemon.START_TIMEOUT = 2.0; flowkit.cli.main()"


def test_one_that_is_not_ready_in_time_is_stopped_again(background: Background) -> None:
    arguments = ("run", "steady:app", "--daemon", *background.files)
    done = python("-c", SOON, *arguments, env={**background.env, "FLOWKIT_KAFKA_HOSTS": NOBODY})

    assert done.code == 1
    assert "started application=steady" in done.err
    assert "it was not ready within 2 s, and is stopped again; what it waited for stands above" in done.err
    assert "stopped application=steady" in background.output
    assert not background.pid_file.exists()


def test_output_goes_on_in_a_new_file_after_sighup(background: Background, wait_for: WaitFor) -> None:
    assert background.start().code == 0
    background.send("before")
    wait_for(lambda: "got before\n" in background.output)
    old = background.log.rename(background.log.with_suffix(".1"))
    os.kill(background.pid, signal.SIGHUP)
    wait_for(background.log.exists)
    background.send("after")
    wait_for(lambda: "got after\n" in background.output)
    assert background.stop().code == 0

    assert "got after" not in old.read_text()
    assert "stopped application=steady" in background.output


def test_a_stop_that_takes_too_long_says_what_to_do_and_again_ends_it_at_once(
    background: Background, wait_for: WaitFor
) -> None:
    assert background.start(FLOWKIT_SHUTDOWN_TIMEOUT="30").code == 0
    pid = background.pid
    background.send("stuck")
    wait_for(lambda: "got stuck\n" in background.output)

    done = background.stop("--timeout", "0.5")
    assert done.code == 1
    assert f"process {pid} has not ended within 0.5 s" in done.err
    assert "call `flowkit stop` again to end it at once" in done.err
    assert runs(pid)

    done = background.stop()
    assert done.code == 1
    assert done.err == f"flowkit: process {pid} has ended without finishing: it was killed, or asked twice to end\n"
    assert not runs(pid)
    assert not background.pid_file.exists()


def test_an_end_that_was_not_clean_is_told_with_its_exit_code(background: Background, wait_for: WaitFor) -> None:
    assert background.start(FLOWKIT_SHUTDOWN_TIMEOUT="0.5").code == 0
    pid = background.pid
    background.send("stuck")
    wait_for(lambda: "got stuck\n" in background.output)

    done = background.stop()
    assert done.code == 1
    assert f"process {pid} has ended with exit code 1: not everything was finished; see its log" in done.err
    assert not background.pid_file.exists()


def test_one_that_was_killed_is_told_from_one_that_runs(background: Background, wait_for: WaitFor) -> None:
    assert background.start().code == 0
    pid = background.pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not runs(pid))

    done = background.stop()
    assert done.code == 1
    assert f"was left behind: its process {pid} is gone, and did not end by itself; the file is removed" in done.err
    done = background.stop()
    assert done.code == 1
    assert done.err == (
        f"flowkit: there is no pid file {background.pid_file}: nothing runs that was started with it; if it ended by"
        " itself, its log says why\n"
    )


def test_workers_run_in_the_background_too(
    background: Background, redis: Redis, redis_url: str, wait_for: WaitFor
) -> None:
    done = background.start(command="worker", FLOWKIT_REDIS=redis_url, STEADY_INLINE="0")
    assert done.code == 0, done.err
    assert "working on default" in background.output

    background.log.rename(background.log.with_suffix(".1"))
    os.kill(background.pid, signal.SIGHUP)
    children = Path(f"/proc/{background.pid}/task/{background.pid}/children").read_text().split()
    assert children
    for pid in children:
        wait_for(lambda pid=pid: os.readlink(f"/proc/{pid}/fd/2") == str(background.log))  # type: ignore[misc]
    assert background.stop().code == 0


def test_the_files_have_usual_places(background: Background, tmp_path: Path) -> None:
    (tmp_path / "steady.py").write_text((APPS / "steady.py").read_text())
    done = flowkit("run", "steady:app", "-d", cwd=tmp_path, env=background.env)
    assert done.code == 0, done.err
    background.seen.add(int((tmp_path / "tmp" / "flowkit-run.pid").read_text()))
    assert (tmp_path / "log" / "flowkit-run.log").exists()
    assert flowkit("stop", cwd=tmp_path).code == 0


@pytest.mark.parametrize("option", ["--pid", "--log"])
def test_files_without_a_daemon_are_a_wrong_call(option: str) -> None:
    done = flowkit("run", "hello:app", option, "file")

    assert done.code == 2
    assert "--pid and --log are for --daemon" in done.err


def test_a_file_that_cannot_be_written_is_named(background: Background, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")

    done = background.start()
    assert done.code == 2
    assert f"{background.log.parent} cannot be written: File exists; see --pid and --log" in done.err


def test_one_that_nobody_waits_for_any_more_goes_on(tmp_path: Path) -> None:
    opened, door = os.pipe()
    os.close(opened)
    Daemon(PidFile(tmp_path / "pid"), tmp_path / "log", door).ready()


def test_a_file_that_something_else_holds_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with path.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        with pytest.raises(DaemonError, match="holds no pid yet: what uses it is just starting"):
            stop(path)
        assert not PidFile(path).take()
    assert path.exists()


def test_a_file_that_ends_while_it_is_taken_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n")
    real = PidFile._lock
    calls: list[int] = []

    def lock(self: PidFile) -> bool:
        if not calls:
            path.unlink()  # its daemon ends at this moment
        calls.append(1)
        return real(self)

    monkeypatch.setattr(PidFile, "_lock", lock)
    file = PidFile(path)

    assert file.take()
    assert len(calls) == 2
    assert path.exists()
    file.close()
