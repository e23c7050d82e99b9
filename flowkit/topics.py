"""The topics an application needs: what it uses each of them for, and what it declares about them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ConfigurationError
from .route import check_name

if TYPE_CHECKING:
    from .app import Flowkit
    from .clients.kafka_admin import Cluster, TopicState

ConfigValue = str | int | float | bool


class TopicDeclaration(NamedTuple):
    """What ``app.declare_topic`` says of one topic. None means: as the settings, or else the brokers, have it."""

    name: str
    partitions: int | None = None
    replication_factor: int | None = None
    config: Mapping[str, str] = MappingProxyType({})


def declare(
    name: str,
    partitions: int | None = None,
    replication_factor: int | None = None,
    config: Mapping[str, ConfigValue] | None = None,
) -> TopicDeclaration:
    """A checked declaration. Raises ``ConfigurationError`` for what no topic can have."""
    check_name("topic", name)
    for option, value in (("partitions", partitions), ("replication_factor", replication_factor)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigurationError(
                f"topic {name!r}: {option} is a whole number of at least 1, not {value!r}; leave it out for the default"
            )
    if config is not None and not isinstance(config, Mapping):
        raise ConfigurationError(
            f"topic {name!r}: config is a dict such as {{'retention.ms': 86400000}}, not {config!r}"
        )
    return TopicDeclaration(
        name,
        partitions,
        replication_factor,
        {_config_name(name, key): _config_text(name, key, value) for key, value in (config or {}).items()},
    )


def _config_name(topic: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"topic {topic!r}: the name of a config is a text, not {name!r}")
    if "." not in name and "_" in name:
        raise ConfigurationError(f"topic {topic!r}: config {name!r}: did you mean {name.replace('_', '.')!r}?")
    return name


def _config_text(topic: str, name: str, value: Any) -> str:
    """As Kafka writes it: ``True`` is ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise ConfigurationError(
            f"topic {topic!r}: config {name!r} is a text, a number or True or False, not {value!r}"
        )
    return str(value)


def uses(app: Flowkit) -> dict[str, list[str]]:
    """Every topic that an application reads, sends to or declares, by name, and what it is to it: ``route``, ``response``,
    ``retry``, ``dead letter``; only ``declared`` for one that just ``declare_topic`` names.
    """
    found: dict[str, list[str]] = {}

    def add(topic: str, use: str) -> None:
        kinds = found.setdefault(topic, [])
        if use not in kinds:
            kinds.append(use)

    for topic, handling in app.handlings.items():
        add(topic, "route")
        for response in handling.all_declarations:
            add(response, "response")
        for retry_topic, _ in handling.retry_topics:
            add(retry_topic, "retry")
        if handling.dead_letter:
            add(handling.dead_letter, "dead letter")
    for topic in app.response_topics:  # also those of responders that are used outside handlers only
        add(topic, "response")
    for topic in app.declared_topics:
        if topic not in found:
            add(topic, "declared")
    return dict(sorted(found.items()))


def groups(app: Flowkit) -> dict[str, list[str]]:
    """The consumer groups of an application, and the topics of each."""
    found: dict[str, list[str]] = {}
    for topic, handling in sorted(app.handlings.items()):
        found.setdefault(handling.group, []).extend([topic, *(waiting for waiting, _ in handling.retry_topics)])
    return dict(sorted(found.items()))


def wanted(app: Flowkit, topic: str) -> TopicDeclaration:
    """What ``flowkit topics --create`` would make of a topic: its declaration, with the settings where that says nothing."""
    kafka = app.settings.kafka
    declared = app.declared_topics.get(topic) or TopicDeclaration(topic)
    return TopicDeclaration(
        topic,
        declared.partitions or kafka.partitions,
        declared.replication_factor or kafka.replication_factor,
        declared.config,
    )


class Difference(NamedTuple):
    """Where a topic is not as ``declare_topic`` says, and what a person can do about it. flowkit never does it by itself."""

    what: str
    declared: str
    found: str
    advice: str


class Need(NamedTuple):
    """A topic that an application needs, and how the cluster has it. ``state`` is None where it is missing."""

    topic: str
    uses: list[str]
    wanted: TopicDeclaration
    state: TopicState | None
    differences: list[Difference]

    @property
    def verdict(self) -> str:
        """``missing``, ``differs`` or ``there``."""
        return "missing" if self.state is None else "differs" if self.differences else "there"


def needs(app: Flowkit, cluster: Cluster) -> list[Need]:
    """What an application needs and what the cluster has, by topic.

    Compared is what ``declare_topic`` says; ``kafka.partitions`` and ``kafka.replication_factor`` are for topics to be made.
    Raises ``BrokerUnavailable`` or ``ConfigurationError``.
    """
    used = uses(app)
    declared = {topic: app.declared_topics.get(topic) or TopicDeclaration(topic) for topic in used}
    states = cluster.topics(used, {topic: list(declaration.config) for topic, declaration in declared.items()})
    hosts = ",".join(app.settings.kafka.hosts)
    return [
        Need(
            topic,
            kinds,
            wanted(app, topic),
            states.get(topic),
            _differences(declared[topic], states[topic], hosts) if topic in states else [],
        )
        for topic, kinds in used.items()
    ]


def _differences(declared: TopicDeclaration, state: TopicState, hosts: str) -> list[Difference]:
    found = []
    name = declared.name
    if declared.partitions is not None and declared.partitions != state.partitions:
        if declared.partitions > state.partitions:
            advice = (
                f"kafka-topics.sh --bootstrap-server {hosts} --alter --topic {name} --partitions {declared.partitions}"
                "\n  (keys then go to other partitions than before)"
            )
        else:
            advice = f"declare {state.partitions}: Kafka takes no partitions away, short of making the topic anew"
        found.append(Difference("partitions", str(declared.partitions), str(state.partitions), advice))
    if declared.replication_factor is not None and declared.replication_factor != state.replication_factor:
        advice = f"kafka-reassign-partitions.sh --bootstrap-server {hosts}, with a plan that names the brokers"
        found.append(
            Difference("replication_factor", str(declared.replication_factor), str(state.replication_factor), advice)
        )
    for key, value in declared.config.items():
        if key not in state.config:
            advice = "correct the name: these brokers have no such setting of a topic"
            found.append(Difference(key, value, "unknown", advice))
        elif state.config[key].replace(" ", "") != value.replace(" ", ""):
            command = f"kafka-configs.sh --bootstrap-server {hosts} --alter --entity-type topics --entity-name {name}"
            pair = f"{key}=[{value}]" if "," in value else f"{key}={value}"
            found.append(Difference(key, value, state.config[key], f"{command} --add-config {pair}"))
    return found
