"""What an application says of the topics of the cluster, and where the two differ."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from servers import Kafka, MakeTopic
from support import make_app

from flowkit import AlreadyStarted, ConfigurationError, Flowkit
from flowkit.clients.kafka_admin import Cluster, TopicState
from flowkit.topics import Difference, Need, TopicDeclaration, groups, needs, uses, wanted

# Declaring.


def test_a_declaration_is_kept_as_kafka_writes_it() -> None:
    app = make_app()
    app.declare_topic(
        "orders", partitions=6, replication_factor=3, config={"retention.ms": 1000, "preallocate": True}
    )
    assert dict(app.declared_topics) == {
        "orders": TopicDeclaration("orders", 6, 3, {"retention.ms": "1000", "preallocate": "true"})
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a b", {}, "'a b' cannot be the name of a topic"),
        ("a", {"partitions": 0}, "topic 'a': partitions is a whole number of at least 1, not 0; leave it out"),
        ("a", {"partitions": "3"}, "partitions is a whole number of at least 1, not '3'"),
        ("a", {"partitions": True}, "partitions is a whole number of at least 1, not True"),
        ("a", {"replication_factor": -1}, "replication_factor is a whole number of at least 1, not -1"),
        ("a", {"config": "x=1"}, "config is a dict such as .*, not 'x=1'"),
        ("a", {"config": {"retention_ms": 1}}, "config 'retention_ms': did you mean 'retention.ms'?"),
        ("a", {"config": {1: 1}}, "the name of a config is a text, not 1"),
        (
            "a",
            {"config": {"retention.ms": None}},
            "config 'retention.ms' is a text, a number or True or False, not None",
        ),
    ],
)
def test_what_no_topic_can_have_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("?", r"\?")):
        make_app().declare_topic(name, **options)


def test_a_topic_is_declared_once() -> None:
    app = make_app()
    app.declare_topic("orders")
    with pytest.raises(ConfigurationError, match="topic 'orders' is declared twice; declare it once, with all its"):
        app.declare_topic("orders", partitions=3)


def test_nothing_is_declared_after_the_start() -> None:
    app = make_app()
    app.handlings  # noqa: B018
    with pytest.raises(AlreadyStarted):
        app.declare_topic("orders")


# What it needs.


def busy(**settings: Any) -> Flowkit:
    app = make_app(**settings)

    @app.responds_to("parcels")
    def announce(order: int) -> None: ...

    @app.responds_to("apart")
    def outside() -> None: ...

    @app.topic("orders", dead_letter="orders.dead", responder=announce)
    @app.responds_to("invoices")
    def bill(order: Any) -> None: ...

    @app.topic("invoices", group="packing")
    def pack(invoice: Any) -> None: ...

    @app.topic("returns", group="packing")
    def unpack(invoice: Any) -> None: ...

    app.declare_topic("audit")
    app.declare_topic("orders")
    return app


def test_every_topic_is_known_by_what_it_is_used_for() -> None:
    assert uses(busy()) == {
        "apart": ["response"],
        "audit": ["declared"],
        "invoices": ["response", "route"],
        "orders": ["route"],
        "orders.dead": ["dead letter"],
        "parcels": ["response"],
        "returns": ["route"],
    }


def test_the_groups_have_their_topics() -> None:
    assert groups(busy()) == {"packing": ["invoices", "returns"], "shop_orders": ["orders"]}


def test_a_topic_is_to_be_made_as_declared_else_as_the_settings_say_else_as_the_brokers_do() -> None:
    app = make_app(kafka={"partitions": 4, "replication_factor": 3})
    app.declare_topic("orders", partitions=6)
    assert wanted(app, "orders") == TopicDeclaration("orders", 6, 3)
    assert wanted(app, "mails") == TopicDeclaration("mails", 4, 3)
    assert wanted(make_app(), "mails") == TopicDeclaration("mails", None, None)


# Where it is not so. On a real cluster.


def test_differences_are_told_with_what_to_do(kafka: Kafka, topic: MakeTopic) -> None:
    if not kafka.apache:
        pytest.skip("the embedded broker knows no settings of topics")
    app = make_app(kafka={"hosts": kafka.hosts, "partitions": 9, "replication_factor": 9})
    few, many, plain, right = topic("few", 1), topic("many", 3), topic("plain", 2), topic("right", 2)
    missing = f"missing-{uuid.uuid4().hex[:8]}"
    app.declare_topic(few, partitions=2, config={"cleanup.policy": "compact,delete", "no.such.thing": 1})
    app.declare_topic(many, partitions=2, replication_factor=3)
    app.declare_topic(right, partitions=2, replication_factor=1, config={"cleanup.policy": "delete"})
    app.declare_topic(missing)
    app.add_topic(plain, print)  # the settings are for topics to be made
    with Cluster(app.settings_for_kafka()) as cluster:
        found = {need.topic: need for need in needs(app, cluster)}
    at = f"--bootstrap-server {kafka.hosts}"
    assert found[few].differences == [
        Difference(
            "partitions",
            "2",
            "1",
            f"kafka-topics.sh {at} --alter --topic {few} --partitions 2\n  (keys then go to other partitions than before)",
        ),
        Difference(
            "cleanup.policy",
            "compact,delete",
            "delete",
            f"kafka-configs.sh {at} --alter --entity-type topics --entity-name {few}"
            " --add-config cleanup.policy=[compact,delete]",
        ),
        Difference(
            "no.such.thing", "1", "unknown", "correct the name: these brokers have no such setting of a topic"
        ),
    ]
    assert [(d.what, d.declared, d.found) for d in found[many].differences] == [
        ("partitions", "2", "3"),
        ("replication_factor", "3", "1"),
    ]
    assert found[many].differences[0].advice.startswith("declare 3: Kafka takes no partitions away")
    assert found[plain] == Need(plain, ["route"], TopicDeclaration(plain, 9, 9), TopicState(plain, 2, 1), [])
    assert {name: need.verdict for name, need in found.items()} == {
        few: "differs",
        many: "differs",
        plain: "there",
        right: "there",
        missing: "missing",
    }
