"""How often and how soon a failed message is tried again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from .errors import ParserError, is_passing
from .frozen import Frozen

Errors = tuple[type[Exception], ...]


class Retry(Frozen):
    """``attempts`` in all, with waits of ``first``, ``first * factor``, ... seconds between them, ``cap`` at most.

    ``jitter`` is the share of a wait that is drawn at random, so that many failures do not come back at once.

    ``never`` names exceptions after which a message is not tried again, ``on`` the only ones after which it is; each is a class
    or several, and means their subclasses too. What cannot be parsed (``ParserError``) is not tried again either, unless ``on``
    is given, or ``never=()``.
    """

    attempts: int
    first: float
    factor: float
    cap: float
    jitter: float
    on: Errors | None
    never: Errors

    def __init__(
        self,
        *,
        attempts: int = 5,
        first: float = 1.0,
        factor: float = 2.0,
        cap: float = 60.0,
        jitter: float = 0.1,
        on: type[Exception] | Errors | None = None,
        never: type[Exception] | Errors | None = None,
    ) -> None:
        only = None if on is None else _errors("on", on)
        refused = (ParserError,) if never is None else _errors("never", never)
        if only is not None:
            refused = () if never is None else refused
        elif refused and ParserError not in refused:
            refused = (*refused, ParserError)
        super().__init__(
            attempts=attempts, first=first, factor=factor, cap=cap, jitter=jitter, on=only, never=refused
        )
        self._check()

    def _check(self) -> None:
        attempts, first, factor, cap, jitter = self.attempts, self.first, self.factor, self.cap, self.jitter
        possible = isinstance(attempts, int) and attempts >= 1
        if not (possible and first >= 0 and factor >= 1 and cap >= 0 and 0 <= jitter <= 1):
            raise ValueError(
                f"{self} is not possible: attempts is at least 1, first and cap are seconds of at least 0,"
                " factor is at least 1, jitter is between 0 and 1"
            )
        for error in self.on or ():
            if issubclass(error, self.never):
                raise ValueError(
                    f"on={error.__name__} is in never= too, so it would not be tried again; take one away"
                )

    def ends(self, attempt: int, error: Exception) -> bool:
        """Whether the failure of attempt number ``attempt`` with this error is the last one of its message.

        Where only a server is away (``is_passing``), it never is.
        """
        if is_passing(error):
            return False
        if self.on is not None and not isinstance(error, self.on):
            return True
        return attempt >= self.attempts or isinstance(error, self.never)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the failure of attempt number ``attempt`` (1 is the first)."""
        return self._wait(attempt) * (1 - self.jitter * random.random())

    def _wait(self, attempt: int) -> float:
        try:
            return min(self.first * float(self.factor) ** (attempt - 1), self.cap)
        except OverflowError:  # 2.0 ** 1024 is one, and a message may fail for weeks
            return self.cap if self.first else 0.0

    def waits(self) -> Iterator[float]:
        """The waits between all attempts, in order and without ``jitter``, each once: ``cap`` ends them."""
        before = None
        for attempt in range(1, self.attempts):
            wait = self._wait(attempt)
            if wait == before:
                return
            yield wait
            before = wait

    def __str__(self) -> str:
        text = f"{self.attempts} attempts, waits from {self.first:g} s times {self.factor:g} up to {self.cap:g} s"
        if self.on is not None:
            text += f", on {_names(self.on)} only"
        if self.on is None and not self.never:
            text += ", also on ParserError"
        elif self.never not in ((), (ParserError,)):
            text += f", never on {_names(self.never)}"
        return text


def _errors(option: str, given: Any) -> Errors:
    """The classes that an option names. Raises ``ValueError`` for anything else."""
    if isinstance(given, list | set | frozenset):
        given = tuple(given)
    errors = given if isinstance(given, tuple) else (given,)
    for error in errors:
        if not (isinstance(error, type) and issubclass(error, Exception)):
            hint = ""
            if isinstance(error, Exception):
                hint = f"; write {option}={type(error).__name__}"
            elif isinstance(error, str):
                hint = "; write the class itself, without quotes"
            raise ValueError(f"{option} takes exception classes, not {error!r}{hint}")
    if option == "on" and not errors:
        raise ValueError("on=() would try nothing again; write attempts=1 for that")
    return errors


def _names(errors: Errors) -> str:
    return ", ".join(error.__name__ for error in errors)
