"""What happens, counted and told: subscribers and a monitor of one's own. Try it: flowkit dev observed:app"""

from __future__ import annotations

from collections import Counter
from typing import Any

# --8<-- [start:monitor]
from flowkit import Flowkit, Monitor

COUNTS: Counter[str] = Counter()


class Counting(Monitor):
    """Counts messages by topic, and remembers the last one that was given up."""

    last_dead: str | None = None

    def consumed(self, topic: str, count: int, **details: Any) -> None:
        COUNTS[topic] += count

    def dead(self, topic: str, partition: int, offset: int, **details: Any) -> None:
        self.last_dead = f"{topic}[{partition}]@{offset}"


app = Flowkit("observed", kafka={"hosts": "127.0.0.1:9092"}, inline=True, monitor=Counting, retry=1)
# --8<-- [end:monitor]


@app.topic("numbers", dead_letter="numbers.dead")
def halve(number: int) -> None:
    if number % 2:
        raise ValueError(f"{number} is odd")


# --8<-- [start:subscribe]
@app.on_event("failed", "dead")
def tell(event: str, **details: Any) -> None:
    print(f"{event}: {details['topic']} at offset {details['offset']}")


# --8<-- [end:subscribe]
