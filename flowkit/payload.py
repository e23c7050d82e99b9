"""Typed payloads: from the bytes of a message to what a handler's annotation asks for.

Dataclasses, TypedDicts, pydantic models, lists of them and everything else pydantic knows are validated by pydantic;
msgspec Structs by msgspec. Both are imported only when a handler asks for such a type.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, get_args, get_origin

import orjson

from .errors import ConfigurationError, ParserError, PayloadError
from .parsers import Json, Raw, Text

logger = logging.getLogger(__name__)

Decode = Callable[[bytes | None], Any]
"""One that is a function of Python may have an attribute ``quick``: a compiled one that gives the same, or raises, and then
the other one is to be asked."""

UNTYPED = (Any, object, dict, dict[str, Any])


def decoder(parser: Any, annotation: Any, topic: str = "a topic") -> Decode:
    """The function that turns the value of a message of ``topic`` into a payload.

    Untyped (no annotation, ``Any``, ``object``, ``dict``, ``dict[str, Any]``): what the parser gives, None for a tombstone, and
    ``{"message": value}`` where the parser raises ``ParserError``, which is logged once. Typed: validated, or
    ``PayloadError``; a class that pydantic does not know is fine for a parser of one's own, which may give such objects.
    Raises ``ConfigurationError`` for an annotation that nothing can be validated against.
    """
    if any(annotation is untyped or annotation == untyped for untyped in UNTYPED):
        untyped = _untyped(parser.parse, topic)
        return _with_quick(untyped, orjson.loads) if parser is Json else untyped
    if _has_struct(annotation):
        return _struct(parser, annotation)
    return _pydantic(parser, annotation)


def _with_quick(decode: Decode, quick: Callable[[Any], Any]) -> Decode:
    decode.quick = quick  # type: ignore[attr-defined]
    return decode


def _untyped(parse: Callable[[bytes], Any], topic: str) -> Decode:
    told = False

    def decode(value: bytes | None) -> Any:
        nonlocal told
        if value is None:
            return None
        try:
            return parse(value)
        except ParserError as error:
            if not told:
                told = True
                logger.warning(
                    "%s has messages that its parser does not read (%s); its handler gets {'message': raw bytes} for them."
                    " Annotate the payload to let them fail instead. Said once.",
                    topic,
                    error,
                )
            return {"message": value}

    return decode


def _pydantic(parser: Any, annotation: Any) -> Decode:
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

    try:
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        except PydanticSchemaGenerationError:
            if parser in (Json, Text, Raw):
                raise
            # a class that the parser may give itself, an Element of XML for instance: it is only looked at
            adapter = TypeAdapter(annotation, config={"arbitrary_types_allowed": True})
        adapter.rebuild()  # now, and not at the first message, where a type names one that is not there yet
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as error:
        raise _impossible(annotation, error) from error
    from_python, from_json = adapter.validator.validate_python, adapter.validator.validate_json
    json = parser is Json
    parse = parser.parse

    def decode(value: bytes | None) -> Any:
        try:
            if value is None:
                return from_python(None)
            if json:
                return from_json(value)  # one pass in Rust instead of parse and validate
            return from_python(parse(value))
        except ValidationError as error:
            raise PayloadError(_in_one_line(annotation, error)) from error

    # with a plugin of pydantic it is a function of Python
    return _with_quick(decode, from_json) if json and inspect.isbuiltin(from_json) else decode


def _impossible(annotation: Any, error: Exception) -> ConfigurationError:
    reason = str(error).splitlines()[0]
    if (
        type(error).__name__ == "PydanticSchemaGenerationError"
    ):  # whose advice is about settings that are not the user's here
        reason = "pydantic does not know it"
    return ConfigurationError(
        f"no payload can be validated against {getattr(annotation, '__name__', annotation)}: {reason};"
        " use a dataclass, TypedDict, pydantic model or msgspec Struct, or Any"
    )


def _in_one_line(annotation: Any, error: Any) -> str:
    mistakes = "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'payload'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)[:5]
    )
    return f"does not fit {getattr(annotation, '__name__', annotation)}: {mistakes}"


def _has_struct(annotation: Any) -> bool:
    if hasattr(get_origin(annotation) or annotation, "__struct_fields__"):
        return True
    return any(_has_struct(part) for part in get_args(annotation))


def _struct(parser: Any, annotation: Any) -> Decode:
    import msgspec

    try:
        read = msgspec.json.Decoder(annotation).decode
    except (TypeError, NameError) as error:
        raise _impossible(annotation, error) from error
    json = parser is Json
    parse = parser.parse

    def decode(value: bytes | None) -> Any:
        try:
            if json and value is not None:
                return read(value)
            return msgspec.convert(None if value is None else parse(value), annotation)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PayloadError(f"does not fit {getattr(annotation, '__name__', annotation)}: {error}") from error

    return _with_quick(decode, read) if json else decode
