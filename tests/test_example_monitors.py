"""examples/monitors.py with the packages of Sentry and New Relic, in ``flowkit run`` and ``flowkit worker``.

Nothing leaves the machine: Sentry has a transport that writes to a file, New Relic its developer mode and an audit log.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from commands import read_topic
from processes import Process
from redis import Redis
from servers import Kafka, MakeTopic, WaitFor

from flowkit import Flowkit

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass
class Watched:
    """apps/watched.py as a running system."""

    env: dict[str, str]
    kept: Path
    inline: str
    queued: str
    output: list[str] = field(default_factory=list)


@pytest.fixture
def run(kafka: Kafka, topic: MakeTopic, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor) -> Any:
    """Handles 1, 2, 4 inline and 3, 6 in a worker, under the monitor of a service; 1 and 3 end as dead letters."""

    sender = Flowkit("sender", kafka={"hosts": kafka.hosts})

    def run(service: str, **more: str) -> Watched:
        inline, queued, dead = topic("watched"), topic("watched-queued"), topic("watched-dead")
        kept = tmp_path / "kept"
        env = {
            "SERVICE": service,
            "KEPT": str(kept),
            "IN": inline,
            "QUEUED": queued,
            "DEAD": dead,
            "PYTHONPATH": str(EXAMPLES),
            "FLOWKIT_KAFKA_HOSTS": kafka.hosts,
            "FLOWKIT_REDIS": redis_url,
            **more,
        }
        with Process("flowkit", "run", "watched:app", env=env, log=tmp_path / "run.log") as consumer:
            for name, numbers in ((inline, (1, 2, 4)), (queued, (3, 6))):
                for number in numbers:
                    sender.producer.send(name, str(number))
            with Process("flowkit", "worker", "watched:app", env=env, log=tmp_path / "worker.log") as worker:
                letters = read_topic(kafka.hosts, dead, 2)
                assert {record.value for record in letters} == {b"1", b"3"}
                wait_for(lambda: worker.output.count("3 is odd") >= 2, what="the worker's log lines")
                assert worker.stop() == 0, worker.output
            assert consumer.stop() == 0, consumer.output
            return Watched(env, kept, inline, queued, [consumer.output, worker.output])

    yield run
    sender.producer.close()


def test_sentry_gets_each_failed_attempt_once_and_with_its_message(run: Any) -> None:
    watched = run("sentry")
    events = [json.loads(line) for line in watched.kept.read_text().splitlines()]
    found = {}
    for event in events:
        [*_, error] = event["exception"]["values"]
        where = event["contexts"]["kafka"]
        assert event["tags"] == {"flowkit.event": "failed", "kafka.topic": where["topic"]}
        assert error["type"] == "ValueError"
        assert error["stacktrace"]["frames"][-1]["function"] == "inline"  # where it was raised
        key = (where["topic"], where["offset"], where["attempt"])
        assert key not in found, "told twice"
        found[key] = (event["level"], error["value"])
    assert found == {
        (watched.inline, 0, 1): ("warning", "1 is odd"),  # tried again
        (watched.inline, 0, 2): ("error", "1 is odd"),
        (watched.queued, 0, 1): ("warning", "3 is odd"),
        (watched.queued, 0, 2): ("error", "3 is odd"),
    }
    assert all("is odd" in output for output in watched.output)  # the log lines are as without it


def test_new_relic_counts_messages_and_gets_the_errors(run: Any, tmp_path: Path) -> None:
    audit = tmp_path / "audit.log"
    ini = tmp_path / "newrelic.ini"
    ini.write_text(
        f"[newrelic]\napp_name = watched\ndeveloper_mode = true\naudit_log_file = {audit}\nlog_file = stderr\n"
    )
    watched = run("newrelic", NEW_RELIC_CONFIG_FILE=str(ini), NEW_RELIC_LICENSE_KEY="0" * 40)
    sent = harvested(audit.read_text())
    metrics: Counter[str] = Counter()
    for [_, _, _, rows] in sent["metric_data"]:
        for what, numbers in rows:
            if what["name"].startswith("Custom/Kafka/"):
                metrics[what["name"].removeprefix("Custom/Kafka/")] += int(numbers[1])  # the total of the values
    inline, queued = watched.inline, watched.queued
    assert metrics == {
        f"Consumed/{inline}": 3,
        f"Failed/{inline}": 2,
        f"Dead/{inline}": 1,
        f"Consumed/{queued}": 2,
        f"Queued/{queued}": 2,
        f"Performed/{queued}": 3,  # the one that failed came twice
        f"Failed/{queued}": 2,
        f"Dead/{queued}": 1,
    }
    errors = Counter(
        (row[1]["topic"], row[1]["attempt"]) for [_, _, rows] in sent["error_event_data"] for row in rows
    )
    assert errors == {(topic, attempt): 1 for topic in (inline, queued) for attempt in (1, 2)}


def harvested(text: str) -> dict[str, list[Any]]:
    """What the agent's audit log says it sent, by method."""
    found: dict[str, list[Any]] = {}
    for block in re.split(r"^={20,}$", text, flags=re.M):
        method, data = re.search(r"'method': '(\w+)'", block), re.search(r"^DATA: ", block, re.M)
        if method and data:
            found.setdefault(method[1], []).append(ast.literal_eval(block[data.end() :].strip()))
    return found
