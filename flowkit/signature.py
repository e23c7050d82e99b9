"""Signatures, read once at start: a parameter annotated ``Message`` is the message, the other one is the payload."""

from __future__ import annotations

import functools
import inspect
import logging
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from .errors import ConfigurationError
from .message import Message
from .route import Handler

logger = logging.getLogger(__name__)

LISTS = (list, Sequence, Iterable, Collection)
"""What a batch handler may say that it takes."""


class Role:
    """What a parameter is filled with (the payload, or in after_failure the error; or the message), and how."""

    def __init__(self, parameter: inspect.Parameter, *, is_message: bool, by_name: bool) -> None:
        self.parameter = parameter
        self.is_message = is_message
        self.by_name = by_name


def _parameters(function: Handler) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The parameters a caller must or may fill, and the resolved annotations."""
    try:
        hints = typing.get_type_hints(_target(function, wrapped=True), include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        raise ConfigurationError(
            f"an annotation of {name_of(function)} cannot be resolved: {error};"
            " define or import the type at the module's top level"
        ) from error
    try:
        return list(inspect.signature(function).parameters.values()), hints
    except ValueError as error:
        raise ConfigurationError(
            f"{name_of(function)} does not say what it takes; call it from a function"
        ) from error


def _target(function: Any, *, wrapped: bool = False) -> Any:
    """The function that runs when ``function`` is called: inside a partial, behind an object's ``__call__``.

    ``wrapped``: the one whose signature counts, inside decorators too.
    """
    while isinstance(function, functools.partial) or (wrapped and hasattr(function, "__wrapped__")):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return function if inspect.isroutine(function) else type(function).__call__


def name_of(thing: Any) -> str:
    """The name of a function, a class or a module; of an object, that of its class."""
    return getattr(thing, "__qualname__", None) or getattr(thing, "__name__", None) or type(thing).__qualname__


def _is_message(hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return hint is Message or (union and Message in typing.get_args(hint))


def _roles(function: Handler, first: str = "payload", *, batch: bool = False) -> tuple[list[Role], Any]:
    """Which parameter is filled with what, and the annotation of the payload. ``first`` is for errors; ``batch``: the handler
    takes lists.
    """
    target = _target(function)
    if inspect.isgeneratorfunction(target) or inspect.isasyncgenfunction(target):
        raise ConfigurationError(
            f"{name_of(function)} has a yield, so calling it runs nothing; use app.respond_to(...)"
        )
    parameters, hints = _parameters(function)
    lists, hints = hints, {name: _item(hint) for name, hint in hints.items()} if batch else hints
    single = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    messages = [p for p in single if _is_message(hints.get(p.name))]
    others = [p for p in single if p not in messages]
    needed = [p for p in others if p.default is p.empty]
    for parameter in [*needed[1:], *messages[1:]]:
        raise ConfigurationError(
            f"{name_of(function)} has more parameters than flowkit can fill: it takes the {first} and, annotated as"
            f" Message, the message; {parameter.name!r} is one too many"
            + ("; annotate it: message: Message" if parameter.name == "message" and not messages else "")
        )
    # What has a default gets the payload only if nothing else does, and never what a partial has filled in.
    rest = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    chosen = (needed or [p for p in others if p.kind is not p.KEYWORD_ONLY] or rest)[:1]
    roles: list[Role] = []
    skipped = False
    for parameter in parameters:
        if parameter in messages or parameter in chosen:
            by_name = skipped or parameter.kind is parameter.KEYWORD_ONLY
            roles.append(Role(parameter, is_message=parameter in messages, by_name=by_name))
        else:
            skipped = True
    for role in roles if batch else ():
        name, hint = role.parameter.name, lists.get(role.parameter.name, Any)
        if not _is_list(hint):
            raise ConfigurationError(
                f"{name_of(function)} is a batch handler, so its {name!r} is a list: annotate it list[...], and not {hint!r}"
            )
    return roles, hints.get(chosen[0].name, Any) if chosen else Any


def _warn_of_name(function: Handler, roles: Sequence[Role]) -> None:
    for role in roles:
        parameter = role.parameter
        if not role.is_message and parameter.name == "message" and parameter.annotation is parameter.empty:
            logger.warning(
                "%s is given the payload as `message`; annotate it, message: Message, to get the message, or rename it",
                name_of(function),
            )


def takes(function: Handler) -> list[bool]:
    """For each parameter that is filled whether it is the message; empty where there is more to know about it."""
    roles, _ = _roles(function)
    return [] if is_async(function) or any(role.by_name for role in roles) else [role.is_message for role in roles]


def takes_payload_only(function: Handler) -> bool:
    return takes(function) == [False]


def bind(function: Handler) -> tuple[Callable[[Message], Any], Any]:
    """A handler or a before_enqueue hook as a function of its message, and the annotation of its payload.

    What it gives may be a coroutine; ``coroutines.finish`` runs it.
    """
    roles, annotation = _roles(function)
    _warn_of_name(function, roles)
    call: Callable[[Message], Any]
    match [role.is_message for role in roles]:
        case _ if any(role.by_name for role in roles):
            fill = _filler(function, roles)
            read = not all(role.is_message for role in roles)  # else the payload need not be parsed
            call = lambda message: fill(message.payload if read else None, message)  # noqa: E731
        case [False]:
            call = lambda message: function(message.payload)  # noqa: E731
        case [True]:
            call = function
        case [False, True]:
            call = lambda message: function(message.payload, message)  # noqa: E731
        case [True, False]:
            call = lambda message: function(message, message.payload)  # noqa: E731
        case _:
            call = lambda message: function()  # noqa: ARG005, E731
    return call, annotation


def bind_batch(function: Handler) -> tuple[Callable[[Sequence[Message]], Any], Any]:
    """A batch handler as a function of its messages, and the annotation of one payload."""
    roles, annotation = _roles(function, batch=True)
    _warn_of_name(function, roles)
    fill = _filler(function, roles)
    read = reads_payload(function, batch=True)
    return lambda messages: fill([message.payload for message in messages] if read else None, messages), annotation


def reads_payload(function: Handler, *, batch: bool = False) -> bool:
    """Whether a handler takes the payload, and not the message alone."""
    return not all(role.is_message for role in _roles(function, batch=batch)[0])


def _is_list(hint: Any) -> bool:
    return hint in (Any, list) or typing.get_origin(hint) in LISTS


def _item(hint: Any) -> Any:
    """What a list is a list of; of anything else that itself."""
    return next(iter(typing.get_args(hint)), Any) if _is_list(hint) else hint


def _filler(function: Handler, roles: Sequence[Role]) -> Callable[[Any, Message], Any]:
    """``function`` as one of the payload (or the error) and the message, whichever way it takes them."""
    positional = tuple(role.is_message for role in roles if not role.by_name)
    by_name = {role.parameter.name: role.is_message for role in roles if role.by_name}
    return lambda first, message: function(
        *(message if is_message else first for is_message in positional),
        **{name: message if is_message else first for name, is_message in by_name.items()},
    )


def bind_failure(function: Handler) -> Callable[[Exception, Message], Any]:
    """An after_failure hook: the error first, and the message where it is annotated so."""
    return _filler(function, _roles(function, "error")[0])


def is_async(function: Handler) -> bool:
    target = _target(function)
    return inspect.iscoroutinefunction(target)
