"""The settings of an application: keywords of ``Flowkit(...)``, environment variables, defaults, and their check.

The environment wins over keywords, so that one file runs everywhere: ``kafka={"hosts": ...}`` is ``FLOWKIT_KAFKA_HOSTS``,
``kafka={"ssl": {"ca_cert": ...}}`` is ``FLOWKIT_KAFKA_SSL_CA_CERT``. All times are in seconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

from .errors import SettingsError
from .frozen import Frozen
from .retry import Retry
from .route import ENDS, name_mistake, pattern_mistake

Convert = Callable[[Any], Any]

LOG_LEVELS = ("debug", "info", "warning", "error")
STRATEGIES = ("range", "roundrobin", "sticky", "cooperative-sticky")
ENVIRONMENTS = ("development", "test", "production")
IN_IPV6 = frozenset("0123456789abcdefABCDEF:.")


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


def whole(minimum: int, most: int | None = None) -> Convert:
    def convert(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
            raise ValueError(f"expected a whole number of at least {minimum}")
        if most is not None and number > most:
            raise ValueError(f"expected a whole number of at most {most}")
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
        name, _, port = host.rpartition(":")
        if not (is_host(host) or (is_host(name) and port.isdecimal() and len(port) <= 5)):
            raise ValueError(f"{host!r} is not host:port")
    if not found:
        raise ValueError("expected at least one host:port")
    return found


def is_host(value: str) -> bool:
    """Whether it may be a host: a name, an IPv4 address, or an IPv6 address in brackets."""
    if value.startswith("["):
        return value.endswith("]") and len(value) > 2 and IN_IPV6.issuperset(value[1:-1])
    return value.split() == [value] and set(value).isdisjoint(":/[]")


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


def instance(value: Any) -> str:
    mistake = name_mistake("process", value)
    if mistake:
        raise ValueError(mistake)
    return str(value)


def strategies(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts) or not parts:
        raise ValueError(f"expected one or more of {', '.join(STRATEGIES)}, as a list or with commas")
    return tuple(one_of(*STRATEGIES)(part) for part in parts)


def environment(value: Any) -> str:
    name = text(value).lower()
    name = {"prod": "production", "dev": "development"}.get(name, name)
    if name not in ENVIRONMENTS and (near := nearest(name, ENVIRONMENTS, cutoff=0.75)):
        raise ValueError(f"did you mean {near}?")
    return name


def having(*names: str) -> Convert:
    def convert(value: Any) -> Any:
        missing = [name for name in names if not callable(getattr(value, name, None))]
        if missing:
            raise ValueError(f"expected an object with {' and '.join(f'{name}()' for name in missing)}")
        return value

    return convert


def pattern(noun: str) -> Convert:
    """The name of such a topic, or nothing, which is None."""

    def convert(value: Any) -> str | None:
        if value == "":
            return None
        mistake = pattern_mistake(value, noun)
        if mistake:
            raise ValueError(mistake)
        return str(value)

    return convert


def address(value: Any) -> str | None:
    """``host:port``, or a port alone, which is ``:port``: of all interfaces."""
    given = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else "?"
    if not given:
        return None
    host, _, port = given.rpartition(":")
    if not port.isdecimal() or int(port) > 65535 or not (is_host(host) or not host):
        raise ValueError("expected a port, or host:port")
    return f"{host}:{int(port)}"


class Option:
    """What can be set: how a value becomes it, what it is if not given, what it is for, and if there is a variable for it."""

    def __init__(self, convert: Convert, default: Any, help: str, env: bool) -> None:
        self.convert = convert
        self.default = default
        self.help = help
        self.env = env


class Rest:
    """Where a section keeps what is given under names that it does not know."""

    default: Mapping[str, Any] = {}


def option(convert: Convert, default: Any = None, *, help: str, env: bool = True) -> Any:
    return Option(convert, default, help, env)


def rest() -> Any:
    return Rest()


class Section(Frozen):
    """Settings that belong together. The class says for each by ``option(...)`` what it is, and may hold other sections."""

    described: ClassVar[Mapping[str, Option | Rest | Section]]
    defaults: ClassVar[Mapping[str, Any]]

    def __init_subclass__(cls) -> None:
        cls.described = {name: it for name, it in vars(cls).items() if isinstance(it, Option | Rest | Section)}
        cls.defaults = {name: it if isinstance(it, Section) else it.default for name, it in cls.described.items()}

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in self.described:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}")
        super().__init__(**{**self.defaults, **values})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.rows())})"

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of every setting, secrets masked, for people to read."""
        return list(_rows(self, ""))


class Ssl(Section):
    """``kafka.ssl``: files of certificates in PEM format; naming one of them turns TLS on."""

    ca_cert: str | None = option(text, help="file of the authority's certificate")
    client_cert: str | None = option(text, help="file of the client's certificate")
    client_cert_key: str | None = option(text, help="file of the client certificate's private key")
    client_cert_key_password: str | None = option(secret, help="password of that key, if it is encrypted")


