"""How often and how soon a failed message is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """``attempts`` in all, with waits of ``first``, ``first * factor``, ... seconds between them, ``cap`` at most.

    ``jitter`` is the share of a wait that is drawn at random, so that many failures do not come back at once.
    """

    attempts: int = 5
    first: float = 1.0
    factor: float = 2.0
    cap: float = 60.0
    jitter: float = 0.1

    def __post_init__(self) -> None:
        possible = isinstance(self.attempts, int) and self.attempts >= 1
        if not (possible and self.first >= 0 and self.factor >= 1 and self.cap >= 0 and 0 <= self.jitter <= 1):
            raise ValueError(
                f"{self} is not possible: attempts is at least 1, first and cap are seconds of at least 0,"
                " factor is at least 1, jitter is between 0 and 1"
            )

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the failure of attempt number ``attempt`` (1 is the first)."""
        try:
            wait = min(self.first * float(self.factor) ** (attempt - 1), self.cap)
        except OverflowError:  # 2.0 ** 1024 is one, and a message may fail for weeks
            wait = self.cap if self.first else 0.0
        return wait * (1 - self.jitter * random.random())

    def __str__(self) -> str:
        return f"{self.attempts} attempts, waits from {self.first:g} s times {self.factor:g} up to {self.cap:g} s"
