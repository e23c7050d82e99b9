"""The answer to a slow question, kept for a while, so that readers neither wait for it long nor ask it anew each time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from ..errors import FlowkitError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Answer(NamedTuple, Generic[T]):
    """``value`` is the last one there was, ``age`` its seconds; ``problem`` says why there is no newer one."""

    value: T | None = None
    age: float = 0.0
    problem: str | None = None


class Recent(Generic[T]):
    """Asks ``question`` in a thread of its own, one at a time, when somebody looks and the last answer is older than ``keep``
    seconds. A look waits for ``patience`` seconds at most, and then takes what was there before.
    """

    def __init__(self, question: Callable[[], T], *, keep: float = 5.0, patience: float = 2.5) -> None:
        self._question = question
        self._keep = keep
        self._patience = patience
        self._lock = threading.Lock()
        self._asking: threading.Thread | None = None
        self._value: T | None = None
        self._problem: str | None = None
        self._answered = -float("inf")
        self._looked = -float("inf")

    def look(self) -> Answer[T]:
        """The newest answer."""
        with self._lock:
            if time.monotonic() - self._looked >= self._keep and self._asking is None:
                self._asking = threading.Thread(target=self._ask, name="flowkit-web-question", daemon=True)
                self._asking.start()
            asking = self._asking
            patience = (
                self._patience if self._problem is None else 0.0
            )  # it was away a moment ago, and is asked again
        if asking is not None:
            asking.join(patience)
        with self._lock:
            problem = self._problem
            if self._asking is not None:
                problem = problem or f"no answer within {self._patience:g} s"
            return Answer(self._value, time.monotonic() - self._answered, problem)

    def _ask(self) -> None:
        value, problem = None, None
        try:
            value = self._question()
        except FlowkitError as error:
            problem = str(error)
        except Exception as error:
            logger.exception("the web page could not look")
            problem = f"{type(error).__name__}; the log of flowkit web has more"
        with self._lock:
            self._looked = time.monotonic()
            self._problem = problem
            if problem is None:
                self._value, self._answered = value, self._looked
            self._asking = None
