"""The same with other frameworks: python inline_peers.py SIDE."""

import asyncio
import os
import sys
from typing import Any

from witness import witness

hosts, topic, group, out = (os.environ[f"BENCH_{name}"] for name in ("HOSTS", "TOPIC", "GROUP", "OUT"))
responds = os.environ["BENCH_CASE"] == "respond"
take = witness().take


def quix() -> None:
    """Quix Streams, at least once, which is its default."""
    from quixstreams import Application

    app = Application(
        broker_address=hosts,
        consumer_group=group,
        auto_offset_reset="earliest",
        commit_interval=0.2,
        auto_create_topics=False,
        loglevel="WARNING",
    )
    frame = app.dataframe(app.topic(topic, value_deserializer="json")).update(take)
    if responds:
        frame.to_topic(app.topic(out, value_serializer="json"))
    app.run()


def faststream(client: str, mode: str) -> None:
    """FastStream: as it is by default, which is at most once; at least once; and that in batches."""
    from faststream import AckPolicy, FastStream

    if client == "aiokafka":
        from faststream.kafka import KafkaBroker
    else:
        from faststream.confluent import KafkaBroker
    broker = KafkaBroker(hosts)
    options: dict[str, Any] = {"group_id": group, "auto_offset_reset": "earliest"}
    if mode != "default":
        options["ack_policy"] = AckPolicy.NACK_ON_ERROR
    if mode == "batches":
        options.update(batch=True, max_records=500)
    subscriber = broker.subscriber(topic, **options)

    async def one(data: dict) -> Any:  # type: ignore[type-arg]
        take(data)
        return data if responds else None

    async def many(batch: list[dict]) -> None:  # type: ignore[type-arg]
        for data in batch:
            take(data)

    handler: Any = many if mode == "batches" else one
    subscriber(broker.publisher(out)(handler) if responds else handler)
    asyncio.run(FastStream(broker).run())


def faust() -> None:
    """Faust-streaming, at least once, which is its default."""
    import faust

    app = faust.App(
        group,
        broker=f"kafka://{hosts}",
        value_serializer="json",
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        web_enabled=False,
        datadir=os.environ["BENCH_DIRECTORY"],
    )
    answers = app.topic(out, value_type=dict)

    @app.agent(app.topic(topic))
    async def handle(stream: Any) -> None:
        async for data in stream:
            take(data)
            if responds:
                await answers.send(value=data)

    faust.Worker(app, loglevel="WARNING").execute_from_commandline()


name, _, rest = sys.argv[1].partition(":")
if name == "faststream":
    faststream(*rest.split(":"))
else:
    {"quix": quix, "faust": faust}[name]()
