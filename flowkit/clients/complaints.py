"""What is said, in the same words, whichever client meets with it."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BrokerUnavailable, ConfigurationError, DeliveryError, Displaced, MessagesGone, Stopped
from ..message import Partition, places

CHOOSE = (
    "as auto_offset_reset is 'none', set its offset yourself while none of the group runs (`kafka-consumer-groups"
    " --reset-offsets`), or give 'earliest', which goes on behind what is gone"
)


def without_offset(partitions: Sequence[Partition]) -> Stopped:
    """For a group that has no committed offset, where the options say that it may not choose one."""
    return Stopped(f"it has no committed offset for {places(partitions)}; {CHOOSE}")


def gone(partition: Partition, offset: int, first: int) -> MessagesGone:
    """For an offset that is not there, where the options say that another one may not be chosen."""
    what = f"the first message there is has offset {first}"
    if first > offset:
        what += f", up to {first - offset} messages were deleted before they were read"
    return MessagesGone(f"{places([partition])}@{offset} is not there: {what}; {CHOOSE}")


def displaced(instance: str | None) -> Displaced:
    return Displaced(
        f"another process took this one's place in the group, with the same kafka.group_instance_id {instance!r}; what this one"
        " has not committed comes again, to that one. Give each process an id of its own"
    )


def session_not_allowed(seconds: float) -> ConfigurationError:
    return ConfigurationError(
        f"kafka.session_timeout: {seconds:g} s is not in the range that the brokers allow (group.min.session.timeout.ms to"
        " group.max.session.timeout.ms; 6 s to 30 min if nobody has changed them)"
    )


def no_common_strategy(strategies: Sequence[str]) -> ConfigurationError:
    ours = ", ".join(strategies) or "range, roundrobin"
    return ConfigurationError(
        f"kafka.partition_assignment_strategy: the members of the group have none in common with this one ({ours}); change to"
        " another one in two steps, as the page on Kafka says, or with all processes of the group stopped"
    )


def no_topic(topic: str, timeout: float) -> DeliveryError:
    return DeliveryError(
        f"the topic {topic!r} does not exist on the brokers, or they did not answer for {timeout:g} s;"
        " create it (`flowkit topics --create` makes those of an application), or check that Kafka is running",
        passing=True,
    )


def time_not_allowed(longest: float) -> ConfigurationError:
    return ConfigurationError(
        f"kafka.transaction_timeout: {longest:g} s is more than the brokers allow (their transaction.max.timeout.ms)"
    )


def id_refused(transactional_id: str) -> ConfigurationError:
    return ConfigurationError(
        f"Kafka refuses this application the transactional id {transactional_id!r}: let it write and describe the"
        " transactional ids that begin with the name of its group"
    )


def no_transactions(longest: float) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"Kafka has not opened transactions within {longest:g} s; is it up, and does it have as many brokers as"
        " its transaction.state.log.replication.factor and .min.isr ask for?"
    )
