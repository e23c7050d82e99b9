"""The application ``apps/shapes.py`` as a running system: its processes on the real broker and Redis, and what they did."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path
from typing import Any

from commands import read_topic
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from processes import Process
from redis import Redis
from servers import Kafka, WaitFor

from flowkit.devstack import create_topics

IN = ("payload", "coroutine", "message", "typed")


class System:
    """Topics, queue and log files of its own, so that every test begins with nothing."""

    def __init__(
        self,
        kafka: Kafka,
        redis: Redis,
        url: str,
        logs: Path,
        wait_for: WaitFor,
        partitions: int = 1,
    ) -> None:
        self.hosts = kafka.hosts
        self.name = f"seed-{uuid.uuid4().hex[:8]}"
        counts = {name: partitions if name in IN else 1 for name in (*IN, "out", "dead")}
        create_topics(self.hosts, {f"{self.name}.{name}": count for name, count in counts.items()})
        self.redis = redis
        self.url = url
        self.logs = logs
        self.wait_for = wait_for

    def start(self, *command: str, **env: str) -> Process:
        environment = {"FLOWKIT_KAFKA_HOSTS": self.hosts, "FLOWKIT_REDIS": self.url, "SEED": self.name, **env}
        return Process(*command, env=environment, log=self.logs / f"{command[0]}-{command[1]}.log")

    def run(self, **env: str) -> Process:
        return self.start("flowkit", "run", "shapes:app", **env)

    def worker(self, plain: bool = False) -> Process:
        """``rq worker``, or ``flowkit worker``."""
        return (
            self.start("rq", "worker", "--url", self.url, self.name)
            if plain
            else self.start("flowkit", "worker", "shapes:app")
        )

    def send(self, topic: str, *orders: dict[str, Any], partition: int | None = None) -> None:
        """Sends to one of the application's topics, named without its first part."""
        self.put(f"{self.name}.{topic}", *orders, partition=partition)

    def put(self, topic: str, *values: Any, partition: int | None = None) -> None:
        with contextlib.closing(KafkaProducer(bootstrap_servers=self.hosts)) as producer:
            for value in values:
                producer.send(topic, json.dumps(value).encode(), partition=partition)
            producer.flush()

    def answers(self, count: int) -> list[dict[str, Any]]:
        """Waits for so many answers; gives them by ``n``."""
        records = read_topic(self.hosts, f"{self.name}.out", count)
        return sorted((json.loads(record.value) for record in records), key=lambda answer: int(answer["n"]))

    def dead(self, count: int) -> list[dict[str, Any]]:
        return [json.loads(record.value) for record in read_topic(self.hosts, f"{self.name}.dead", count)]

    def notes(self, what: str, n: int | None = None) -> list[dict[str, Any]]:
        """What was noted so far, in order."""
        found: Any = self.redis.lrange("notes", 0, -1)
        notes = [json.loads(item) for item in found]
        return [note for note in notes if note["what"] == what and n in (None, note["n"])]

    def wait_for_note(self, what: str, n: int, count: int = 1) -> list[dict[str, Any]]:
        self.wait_for(lambda: len(self.notes(what, n)) >= count, 30, f"{count} notes of {what} {n}")
        return self.notes(what, n)

    def committed(self, group: str, topic: str, partition: int = 0) -> int | None:
        with contextlib.closing(
            KafkaConsumer(bootstrap_servers=self.hosts, group_id=group, enable_auto_commit=False)
        ) as consumer:
            offset: int | None = consumer.committed(TopicPartition(f"{self.name}.{topic}", partition))
            return offset

    def group(self, name: str) -> dict[str, Any]:
        """The broker's own description of a consumer group."""
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.hosts)) as admin:
            found: dict[str, Any] = admin.describe_groups([name])[name]
            return found
