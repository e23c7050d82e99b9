"""Errors as a person at a terminal should see them: one message and an exit code; what is theirs, shown as theirs."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from .errors import ConfigurationError, FlowkitError
from .locate import locate

if TYPE_CHECKING:
    from .app import Flowkit


@contextmanager
def reported() -> Iterator[None]:
    """Ends the process with code 2 for a wrong call or application, with 1 for a failure while running, and says why."""
    try:
        yield
    except ConfigurationError as error:
        _fail(error, 2)
    except FlowkitError as error:
        _fail(error, 1)
    except Exception as error:
        if not _frames(error):  # not the application's: a traceback of ours is what a report of it needs
            raise
        _fail_theirs("the application failed", error)


def _fail(error: Exception | str, code: int) -> NoReturn:
    print(f"flowkit: {error}", file=sys.stderr)
    sys.exit(code)


def load(reference: str | None) -> Flowkit:
    """The application, or an exit that shows the user's own error as theirs: without a frame of flowkit."""
    try:
        return locate(reference)
    except FlowkitError as error:
        frames = _frames(error)
        if frames:  # raised by a line of the user's module, for example a decorator with a wrong option
            place = f"\n  at {frames[-1].filename}:{frames[-1].lineno}"
            _fail(f"{error}{place}", 2 if isinstance(error, ConfigurationError) else 1)
        raise
    except Exception as error:
        _fail_theirs(f"{reference or os.environ.get('FLOWKIT_APP')} could not be imported", error)


def _fail_theirs(what: str, error: Exception) -> NoReturn:
    """Ends with an error of the user's code as Python would show it, its causes too, but without frames of ours."""
    told = traceback.TracebackException.from_exception(error)
    chain: list[traceback.TracebackException | None] = [told]
    while chain:
        part = chain.pop()
        if part is not None:
            part.stack = traceback.StackSummary.from_list([f for f in part.stack if not _ours(f)])
            chain += [part.__cause__, part.__context__]
    text = "".join(told.format())
    if not told.stack:
        text = text.removeprefix("Traceback (most recent call last):\n")  # a SyntaxError names its place itself
    print(f"flowkit: {what}:\n\n{text}", end="", file=sys.stderr)
    sys.exit(1)


OURS = tuple(os.path.dirname(path) + os.sep for path in (__file__, importlib.__file__))
INSTALLED = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _ours(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(("<frozen ", *OURS)) or f"{os.sep}typer{os.sep}" in frame.filename


def _frames(error: Exception) -> list[traceback.FrameSummary]:
    """Where an error passed through the user's own code; nothing where it did not."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _ours(frame)]
    return [frame for frame in frames if not frame.filename.startswith(INSTALLED)]
