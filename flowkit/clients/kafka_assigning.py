"""Who gets which partition: the strategies of kafka-python by their names, and one of them made right."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

with warnings.catch_warnings():  # kafka-python 3.0 warns at its own import, which must not fail under -W error
    warnings.simplefilter("ignore", DeprecationWarning)
    from kafka.coordinator.assignors.abstract import RebalanceProtocol
    from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
    from kafka.coordinator.assignors.range import RangePartitionAssignor
    from kafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
    from kafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor


class CooperativeSticky(CooperativeStickyAssignor):  # type: ignore[misc]
    """kafka-python's own, but for two things.

    That one goes on claiming what it was given last, also after it has lost its membership. The leader then keeps such a
    partition from its next owner until the one who claims it gives it up, which never happens: it stays with nobody until the
    group changes again. This one claims what its consumer has.

    And it may stand in a list with an eager strategy, as Java's. All members revoke everything then, as with that strategy: it
    is how a group changes to this one process after process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.consumer: Any = None

    def supported_protocols(self) -> list[RebalanceProtocol]:
        return [RebalanceProtocol.COOPERATIVE, RebalanceProtocol.EAGER]

    def metadata(self, topics: Collection[str]) -> Any:
        eager = self.consumer._coordinator._rebalance_protocol is RebalanceProtocol.EAGER
        self.member_assignment = [] if eager else list(self.consumer._subscription.assigned_partitions())
        return super().metadata(topics)


STRATEGIES: dict[str, Any] = {
    "range": RangePartitionAssignor,
    "roundrobin": RoundRobinPartitionAssignor,
    "sticky": StickyPartitionAssignor,
    "cooperative-sticky": CooperativeSticky,
}


def assignors(names: Iterable[str]) -> list[Any]:
    return [STRATEGIES[name]() for name in names]


def bind(found: Sequence[Any], consumer: Any) -> None:
    """Lets them see the consumer that they were made for."""
    for assignor in found:
        if isinstance(assignor, CooperativeSticky):
            assignor.consumer = consumer
