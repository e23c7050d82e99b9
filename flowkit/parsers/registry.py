"""Avro and JSON Schema with a schema registry, through confluent-kafka's own client and serializers. Needs the extra
``registry``.

What is on the wire, how subjects are named, when a schema is registered and what is cached is theirs, and so the same as in
every other client of Confluent's.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from ..errors import ConfigurationError, FlowkitError, ParserError, RegistryUnavailable, missing_package
from . import Json, plain

try:
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
    from confluent_kafka.schema_registry.error import SchemaRegistryError
    from confluent_kafka.schema_registry.json_schema import JSONDeserializer, JSONSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext
    from fastavro.schema import parse_schema
    from jsonschema.validators import validator_for
except ImportError as error:
    raise missing_package(
        "flowkit.parsers.registry", "confluent-kafka[avro,json,schemaregistry]", "registry"
    ) from error

DEFAULTS = {"timeout": 5, "max.retries": 2, "retries.wait.ms": 200, "retries.max.wait.ms": 1000}
"""Of the client: without a time-out (in seconds) it would wait for ever."""

QUIET = 1.0
"""Seconds for which a registry that did not answer is not asked again: the next messages would each wait as long."""

AWAY = {401, 403, 408, 429}
"""Statuses, besides those from 500 on, that are no answer to the question: nothing about the message is known then."""


class Client:
    """confluent-kafka's client of one registry, whose methods raise ``RegistryUnavailable`` where there is no answer.

    A connection must not be shared over a fork, so each process has a client of its own.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = {**DEFAULTS, **config}
        self.url = ",".join(map(_without_login, str(config.get("url")).split(",")))
        self._clients: dict[int, Any] = {}
        self._connect(os.getpid())
        self._failed_at = float("-inf")
        self._failure = ""

    def _connect(self, pid: int) -> None:
        client = self._clients[pid] = SchemaRegistryClient(self._config)
        weakref.finalize(self, _close, pid, client)

    def __getattr__(self, name: str) -> Any:
        pid = os.getpid()
        if pid not in self._clients:
            self._connect(pid)
        method = getattr(self._clients[pid], name)
        if name.startswith("_") or not callable(method):
            return method  # its caches, which the serializers look into

        def ask(*args: Any, **options: Any) -> Any:
            if time.monotonic() - self._failed_at < QUIET:
                raise RegistryUnavailable(self._failure)
            try:
                return method(*args, **options)
            except SchemaRegistryError as error:
                if not _is_away(error, name):
                    raise
                raise self._away(error) from error
            except Exception as error:  # of the transport, of a login, or because it is no registry that answers
                raise self._away(error) from error

        return ask

    def _away(self, error: Exception) -> RegistryUnavailable:
        self._failure = (
            f"the schema registry at {self.url} gives no answer: {str(error) or type(error).__name__}; is it running, and"
            " are its address and login right?"
        )
        if not isinstance(error, SchemaRegistryError) or error.http_status_code >= 500:
            self._failed_at = time.monotonic()
        return RegistryUnavailable(self._failure)


def _close(pid: int, client: Any) -> None:
    if os.getpid() == pid:
        client.__exit__(None, None, None)  # which older versions have too


def _is_away(error: SchemaRegistryError, asked: str) -> bool:
    """Whether an error of HTTP says nothing about the schema that was asked for."""
    status, code = error.http_status_code, error.error_code
    if status in AWAY or status >= 500:
        return True
    # A registry's own 404 has a code of five digits, so with another one it is the address that is wrong. For this method
    # alone it is an answer: older registries do not have it, and the client takes that for "none".
    wrong_address = not isinstance(code, int) or code < 0 or (status == 404 and code == 404)
    return wrong_address and asked != "get_associations_by_resource_name"


