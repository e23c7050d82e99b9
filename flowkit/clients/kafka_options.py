"""The options of kafka-python's clients: flowkit's defaults, what the settings say, and what a user may pass through."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka import KafkaConsumer, KafkaProducer

from ..errors import ConfigurationError
from ..settings import Kafka, Settings, Ssl, nearest, unknown_name
from .kafka_security import check_security

SECURITY = ("security_protocol", "sasl_mechanism", "sasl_plain_username", "sasl_plain_password")

BOTH = {
    "bootstrap_timeout_ms": 5_000,
    "reconnect_backoff_max_ms": 1_000,  # as Java's clients; kafka-python's 30 s would keep a node waiting that is back
    "metadata_max_age_ms": 30_000,  # topics made later, and partitions added, are seen within half a minute
    "metrics_enabled": False,
    "allow_auto_create_topics": False,  # a typo in a topic's name must not become a topic
}
CONSUMER = {
    **BOTH,
    "enable_auto_commit": False,
    "auto_offset_reset": "earliest",  # kafka-python's own "latest" skips what is there when a new group starts
    # A fetch that finds its partitions empty is held by the broker this long, and the busy partitions of that broker
    # wait with it: one busy partition of four gave 9,700 messages a second with kafka-python's 500 ms and 1 MB,
    # 221,000 with these. The consumer takes less of it where messages come, and more where none does.
    "fetch_max_wait_ms": 50,
    "max_partition_fetch_bytes": 8 * 1024 * 1024,
}
PRODUCER = {
    **BOTH,
    "acks": "all",
    "enable_idempotence": True,
    "linger_ms": 5,
    "batch_size": 256 * 1024,  # one batch per partition is in flight at a time, so its size bounds the rate
    "request_timeout_ms": 15_000,
    "delivery_timeout_ms": 30_000,
    "max_request_size": 16 * 1024 * 1024,  # the broker decides what is too large: topics have limits of their own
}

COMMITS = "flowkit commits what is done itself; how often is kafka.offset_commit_interval"
PARSER = "flowkit's clients carry bytes; what reads and writes them is the route's parser"
OWN = {
    "bootstrap_servers": "give the brokers as kafka.hosts",
    "client_id": "it is the application's name",
    "group_id": "it belongs to a route, as in @app.topic('orders', group='billing')",
    "session_timeout_ms": "give it in seconds, as kafka.session_timeout",
    "heartbeat_interval_ms": "give it in seconds, as kafka.heartbeat_interval",
    "max_poll_interval_ms": "give it in seconds, as kafka.max_poll_interval",
    "max_block_ms": "give it in seconds, as connection_pool.timeout",
    "enable_auto_commit": COMMITS,
    "auto_commit_interval_ms": COMMITS,
    "default_offset_commit_callback": COMMITS,
    "consumer_timeout_ms": "flowkit consumes until it is stopped",
    "key_deserializer": PARSER,
    "value_deserializer": PARSER,
    "key_serializer": PARSER,
    "value_serializer": PARSER,
    "transactional_id": "flowkit makes one for each group with a route that has transactional=True",
    "transaction_timeout_ms": "give it in seconds, as kafka.transaction_timeout",
    "kafka_client": "flowkit makes it, to say why a broker refused it",
}
"""Options of kafka-python that flowkit sets itself, and what to do instead."""

PROMISED: dict[str, tuple[Any, ...]] = {"acks": ("all", -1), "enable_idempotence": (True,)}
"""The values without which a response could be lost or doubled although its message is done."""


def option_mistakes(settings: Settings) -> list[str]:
    """One sentence for each option that passes through and that flowkit sets itself, or kafka-python does not have."""
    known = KafkaConsumer.DEFAULT_CONFIG.keys() | KafkaProducer.DEFAULT_CONFIG.keys()
    near = sorted(known | Kafka.described.keys() - {"options"})
    mistakes = []
    for name, value in settings.kafka.options.items():
        if name in OWN:
            mistakes.append(f"kafka.{name}: cannot be passed through; {OWN[name]}")
        elif name in PROMISED and value not in PROMISED[name]:
            mistakes.append(f"kafka.{name}: must stay {PROMISED[name][0]!r}, or a response could be lost or doubled")
        elif name not in known and settings.client == "kafka-python":  # else librdkafka says what it does not know
            mistake = unknown_name(f"kafka.{name}", name, near, "setting, or option of kafka-python")
            meant = nearest(name, near)
            mistakes.append(f"{mistake} It cannot be passed through; {OWN[meant]}" if meant in OWN else mistake)
    return mistakes


def client_options(settings: Settings, kind: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one client: flowkit's defaults, the settings, and what the user passes through."""
    if mistakes := option_mistakes(settings):
        raise ConfigurationError("; ".join(mistakes))
    options = dict(defaults)
    options["bootstrap_servers"] = list(settings.kafka.hosts)
    options["client_id"] = settings.name
    ssl = settings.kafka.ssl
    if ssl != Ssl():
        options["security_protocol"] = "SASL_SSL" if settings.kafka.sasl_mechanism else "SSL"
        options["ssl_cafile"] = ssl.ca_cert
        options["ssl_certfile"] = ssl.client_cert
        options["ssl_keyfile"] = ssl.client_cert_key
        options["ssl_password"] = ssl.client_cert_key_password
    for name in SECURITY:
        if (value := getattr(settings.kafka, name)) is not None:
            options[name] = value
    options.update({name: value for name, value in settings.kafka.options.items() if name in kind.DEFAULT_CONFIG})
    check_security(options)
    return options


def in_ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)
