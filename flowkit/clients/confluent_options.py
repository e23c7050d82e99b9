"""The options of confluent-kafka's clients: flowkit's defaults, what the settings say, and what a user may pass through.

They are given as flowkit and kafka-python name them, or as librdkafka does with ``_`` in the place of dots:
``fetch_wait_max_ms`` is its ``fetch.wait.max.ms``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaConsumer

from ..errors import ConfigurationError
from ..settings import Settings
from .kafka_options import client_options, in_ms

RENAMED = {
    "fetch_max_wait_ms": "fetch.wait.max.ms",
    "max_request_size": "message.max.bytes",
    "max_in_flight_requests_per_connection": "max.in.flight.requests.per.connection",
    "metadata_max_age_ms": "topic.metadata.refresh.interval.ms",
    "receive_buffer_bytes": "socket.receive.buffer.bytes",
    "send_buffer_bytes": "socket.send.buffer.bytes",
    "sasl_plain_username": "sasl.username",
    "sasl_plain_password": "sasl.password",
    "ssl_cafile": "ssl.ca.location",
    "ssl_certfile": "ssl.certificate.location",
    "ssl_keyfile": "ssl.key.location",
    "ssl_password": "ssl.key.password",
    "ssl_crlfile": "ssl.crl.location",
    "ssl_ciphers": "ssl.cipher.suites",
    "bootstrap_timeout_ms": "",
    "metrics_enabled": "",
}
"""Options of kafka-python, and what librdkafka calls them where that is not the same with dots; nothing: it needs none."""

BOTH = {
    "socket.timeout.ms": 10_000,
    "reconnect.backoff.max.ms": 1_000,
    "topic.metadata.refresh.interval.ms": 30_000,  # topics made later, and partitions added, are seen within half a minute
    "log_level": 2,  # what is wrong with a connection is told by a callback, and said once, as an error with its next step
}
CONSUMER = {
    **BOTH,
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    # What is said where an offset is not there; where to go on is decided here, so that nothing is passed over in silence.
    "auto.offset.reset": "error",
    "allow.auto.create.topics": False,
    "check.crcs": True,
    "isolation.level": "read_uncommitted",  # as other clients; librdkafka's own differs
    "fetch.wait.max.ms": 50,
    "max.partition.fetch.bytes": 8 * 1024 * 1024,
    # Where enough is at hand, librdkafka asks again only after this: with its own 1,000 ms it idles at a ninth of the rate.
    "fetch.queue.backoff.ms": 10,
    "statistics.interval.ms": 1_000,
}
PRODUCER = {
    **BOTH,
    "acks": "all",
    "enable.idempotence": True,
    "linger.ms": 5,
    "batch.size": 1024 * 1024,
    "partitioner": "murmur2_random",  # as Kafka's own partitioners place keys
    "request.timeout.ms": 15_000,
    "delivery.timeout.ms": 30_000,
    "message.max.bytes": 16 * 1024 * 1024,  # the broker decides what is too large: topics have limits of their own
    "queue.buffering.max.kbytes": 256 * 1024,
}


def confluent_options(settings: Settings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one client: flowkit's defaults, the settings, and what the user passes through. Touches no network.

    Raises ``ConfigurationError``.
    """
    given = {**client_options(settings, KafkaConsumer, {}), **settings.kafka.options}
    given.pop("auto_offset_reset", None)
    options = {**defaults, "bootstrap.servers": ",".join(given.pop("bootstrap_servers"))}
    if given.pop("ssl_check_hostname", True) is False:
        options["ssl.endpoint.identification.algorithm"] = "none"
    for name, value in given.items():
        dotted = RENAMED.get(name, name.replace("_", "."))
        if dotted and value not in (None, ""):
            options[dotted] = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    return options


def consumer_options(settings: Settings, group: str) -> dict[str, Any]:
    """The same, for the consumer of a group."""
    kafka = settings.kafka
    options = confluent_options(settings, CONSUMER)
    options.update({"group.id": group, "max.poll.interval.ms": in_ms(kafka.max_poll_interval)})
    if kafka.group_instance_id is not None:
        options["group.instance.id"] = kafka.group_instance_id
    if "fetch.max.bytes" in options:  # librdkafka refuses one that is less than what a producer may send
        options.setdefault("message.max.bytes", min(1_000_000, int(options["fetch.max.bytes"])))
    if options.get("group.protocol") == "consumer":  # KIP-848: the brokers decide about the rest
        return options
    if "sticky" in kafka.partition_assignment_strategy:
        raise ConfigurationError(
            "kafka.partition_assignment_strategy: confluent-kafka has no sticky; take cooperative-sticky, range or roundrobin"
        )
    if "cooperative-sticky" in kafka.partition_assignment_strategy and len(kafka.partition_assignment_strategy) > 1:
        raise ConfigurationError(
            "kafka.partition_assignment_strategy: confluent-kafka takes cooperative-sticky alone only; a group changes to it"
            " with all its processes stopped, or with client='kafka-python', process after process"
        )
    if kafka.partition_assignment_strategy:
        options["partition.assignment.strategy"] = ",".join(kafka.partition_assignment_strategy)
    options["session.timeout.ms"] = in_ms(kafka.session_timeout)
    options["heartbeat.interval.ms"] = in_ms(kafka.heartbeat_interval)
    # librdkafka takes none that is shorter than the session, in which the brokers would not miss this member anyway
    options["max.poll.interval.ms"] = max(options["max.poll.interval.ms"], options["session.timeout.ms"])
    return options


def is_cooperative(options: Mapping[str, Any]) -> bool:
    """Whether partitions come and go one by one, and not all of them with every rebalance."""
    return (
        options.get("group.protocol") == "consumer"
        or options.get("partition.assignment.strategy") == "cooperative-sticky"
    )