class Kafka(Section):
    """``kafka``: where the brokers are, and how the groups behave. Other client options pass through in ``options``."""

    hosts: tuple[str, ...] = option(hosts, (), help="brokers to start from, as host:port; one is enough")
    session_timeout: float = option(seconds, 30.0, help="seconds without a heartbeat until a consumer is out")
    heartbeat_interval: float = option(seconds, 3.0, help="seconds between heartbeats")
    offset_commit_interval: float = option(seconds, 0.2, help="seconds between offset commits")
    offset_commit_threshold: int = option(whole(0), 0, help="messages between offset commits; 0: by time only")
    max_poll_interval: float = option(seconds, 300.0, help="seconds a consumer may go without polling")
    transaction_timeout: float = option(
        seconds, 10.0, help="seconds until Kafka ends a transaction that a killed process has left open"
    )
    group_instance_id: str | None = option(
        instance, help="name of this process, if it is to keep its partitions over a restart; each needs its own"
    )
    partition_assignment_strategy: tuple[str, ...] = option(
        strategies,
        (),
        help="who gets which partition: range, roundrobin, sticky or cooperative-sticky, in this order",
    )
    max_poll_records: int | None = option(
        whole(1),
        help="messages taken from the client at a time; if not given 500 to 5,000, or 5,000 where the group queues",
    )
    security_protocol: str | None = option(text, help="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL")
    sasl_mechanism: str | None = option(text, help="how to log in: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, ...")
    sasl_plain_username: str | None = option(text, help="user to log in as, with PLAIN and SCRAM")
    sasl_plain_password: str | None = option(secret, help="password of that user")
    partitions: int | None = option(whole(1), help="of topics that are made; the brokers' default if not given")
    replication_factor: int | None = option(
        whole(1), help="of topics that are made; the brokers' default if not given"
    )
    ssl: Ssl = Ssl()
    options: Mapping[str, Any] = rest()


class ConnectionPool(Section):
    """``connection_pool``: the producers of one process."""

    size: int = option(whole(1), 1, help="Kafka producers a process may open; its threads share them")
    timeout: float = option(seconds, 5.0, help="seconds a send waits for the broker's metadata")


