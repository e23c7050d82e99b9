"""The settings of an application: keywords of ``Flowkit(...)``, environment variables, defaults, and their check.

The environment wins over keywords, so that one file runs everywhere: ``kafka={"hosts": ...}`` is ``FLOWKIT_KAFKA_HOSTS``,
``kafka={"ssl": {"ca_cert": ...}}`` is ``FLOWKIT_KAFKA_SSL_CA_CERT``. All times are in seconds.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError
from .retry import Retry
from .route import name_mistake

Convert = Callable[[Any], Any]

LOG_LEVELS = ("debug", "info", "warning", "error")


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text that is not empty")
    return value.strip()


def secret(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text that is not empty")
    return value


def flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("1", "true", "yes", "on"):
        return True
    if isinstance(value, str) and value.strip().lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def whole(minimum: int) -> Convert:
    def convert(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
            raise ValueError(f"expected a whole number of at least {minimum}")
        return number

    return convert


def seconds(value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < float("inf"):
        raise ValueError("expected a number of seconds above 0")
    return number


def hosts(value: Any) -> tuple[str, ...]:
    parts: Iterable[Any] = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple | set | frozenset) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected a list of host:port, or one text with commas")
    found = tuple(part.strip() for part in parts if part.strip())
    if any("@" in host for host in found):
        raise ValueError("a host has no user and password in it: give sasl_plain_username and sasl_plain_password")
    for host in found:
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/]+)(:\d{1,5})?", host):
            raise ValueError(f"{host!r} is not host:port")
    if not found:
        raise ValueError("expected at least one host:port")
    return found


def redis(value: Any) -> str | dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    try:
        url = urlsplit(value if isinstance(value, str) else "")
        known = url.scheme in ("redis", "rediss", "unix") and (url.port is None or url.port > 0)
    except ValueError:  # its text may hold a part of the password
        known = False
    if not known:
        raise ValueError("expected redis://host:port/db, rediss://..., unix://... or a dict of redis-py options")
    return str(value)


def retry(value: Any) -> Retry:
    if isinstance(value, Retry):
        return value
    return Retry(attempts=whole(1)(value))


def one_of(*choices: str) -> Convert:
    def convert(value: Any) -> str:
        chosen = value.strip().lower() if isinstance(value, str) else value
        if chosen not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return str(chosen)

    return convert


def environment(value: Any) -> str:
    name = text(value).lower()
    name = {"prod": "production", "dev": "development"}.get(name, name)
    if near := difflib.get_close_matches(name, {"development", "test", "production"} - {name}, n=1, cutoff=0.75):
        raise ValueError(f"did you mean {near[0]}?")
    return name


def anything(value: Any) -> Any:
    return value


def having(*names: str) -> Convert:
    def convert(value: Any) -> Any:
        missing = [name for name in names if not callable(getattr(value, name, None))]
        if missing:
            raise ValueError(f"expected an object with {' and '.join(f'{name}()' for name in missing)}")
        return value

    return convert


def topic_or_none(value: Any) -> str | None:
    if value is None or value == "":
        return None
    mistake = name_mistake("topic", value)
    if mistake:
        raise ValueError(mistake)
    return str(value)


def address(value: Any) -> str | None:
    """``host:port``, or a port alone, which is ``:port``: of all interfaces."""
    given = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else "?"
    if not given:
        return None
    host, _, port = given.rpartition(":")
    if not port.isdigit() or int(port) > 65535 or not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]*)", host):
        raise ValueError("expected a port, or host:port")
    return f"{host}:{int(port)}"


def option(convert: Convert, default: Any = None, *, help: str, env: bool = True) -> Any:
    return field(
        default=default,
        metadata={"convert": convert, "help": help, "env": env},
        kw_only=True,
    )


def section(kind: type) -> Any:
    return field(default_factory=kind, metadata={"section": kind}, kw_only=True)


@dataclass(frozen=True, slots=True)
class Ssl:
    """``kafka.ssl``: files of certificates in PEM format; naming one of them turns TLS on."""

    ca_cert: str | None = option(text, help="file of the authority's certificate")
    client_cert: str | None = option(text, help="file of the client's certificate")
    client_cert_key: str | None = option(text, help="file of the client certificate's private key")
    client_cert_key_password: str | None = option(secret, help="password of that key, if it is encrypted")


@dataclass(frozen=True, slots=True)
class Kafka:
    """``kafka``: where the brokers are, and how the groups behave. Other client options pass through in ``options``."""

    hosts: tuple[str, ...] = option(hosts, (), help="brokers to start from, as host:port; one is enough")
    session_timeout: float = option(seconds, 30.0, help="seconds without a heartbeat until a consumer is out")
    heartbeat_interval: float = option(seconds, 3.0, help="seconds between heartbeats")
    offset_commit_interval: float = option(seconds, 0.2, help="seconds between offset commits")
    offset_commit_threshold: int = option(whole(0), 0, help="messages between offset commits; 0: by time only")
    max_poll_interval: float = option(seconds, 300.0, help="seconds a consumer may go without polling")
    max_poll_records: int | None = option(
        whole(1), help="messages taken from the client at a time; 500 if not given, 5,000 by groups that only queue"
    )
    security_protocol: str | None = option(text, help="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL")
    sasl_mechanism: str | None = option(text, help="how to log in: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, ...")
    sasl_plain_username: str | None = option(text, help="user to log in as, with PLAIN and SCRAM")
    sasl_plain_password: str | None = option(secret, help="password of that user")
    partitions: int | None = option(whole(1), help="of topics that are made; the brokers' default if not given")
    replication_factor: int | None = option(
        whole(1), help="of topics that are made; the brokers' default if not given"
    )
    ssl: Ssl = section(Ssl)
    options: Mapping[str, Any] = field(default_factory=dict, metadata={"rest": True}, kw_only=True)

    def __repr__(self) -> str:
        return _shown(self)


@dataclass(frozen=True, slots=True)
class ConnectionPool:
    """``connection_pool``: the producers of one process."""

    size: int = option(whole(1), 1, help="Kafka producers a process may open; its threads share them")
    timeout: float = option(seconds, 5.0, help="seconds a send waits for the broker's metadata")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything an application can be told. Made by ``Settings.load``; nothing in it changes afterwards."""

    name: str = option(text, "", help="name of the application; client id, and start of the default group names")
    env: str = option(environment, "development", help="development, test, production, or a name of your own")
    redis: str | dict[str, Any] | None = option(redis, help="URL or redis-py options; needed by queued routes")
    inline: bool = option(flag, False, help="run handlers in the consumer instead of queueing to RQ")
    monitor: Any = option(having("notice", "notice_error"), help="object told of every event", env=False)
    logger: Any = option(
        having("debug", "info", "warning", "error"), help="logger used by the default monitor", env=False
    )
    log_level: str | None = option(
        one_of(*LOG_LEVELS), help="least level of the log lines; info if not given, warning in the environment test"
    )
    log_format: str = option(one_of("text", "json"), "text", help="text for people, json for programs")
    retry: Retry = option(retry, Retry(), help="how failed messages are tried again")
    dead_letter: str | None = option(topic_or_none, help="topic for messages that failed every attempt")
    queue: str = option(text, "default", help="RQ queue of routes that name none")
    job_size: int = option(whole(1), 5000, help="most messages packed into one RQ job")
    job_seconds: float = option(seconds, 0.1, help="seconds of work that are to be in one RQ job")
    max_backlog: int = option(
        whole(1), 100_000, help="messages in a queue above which its topics wait, until it is half as many"
    )
    redis_durability: str = option(
        one_of("memory", "wait"), "memory", help="wait: commit only what is on Redis' disk or on a replica"
    )
    job_timeout: float = option(seconds, 180.0, help="seconds one message may take in a worker")
    shutdown_timeout: float = option(seconds, 30.0, help="seconds a clean stop may take")
    health: str | None = option(address, help="port, or host:port, where /healthz and /readyz are answered")
    kafka: Kafka = section(Kafka)
    connection_pool: ConnectionPool = section(ConnectionPool)

    @classmethod
    def load(
        cls,
        given: Mapping[str, Any],
        environ: Mapping[str, str],
        *,
        needs_redis: bool | Callable[[Settings], bool] = False,
        needs_kafka: bool = True,
        check: Callable[[Settings], list[str]] | None = None,
    ) -> Settings:
        """The settings from keywords and environment.

        Raises ``SettingsError`` that lists every mistake at once: unknown names, wrong values, missing ones, and those that
        ``check`` finds.
        """
        mistakes: list[str] = []
        settings: Settings = _load(cls, given, environ, "", mistakes)
        if not settings.name and not any(mistake.startswith("name:") for mistake in mistakes):
            mistakes.append("name: is required, as in Flowkit('shop') or FLOWKIT_NAME=shop")
        elif settings.name and (mistake := name_mistake("group", settings.name)):
            mistakes.append(f"name: {mistake}")
        if needs_kafka and not settings.kafka.hosts and not any(m.startswith("kafka.hosts") for m in mistakes):
            near = difflib.get_close_matches("hosts", settings.kafka.options, n=1)
            mistakes.append(
                "kafka.hosts: is required, as in kafka={'hosts': '127.0.0.1:9092'} or FLOWKIT_KAFKA_HOSTS"
                + (f"; did you mean it with {near[0]!r}?" if near else "")
            )
        if callable(needs_redis):
            needs_redis = needs_redis(settings)
        if needs_redis and not settings.redis and not any(m.startswith("redis:") for m in mistakes):
            mistakes.append(
                "redis: is required by queued routes, as in redis='redis://127.0.0.1:6379/0' or FLOWKIT_REDIS;"
                " routes with inline=True need none"
            )
        kafka = settings.kafka
        if kafka.heartbeat_interval * 2 > kafka.session_timeout:
            mistakes.append(
                f"kafka.heartbeat_interval: {kafka.heartbeat_interval:g} s must be at most half of"
                f" kafka.session_timeout ({kafka.session_timeout:g} s)"
            )
        if check is not None:
            mistakes += check(settings)
        if mistakes:
            raise SettingsError(mistakes)
        return settings

    def __repr__(self) -> str:
        return _shown(self)

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of every setting, secrets masked, for people to read."""
        return list(_rows(self, ""))


def _load(kind: type, given: Any, environ: Mapping[str, str], path: str, mistakes: list[str]) -> Any:
    if not isinstance(given, Mapping):
        mistakes.append(f"{path[:-1]}: expected a dict, got {type(given).__name__}")
        given = {}
    known = {f.name: f for f in fields(kind) if "rest" not in f.metadata}
    rest = {name: value for name, value in given.items() if name not in known}
    values: dict[str, Any] = {}
    for name, f in known.items():
        where = f"{path}{name}"
        variable = "FLOWKIT_" + where.upper().replace(".", "_")
        if "section" in f.metadata:
            inner = {} if given.get(name) is None else given[name]
            values[name] = _load(f.metadata["section"], inner, environ, f"{where}.", mistakes)
            continue
        source, value = (
            (variable, environ[variable])
            if f.metadata["env"] and variable in environ
            else (where, given[name])
            if given.get(name) is not None
            else (where, MISSING)
        )
        if value is MISSING:
            continue
        try:
            values[name] = f.metadata["convert"](value)
        except ValueError as error:
            shown = f", got {value!r}" if name != "redis" and isinstance(value, str | int | float) else ""
            shown = "" if SECRET.search(name) else shown
            mistake = IN_QUERY.sub(r"\1***", f"{error}{shown}")  # a URL may hold a password
            mistake = re.sub(r"(?s)(['\"]).*@", r"\1***@", mistake)
            mistakes.append(f"{where}: {mistake}" + (f" (from {source})" if source == variable else ""))
    if any("rest" in f.metadata for f in fields(kind)):
        if rest.pop("options", None) is not None:
            mistakes.append(f"{path}options: write them directly into {path[:-1]}={{...}}, beside the settings")
        values["options"] = rest
    else:
        mistakes.extend(unknown_name(f"{path}{name}", name, known, "setting") for name in rest)
    return kind(**values)


def unknown_name(where: str, name: str, known: Iterable[str], noun: str) -> str:
    """One sentence for a name nobody knows, with the nearest one that somebody does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
    return f"{where}: there is no such {noun}; {hint}"


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One sentence for each environment variable that looks like a misspelt setting. Others may have names like ours."""
    known = set(_variables(Settings, "FLOWKIT_")) | {"FLOWKIT_APP"}
    sentences = []
    for name in sorted(environ):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.88)
        if name.startswith("FLOWKIT_") and name not in known and near:
            sentences.append(f"the environment variable {name} is no setting; did you mean {near[0]}?")
    return sentences


def _variables(kind: type, prefix: str) -> Iterable[str]:
    for f in fields(kind):
        name = prefix + f.name.upper()
        if "section" in f.metadata:
            yield from _variables(f.metadata["section"], f"{name}_")
        elif f.metadata.get("env"):
            yield name


SECRET = re.compile(r"password|passwd|secret|token|sasl.jaas|credential|\bpem$", re.IGNORECASE)
IN_QUERY = re.compile(r"([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", re.IGNORECASE)
BEFORE_HOST = re.compile(r"://.*@", re.DOTALL)


def masked(name: str, value: Any) -> str:
    """``value`` as text, without the secrets in it: who logs in by a URL, and what is named like a password."""
    if SECRET.search(name) and value is not None:
        return "***"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={masked(str(key), item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(masked(name, item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return BEFORE_HOST.sub("://***@", IN_QUERY.sub(r"\1***", text)) if "://" in text else text


def _shown(settings: Any) -> str:
    """The repr of settings, in which passwords are masked too."""
    return f"{type(settings).__name__}({', '.join(f'{name}={value}' for name, value in _rows(settings, ''))})"


def _rows(settings: Any, path: str) -> Iterable[tuple[str, str]]:
    for f in fields(settings):
        value = getattr(settings, f.name)
        if "rest" in f.metadata:
            yield from ((f"{path}{name}", masked(name, item)) for name, item in value.items())
        elif is_dataclass(value) and not isinstance(value, Retry):
            yield from _rows(value, f"{path}{f.name}.")
        elif value is not None:
            yield f"{path}{f.name}", masked(f.name, value)


def logger_of(settings: Settings) -> logging.Logger:
    """The logger of the application: the one given, or ``flowkit``."""
    logger: logging.Logger = settings.logger or logging.getLogger("flowkit")
    return logger
