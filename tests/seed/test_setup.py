"""Setup: every option of the seed, configurators, and the environment variables."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import NOBODY, flowkit
from kafka import KafkaProducer
from processes import Process
from redis import Redis
from servers import Kafka, MakeTopic, RedisServer

from flowkit import Flowkit, Monitor

SEED: Mapping[str, Any] = {
    "name": "store",
    "redis": {"url": "redis://127.0.0.1:6379/0"},
    "inline": True,
    "logger": logging.getLogger("store"),
    "monitor": Monitor(logging.getLogger("store")),
    "kafka": {
        "hosts": ["127.0.0.1:9092"],
        "session_timeout": 30,
        "offset_commit_interval": 10,
        "offset_commit_threshold": 100,
        "heartbeat_interval": 10,
        "ssl": {"ca_cert": "ca.pem", "client_cert": "client.pem", "client_cert_key": "client.key"},
    },
    "connection_pool": {"size": 4, "timeout": 5},
}
"""The options of the seed, all of them, with its names."""


def test_every_option_of_the_seed_has_its_name_here() -> None:
    settings = Flowkit(**SEED).settings

    assert (settings.name, settings.redis, settings.inline) == ("store", SEED["redis"], True)
    assert (settings.logger, settings.monitor) == (SEED["logger"], SEED["monitor"])
    kafka = settings.kafka
    assert kafka.hosts == ("127.0.0.1:9092",)
    assert (kafka.session_timeout, kafka.heartbeat_interval) == (30, 10)
    assert (kafka.offset_commit_interval, kafka.offset_commit_threshold) == (10, 100)
    assert (kafka.ssl.ca_cert, kafka.ssl.client_cert, kafka.ssl.client_cert_key) == (
        "ca.pem",
        "client.pem",
        "client.key",
    )
    assert (settings.connection_pool.size, settings.connection_pool.timeout) == (4, 5)


def test_what_the_seed_requires_is_asked_for_at_start_all_at_once() -> None:
    done = flowkit("run", "configured", env={"CONFIGURED_NAME": "no name", "FLOWKIT_RETRY": "often"})

    assert done.code == 2
    assert done.err.splitlines() == [
        "flowkit: the settings have 4 mistakes:",
        "  - retry: expected a whole number of at least 1, got 'often' (from FLOWKIT_RETRY)",
        "  - name: 'no name' cannot be the name of a group: use 1 to 249 of the characters A-Z a-z 0-9 . _ -",
        "  - kafka.hosts: is required, as in kafka={'hosts': '127.0.0.1:9092'} or FLOWKIT_KAFKA_HOSTS",
        "  - redis: is required by queued routes, as in redis='redis://127.0.0.1:6379/0' or FLOWKIT_REDIS; routes with"
        " inline=True need none",
    ]


# Configurators.


def test_configurators_run_in_order_with_final_settings_before_the_first_connection(tmp_path: Path) -> None:
    env = {"FLOWKIT_KAFKA_HOSTS": NOBODY, "FLOWKIT_REDIS": "redis://127.0.0.1:1", "CONFIGURED_NAME": "named-late"}
    with Process("flowkit", "run", "configured", env=env, log=tmp_path / "run.log") as process:
        process.wait_for("no Kafka broker answers")

    lines = process.output.splitlines()
    assert lines[:3] == [
        "first configurator: named-late in development, 1 host",
        "second configurator",
        "startup",
    ]


def test_a_configurator_that_fails_stops_the_start_and_is_shown_as_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from flowkit import Flowkit\n"
        f"app = Flowkit('broken', kafka={{'hosts': '{NOBODY}'}}, inline=True)\n"
        "@app.topic('a')\n"
        "def handle(value): ...\n"
        "@app.configurator\n"
        "def configure(): raise RuntimeError('no licence')\n"
    )

    done = flowkit("run", "broken:app", cwd=tmp_path)

    assert done.code == 1
    assert "RuntimeError: no licence" in done.err
    assert "broken.py" in done.err
    assert "flowkit/app.py" not in done.err


@pytest.mark.parametrize("worker", [("rq", "worker", "--url"), ("flowkit", "worker", "configured")], ids=" ".join)
def test_configurators_run_in_workers_too(
    worker: tuple[str, ...], kafka: Kafka, topic: MakeTopic, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    env = {
        "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
        "FLOWKIT_REDIS": redis_url,
        "CONFIGURED_NAME": topic("named"),
        "CONFIGURED_INLINE": topic("inline"),
        "CONFIGURED_QUEUED": topic("queued"),
    }
    command = (*worker, redis_url, "default") if worker[0] == "rq" else worker
    producer = KafkaProducer(bootstrap_servers=kafka.hosts)
    producer.send(env["CONFIGURED_QUEUED"], b"7")
    producer.close()
    with (
        Process("flowkit", "run", "configured", env=env, log=tmp_path / "run.log"),
        Process(*command, env=env, log=tmp_path / "worker.log") as process,
    ):
        process.wait_for("queued 7")

    lines = [
        line for line in process.output.splitlines() if line.startswith(("first", "second", "startup", "queued"))
    ]
    assert lines == [
        f"first configurator: {env['CONFIGURED_NAME']} in development, 1 host",
        "second configurator",
        "startup",
        "queued 7",
    ]


# FLOWKIT_ENV and FLOWKIT_APP.


@pytest.mark.parametrize(("env", "shown"), [("development", True), ("test", False), ("production", True)])
def test_the_environment_has_a_log_level_of_its_own(
    env: str, shown: bool, kafka: Kafka, topic: MakeTopic, redis_url: str, tmp_path: Path
) -> None:
    variables = {
        "FLOWKIT_ENV": env,
        "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
        "FLOWKIT_REDIS": redis_url,
        "CONFIGURED_NAME": topic("named"),
        "CONFIGURED_INLINE": (numbers := topic("inline")),
        "CONFIGURED_QUEUED": topic("queued"),
    }
    producer = KafkaProducer(bootstrap_servers=kafka.hosts)
    producer.send(numbers, b"7")
    producer.close()
    with Process("flowkit", "run", "configured", env=variables, log=tmp_path / "run.log") as process:
        process.wait_for("inline 7")
        assert process.stop() == 0

    assert f"in {env}, 1 host" in process.output
    assert ("INFO    started" in process.output) is shown


def test_production_says_how_its_redis_may_lose_messages(kafka: Kafka, topic: MakeTopic, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        with Redis.from_url(server.url) as redis:
            redis.config_set("maxmemory-policy", "allkeys-lru")
        env = {
            "FLOWKIT_ENV": "production",
            "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
            "FLOWKIT_REDIS": server.url,
            "CONFIGURED_NAME": topic("named"),
            "CONFIGURED_INLINE": topic("inline"),
            "CONFIGURED_QUEUED": topic("queued"),
        }
        with Process("flowkit", "run", "configured", env=env, log=tmp_path / "run.log") as process:
            process.wait_for("Redis may throw queued messages away: its maxmemory-policy is allkeys-lru")
            assert process.stop() == 0


def test_flowkit_dev_does_not_start_in_production() -> None:
    done = flowkit("dev", "hello", env={"FLOWKIT_ENV": "production"})

    assert done.code == 2
    assert "flowkit dev keeps nothing, so it does not start in the environment production" in done.err


def test_a_misspelt_environment_is_refused() -> None:
    done = flowkit("info", "hello", env={"FLOWKIT_ENV": "prodution"})

    assert (done.code, done.out) == (2, "")
    assert "env: did you mean production?" in done.err


def test_the_environment_names_the_application() -> None:
    assert flowkit("routes", env={"FLOWKIT_APP": "hello:app"}) == flowkit("routes", "hello:app")