class Settings(Section):
    """Everything an application can be told. Made by ``Settings.load``; nothing in it changes afterwards."""

    name: str = option(text, "", help="name of the application; client id, and start of the default group names")
    env: str = option(environment, "development", help="development, test, production, or a name of your own")
    client: str = option(
        one_of("kafka-python", "confluent"),
        "kafka-python",
        help="what speaks to Kafka; confluent: the extra 'confluent'",
    )
    redis: str | dict[str, Any] | None = option(redis, help="URL or redis-py options; needed by queued routes")
    inline: bool = option(flag, False, help="run handlers in the consumer instead of queueing to RQ")
    transactional: bool = option(
        flag, False, help="send responses and commit their message in one Kafka transaction; inline routes only"
    )
    monitor: Any = option(having("notice", "notice_error"), help="object told of every event", env=False)
    logger: Any = option(
        having("debug", "info", "warning", "error"), help="logger used by the default monitor", env=False
    )
    log_level: str | None = option(
        one_of(*LOG_LEVELS), help="least level of the log lines; info if not given, warning in the environment test"
    )
    log_format: str = option(one_of("text", "json"), "text", help="text for people, json for programs")
    retry: Retry = option(retry, Retry(), help="how failed messages are tried again")
    retry_topic: str | None = option(
        pattern("retry"), help="topics where failed messages of inline routes wait, and their partitions go on"
    )
    dead_letter: str | None = option(pattern("dead-letter"), help="topic for messages that failed every attempt")
    dead_letter_limit: int | None = option(
        whole(1), help="dead letters of one route without a success in between, after which the process stops"
    )
    on_poison: str | None = option(
        one_of(*ENDS), help="what becomes of a message that failed every attempt: dead_letter, stop or skip"
    )
    queue: str = option(text, "default", help="RQ queue of routes that name none")
    job_size: int = option(whole(1), 5000, help="most messages packed into one RQ job")
    job_seconds: float = option(seconds, 0.1, help="seconds of work that are to be in one RQ job")
    max_backlog: int = option(
        whole(1), 100_000, help="messages in a queue above which its topics wait, until it is half as many"
    )
    max_message_bytes: int = option(
        whole(1, 64 * 1024 * 1024), 16 * 1024 * 1024, help="bytes of a message above which it is not put into a queue"
    )
    redis_durability: str = option(
        one_of("memory", "wait"), "memory", help="wait: commit only what is on Redis' disk or on a replica"
    )
    job_timeout: float = option(seconds, 180.0, help="seconds one message may take in a worker")
    shutdown_timeout: float = option(seconds, 30.0, help="seconds a clean stop may take")
    stuck_after: float = option(
        seconds, 300.0, help="seconds after which a loop that has not turned counts as stuck, and the process as dead"
    )
    health: str | None = option(address, help="port, or host:port, where /healthz and /readyz are answered")
    health_file: str | None = option(text, help="file that is written anew every few seconds while all is well")
    kafka: Kafka = Kafka()
    connection_pool: ConnectionPool = ConnectionPool()

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
            near = nearest("hosts", settings.kafka.options)
            mistakes.append(
                "kafka.hosts: is required, as in kafka={'hosts': '127.0.0.1:9092'} or FLOWKIT_KAFKA_HOSTS"
                + (f"; did you mean it with {near!r}?" if near else "")
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
        if kafka.transaction_timeout < 1:
            mistakes.append(f"kafka.transaction_timeout: {kafka.transaction_timeout:g} s is too short; at least 1 s")
        if settings.dead_letter and settings.on_poison in ("stop", "skip"):
            mistakes.append(
                f"on_poison: {settings.on_poison} and dead_letter={settings.dead_letter} say different things; remove one"
            )
        if check is not None:
            mistakes += check(settings)
        if mistakes:
            raise SettingsError(mistakes)
        return settings


def _load(kind: type[Section], given: Any, environ: Mapping[str, str], path: str, mistakes: list[str]) -> Any:
    if not isinstance(given, Mapping):
        mistakes.append(f"{path[:-1]}: expected a dict, got {type(given).__name__}")
        given = {}
    known = {name: it for name, it in kind.described.items() if not isinstance(it, Rest)}
    others = {name: value for name, value in given.items() if name not in known}
    values: dict[str, Any] = {}
    for name, it in known.items():
        where = f"{path}{name}"
        variable = "FLOWKIT_" + where.upper().replace(".", "_")
        if isinstance(it, Section):
            inner = {} if given.get(name) is None else given[name]
            values[name] = _load(type(it), inner, environ, f"{where}.", mistakes)
            continue
        source, value = where, given.get(name)
        if it.env and variable in environ:
            source, value = variable, environ[variable]
        if value is None:
            continue
        try:
            values[name] = it.convert(value)
        except ValueError as error:
            shown = f", got {value!r}" if name != "redis" and isinstance(value, str | int | float) else ""
            shown = "" if re.search(SECRET, name) else shown
            mistake = re.sub(IN_QUERY, r"\1***", f"{error}{shown}")  # a URL may hold a password
            mistake = re.sub(r"(?s)(['\"]).*@", r"\1***@", mistake)
            mistakes.append(f"{where}: {mistake}" + (f" (from {source})" if source == variable else ""))
    if "options" in kind.described:
        if others.pop("options", None) is not None:
            mistakes.append(f"{path}options: write them directly into {path[:-1]}={{...}}, beside the settings")
        values["options"] = others
    else:
        mistakes.extend(unknown_name(f"{path}{name}", name, known, "setting") for name in others)
    return kind(**values)


def unknown_name(where: str, name: str, known: Iterable[str], noun: str) -> str:
    """One sentence for a name nobody knows, with the nearest one that somebody does."""
    known = sorted(known)
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"known are: {', '.join(known)}"
    return f"{where}: there is no such {noun}; {hint}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that ``name`` may be a misspelling of: alike by ``cutoff`` at least, of 0 to 1."""
    import difflib  # here, because it takes longer than all the rest of this module, and hardly a process needs it

    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One sentence for each environment variable that looks like a misspelt setting. Others may have names like ours."""
    known = set(_variables(Settings, "FLOWKIT_")) | {"FLOWKIT_APP"}
    sentences = []
    for name in sorted(name for name in environ.keys() - known if name.startswith("FLOWKIT_")):
        if near := nearest(name, known, cutoff=0.88):
            sentences.append(f"the environment variable {name} is no setting; did you mean {near}?")
    return sentences


def _variables(kind: type[Section], prefix: str) -> Iterable[str]:
    for name, it in kind.described.items():
        if isinstance(it, Section):
            yield from _variables(type(it), f"{prefix}{name.upper()}_")
        elif isinstance(it, Option) and it.env:
            yield f"{prefix}{name.upper()}"


# Patterns, which ``re`` compiles when they are first used.
SECRET = r"(?i)pas+w|passphrase|secret|token|sasl.jaas|credential|authori[sz]ation|user.info|(api|access|private).?key|\bpem$"
IN_QUERY = r"(?i)([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*"
BEFORE_HOST = r"(?s)://.*@"


def masked(name: str, value: Any) -> str:
    """``value`` as text, without the secrets in it: who logs in by a URL, and what is named like a password."""
    if re.search(SECRET, name) and value is not None:
        return "***"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={masked(str(key), item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(masked(name, item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return re.sub(BEFORE_HOST, "://***@", re.sub(IN_QUERY, r"\1***", text)) if "://" in text else text


def _rows(settings: Section, path: str) -> Iterable[tuple[str, str]]:
    for name, it in settings.described.items():
        value = getattr(settings, name)
        if isinstance(it, Section):
            yield from _rows(value, f"{path}{name}.")
        elif isinstance(it, Rest):
            yield from ((f"{path}{key}", masked(key, item)) for key, item in value.items())
        elif value is not None:
            yield f"{path}{name}", masked(name, value)


def logger_of(settings: Settings) -> logging.Logger:
    """The logger of the application: the one given, or ``flowkit``."""
    logger: logging.Logger = settings.logger or logging.getLogger("flowkit")
    return logger