def _without_login(url: str) -> str:
    parts = urlsplit(url.strip())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class _WithRegistry:
    """What the two formats share: their options, the serializers of one topic, and their errors."""

    def __init__(
        self,
        registry: str | Mapping[str, Any],
        *,
        schema: Any = None,
        topic: str | None = None,
        serializer: Mapping[str, Any] | None = None,
        deserializer: Mapping[str, Any] | None = None,
    ) -> None:
        config = {"url": registry} if isinstance(registry, str) else dict(registry)
        self._topic = topic
        self._serializer_options = dict(serializer or {})
        self._deserializer_options = dict(deserializer or {})
        if schema is None:
            self._serializer_options = {**_NEWEST, **self._serializer_options}
        self._others: dict[str, Self] = {}
        self._serdes: tuple[int, Any, Any] | None = None
        try:
            self._schema = self._read_schema(schema)
            self._client = Client(config)
            if not getattr(self._schema, "references", None):  # those are asked of the registry, when first used
                self._ready()
        except FlowkitError:
            raise
        except Exception as error:  # the client, fastavro and jsonschema have errors of their own each
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ConfigurationError(f"{self!r}: {type(error).__name__}: {reason}") from error

    def for_topic(self, topic: str) -> Self:
        """The same for messages of ``topic``, of which the name of the subject is made. They share one client.

        flowkit calls it itself, for the topic of a route and for each topic that is responded to.
        """
        if topic == self._topic:
            return self
        if topic not in self._others:
            other = object.__new__(type(self))
            other.__dict__.update(self.__dict__, _topic=topic, _serdes=None)
            self._others[topic] = other
        return self._others[topic]

    def parse(self, data: bytes) -> Any:
        """Raises ``ParserError`` for a payload or schema id that is wrong, ``RegistryUnavailable`` if nobody can say."""
        _, deserialize = self._ready()
        try:
            return deserialize(data, self._context())
        except FlowkitError:
            raise
        except Exception as error:  # whatever fastavro makes of wrong bytes
            raise ParserError(f"{self._what} cannot be read: {_said(error)}; it starts with {data[:60]!r}") from error

    def generate(self, value: Any) -> bytes:
        """Raises ``ParserError`` for a value that does not fit its schema, or a schema that the registry refuses;
        ``RegistryUnavailable`` if nobody can say."""
        if value is None:
            raise ParserError(f"{self._what} cannot be None; send None itself, a tombstone")
        serialize, _ = self._ready()
        try:
            written: bytes = serialize(self._plain(value), self._context())
        except FlowkitError:
            raise
        except Exception as error:
            raise ParserError(f"{type(value).__name__} cannot be written as {self._what}: {_said(error)}") from error
        return written

    def __repr__(self) -> str:
        client = self.__dict__.get("_client")
        where = f"({client.url!r}, topic={self._topic!r})" if client else ""
        return f"{type(self).__name__}{where}"

    @property
    def _what(self) -> str:
        return f"{type(self).__name__} of topic {self._topic!r}"

    def _context(self) -> SerializationContext:
        if self._topic is None:
            raise ConfigurationError(
                f"{self!r} does not know its topic, which names the subject; outside a route give it: topic=..., or"
                " .for_topic(...)"
            )
        return SerializationContext(self._topic, MessageField.VALUE)

    def _ready(self) -> tuple[Any, Any]:
        """The serializer and the deserializer of this process: they hold locks, which a fork may leave taken."""
        if self._serdes is None or self._serdes[0] != os.getpid():
            self._serdes = (os.getpid(), *self._make(self._client))
        return self._serdes[1:]

    def _read_schema(self, schema: Any) -> Any:
        if isinstance(schema, os.PathLike):
            return Path(schema).read_text()
        if isinstance(schema, dict | list):
            return json.dumps(schema)
        return schema

    def _make(self, client: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def _plain(self, value: Any) -> Any:
        raise NotImplementedError


_NEWEST = {"auto.register.schemas": False, "use.latest.version": True}
"""How a parser that was given no schema writes."""


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


class Avro(_WithRegistry):
    """Avro in the wire format of Confluent's registry.

    - ``registry``: its URL (several with commas), or the configuration of confluent-kafka's ``SchemaRegistryClient``.
    - ``schema``: how values are written, and as what they are read: text, a dict, a ``Path`` to a file, or confluent-kafka's
      ``Schema``. Without one, values are read as they were written, and written by the newest schema of their topic.
    - ``topic``: for use outside routes; a route tells its own.
    - ``serializer``, ``deserializer``: options of confluent-kafka's ``AvroSerializer`` and ``AvroDeserializer``.

    Raises ``ConfigurationError`` for a schema or an option that cannot be. Nothing is connected before the first message.
    """

    def _read_schema(self, schema: Any) -> Any:
        schema = super()._read_schema(schema)
        if isinstance(schema, str) and schema.lstrip()[:1] in ("{", "["):
            parse_schema(json.loads(schema))  # says better what is wrong than the serializer would
        return schema

    def _make(self, client: Any) -> tuple[Any, Any]:
        return (
            AvroSerializer(client, self._schema, conf=self._serializer_options),
            AvroDeserializer(client, self._schema, conf=self._deserializer_options),
        )

    def _plain(self, value: Any) -> Any:
        return plain(value)


class JsonSchema(_WithRegistry):
    """JSON that is validated, in the wire format of Confluent's registry. The arguments are those of ``Avro``.

    ``schema`` may be a dataclass, TypedDict or pydantic model too: its schema is the one that pydantic makes.
    """

    def _read_schema(self, schema: Any) -> Any:
        if isinstance(schema, type):
            from pydantic import TypeAdapter

            schema = TypeAdapter(schema).json_schema()
        schema = super()._read_schema(schema)
        if isinstance(schema, str):
            read = json.loads(schema)
            validator_for(read).check_schema(read)
        return schema

    def _make(self, client: Any) -> tuple[Any, Any]:
        return (
            JSONSerializer(self._schema, client, conf=self._serializer_options),
            JSONDeserializer(self._schema, schema_registry_client=client, conf=self._deserializer_options),
        )

    def _plain(self, value: Any) -> Any:
        return orjson.loads(Json.generate(value))  # what is validated is what is sent: a date is a text here
