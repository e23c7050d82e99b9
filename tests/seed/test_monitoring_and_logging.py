"""Monitoring and logging: the monitor of an application, subscribers, and log lines as text or JSON, of real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer
from processes import Process
from redis import Redis
from servers import Kafka, MakeTopic, WaitFor


class Monitored:
    """The application ``apps/monitored.py`` with topics of its own."""

    def __init__(self, hosts: str, topic: MakeTopic, url: str, logs: Path) -> None:
        self.logs = logs
        self.topics = {name: topic(name) for name in ("inline", "queued", "out", "dead")}
        self.name = topic("monitored")
        self.env = {
            "FLOWKIT_KAFKA_HOSTS": hosts,
            "FLOWKIT_REDIS": url,
            "MONITORED_NAME": self.name,
            **{f"MONITORED_{name.upper()}": made for name, made in self.topics.items()},
        }

    def start(self, command: str, **env: str) -> Process:
        log = self.logs / f"{command}.log"
        return Process("flowkit", command, "monitored", env={**self.env, **env}, log=log)

    def send(self, name: str, *values: int) -> None:
        producer = KafkaProducer(bootstrap_servers=self.env["FLOWKIT_KAFKA_HOSTS"])
        for value in values:
            producer.send(self.topics[name], str(value).encode())
        producer.close()


@pytest.fixture
def monitored(kafka: Kafka, topic: MakeTopic, redis: Redis, redis_url: str, tmp_path: Path) -> Monitored:
    return Monitored(kafka.hosts, topic, redis_url, tmp_path)


def told(process: Process, *events: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in process.output.splitlines() if line.startswith('{"event"')]
    return [line for line in lines if line["event"] in events]


def test_a_monitor_of_ones_own_is_told_of_the_whole_way_of_a_message(monitored: Monitored, wait_for: WaitFor) -> None:
    topics, group = monitored.topics, f"{monitored.name}_{monitored.topics['queued']}"
    where = {"topic": topics["queued"], "partition": 0, "offset": 0, "group": group}
    with monitored.start("run") as run, monitored.start("worker") as worker:
        wait_for(lambda: len(told(run, "rebalanced")) == 2, what="both groups")
        monitored.send("inline", 1, 2)
        monitored.send("queued", 3)
        wait_for(lambda: sum(line["count"] for line in told(run, "responded")) == 2, what="responses")
        wait_for(lambda: told(worker, "dead"), what="the dead letter")
        assert (run.stop(), worker.stop()) == (0, 0)

    [started], [stopped] = told(run, "started"), told(run, "stopped")
    assert started["application"] == monitored.name
    assert (stopped["clean"], len(told(run, "subscriber stopped"))) == (True, 1)
    consumed = told(run, "consumed")
    assert sum(line["count"] for line in consumed if line["topic"] == topics["inline"]) == 2
    assert sum(line["count"] for line in consumed if line["topic"] == topics["queued"]) == 1
    assert {line["topic"] for line in told(run, "responded")} == {topics["out"]}
    assert told(run, "queued") == [
        {"event": "queued", "topic": topics["queued"], "queue": "default", "count": 1, "jobs": 1, "group": group}
    ]
    assert {json.dumps({**line, "event": ""}) for line in told(run, "method consumed")} == {
        json.dumps({**line, "event": ""}) for line in consumed
    }

    assert [(line["count"], line["failed"]) for line in told(worker, "performed")] == [(1, 1), (1, 1)]
    failed = told(worker, "method failed")
    assert [(line["attempt"], line["last"], line["error"]) for line in failed] == [
        (1, False, "no 3"),
        (2, True, "no 3"),
    ]
    assert [line["offset"] for line in failed] == [0, 0]
    assert told(worker, "retried") == [{"event": "retried", **where, "attempt": 2, "delay": 1}]
    dead = {**where, "attempt": 2, "dead_letter": topics["dead"]}
    assert told(worker, "dead", "subscriber dead") == [
        {"event": "dead", **dead},
        {"event": "subscriber dead", **dead},
    ]


def test_log_lines_are_json_where_asked_for(monitored: Monitored, wait_for: WaitFor) -> None:
    env = {"FLOWKIT_LOG_FORMAT": "json", "FLOWKIT_LOG_LEVEL": "debug"}
    with monitored.start("run", **env) as run:
        wait_for(lambda: len(told(run, "rebalanced")) == 2, what="both groups")
        monitored.send("inline", 1)
        wait_for(lambda: told(run, "responded"), what="a response")
        assert run.stop() == 0

    lines = [json.loads(line) for line in run.output.splitlines() if line.startswith("{")]  # the command speaks too
    logged = [line for line in lines if line.get("logger") == "flowkit"]
    [consumed] = [line for line in logged if line.get("event") == "consumed"]
    assert consumed["topic"] == monitored.topics["inline"]
    assert (consumed["level"], consumed["count"]) == ("debug", 1)
    assert {"started", "rebalanced", "stopped"} <= {line.get("event") for line in logged}


def test_the_log_level_is_an_option_and_a_setting(monitored: Monitored) -> None:
    with monitored.start("run", FLOWKIT_LOG_LEVEL="error") as quiet:
        quiet.wait_for('"event": "rebalanced"')
        assert quiet.stop() == 0

    assert "INFO" not in quiet.output
