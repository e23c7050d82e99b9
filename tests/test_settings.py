"""Keywords, environment, defaults, and mistakes that are told all at once."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from flowkit import Flowkit, Retry, Settings, SettingsError
from flowkit.settings import (
    ConnectionPool,
    Kafka,
    Option,
    Section,
    Ssl,
    logger_of,
    masked,
    unknown_name,
    unknown_variables,
)

HOSTS = {"hosts": "127.0.0.1:9092"}
SECRET = "hunter2"


class Monitor:
    def notice(self, event: str, **details: Any) -> None: ...

    def notice_error(self, event: str, error: BaseException, **details: Any) -> None: ...


def load(environ: Mapping[str, str] | None = None, **given: Any) -> Settings:
    return Settings.load({"name": "shop", "kafka": HOSTS, **given}, environ or {})


def mistakes(environ: Mapping[str, str] | None = None, **given: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(environ, **given)
    return caught.value.mistakes


def get(settings: Any, path: str) -> Any:
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


def nest(path: str, value: Any) -> dict[str, Any]:
    """``kafka.ssl.ca_cert`` as keywords, with the hosts that every application needs."""
    first, *rest = path.split(".")
    for name in reversed(rest):
        value = {name: value}
    return {first: {**HOSTS, **value} if first == "kafka" else value}


def every_option(kind: type[Section] = Settings, path: str = "") -> Iterator[tuple[str, bool]]:
    """Each setting there is, and whether the environment has a variable for it."""
    for name, described in kind.described.items():
        if isinstance(described, Section):
            yield from every_option(type(described), f"{path}{name}.")
        elif isinstance(described, Option):
            yield f"{path}{name}", described.env


# (path, value as a keyword, text of the environment variable, value in the settings)
OPTIONS: list[tuple[str, Any, str | None, Any]] = [
    ("name", "store", "store", "store"),
    ("redis", "redis://r:1/2", "redis://r:1/2", "redis://r:1/2"),
    ("env", "production", "production", "production"),
    ("inline", True, "true", True),
    ("transactional", True, "true", True),
    ("log_level", "debug", "DEBUG", "debug"),
    ("log_format", "json", "json", "json"),
    ("monitor", Monitor, None, Monitor),
    ("logger", logging.getLogger("shop"), None, logging.getLogger("shop")),
    ("retry", 9, "9", Retry(attempts=9)),
    ("retry_topic", "{topic}.retry", "{topic}.retry", "{topic}.retry"),
    ("dead_letter", "{topic}.dead", "{topic}.dead", "{topic}.dead"),
    ("dead_letter_limit", 20, "20", 20),
    ("on_poison", "skip", "skip", "skip"),
    ("queue", "shop", "shop", "shop"),
    ("job_size", 7, "7", 7),
    ("job_seconds", 0.5, "0.5", 0.5),
    ("max_backlog", 7, "7", 7),
    ("max_message_bytes", 7, "7", 7),
    ("client", "confluent", "Confluent", "confluent"),
    ("redis_durability", "wait", "WAIT", "wait"),
    ("job_timeout", 12.5, "12.5", 12.5),
    ("shutdown_timeout", 12, "12", 12.0),
    ("stuck_after", 60, "60", 60.0),
    ("health", 8080, "8080", ":8080"),
    ("health_file", "/tmp/health", "/tmp/health", "/tmp/health"),
    ("kafka.hosts", ["a:1", "b:2"], "a:1, b:2", ("a:1", "b:2")),
    ("kafka.session_timeout", 45, "45", 45.0),
    ("kafka.heartbeat_interval", 2, "2", 2.0),
    ("kafka.offset_commit_interval", 0.25, "0.25", 0.25),
    ("kafka.offset_commit_threshold", 1000, "1000", 1000),
    ("kafka.max_poll_interval", 60, "60", 60.0),
    ("kafka.transaction_timeout", 5, "5", 5.0),
    ("kafka.group_instance_id", "shop-1", "shop-1", "shop-1"),
    (
        "kafka.partition_assignment_strategy",
        ["cooperative-sticky", "range"],
        "Cooperative-Sticky, range",
        ("cooperative-sticky", "range"),
    ),
    ("kafka.max_poll_records", 50, "50", 50),
    ("kafka.partitions", 6, "6", 6),
    ("kafka.replication_factor", 3, "3", 3),
    ("kafka.ssl.ca_cert", "ca.pem", "ca.pem", "ca.pem"),
    ("kafka.ssl.client_cert", "cert.pem", "cert.pem", "cert.pem"),
    ("kafka.security_protocol", "SSL", "SSL", "SSL"),
    ("kafka.sasl_mechanism", "PLAIN", "PLAIN", "PLAIN"),
    ("kafka.sasl_plain_username", "ann", "ann", "ann"),
    ("kafka.sasl_plain_password", "x y ", "x y ", "x y "),
    ("kafka.ssl.client_cert_key", "key.pem", "key.pem", "key.pem"),
    ("kafka.ssl.client_cert_key_password", "x y ", "x y ", "x y "),
    ("connection_pool.size", 3, "3", 3),
    ("connection_pool.timeout", 2.5, "2.5", 2.5),
]
FROM_ENVIRONMENT = [option for option in OPTIONS if option[2] is not None]


def variable(path: str) -> str:
    return "FLOWKIT_" + path.upper().replace(".", "_")


def test_the_tables_here_name_every_setting() -> None:
    assert {(path, text is not None) for path, _, text, _ in OPTIONS} == set(every_option())


@pytest.mark.parametrize(("path", "given", "text", "expected"), OPTIONS, ids=[option[0] for option in OPTIONS])
def test_a_keyword_sets_it(path: str, given: Any, text: str | None, expected: Any) -> None:
    assert get(load(**nest(path, given)), path) == expected


@pytest.mark.parametrize(
    ("path", "given", "text", "expected"), FROM_ENVIRONMENT, ids=[option[0] for option in FROM_ENVIRONMENT]
)
def test_an_environment_variable_sets_it(path: str, given: Any, text: str, expected: Any) -> None:
    assert get(load({variable(path): text}), path) == expected


@pytest.mark.parametrize(
    ("path", "given", "text", "expected"), FROM_ENVIRONMENT, ids=[option[0] for option in FROM_ENVIRONMENT]
)
def test_the_environment_wins_over_the_keyword(path: str, given: Any, text: str, expected: Any) -> None:
    other = {
        "name": "x",
        "inline": False,
        "redis": "redis://other",
        "kafka.hosts": "other:1",
        "log_level": "error",
        "log_format": "text",
    }.get(path)
    if other is None:
        other = "other" if isinstance(expected, str) else 3

    assert get(load({variable(path): text}, **nest(path, other)), path) == expected


@pytest.mark.parametrize("path", [path for path, env in every_option() if not env])
def test_objects_do_not_come_from_the_environment(path: str) -> None:
    assert get(load({variable(path): "text"}), path) is None


def test_a_keyword_of_none_means_the_default() -> None:
    given = dict.fromkeys(Settings.described)
    settings = Settings.load({**given, "name": "shop"}, {}, needs_kafka=False)

    assert settings == Settings(name="shop")


def test_what_is_not_said_has_its_default() -> None:
    settings = load()

    assert settings.kafka == Kafka(hosts=("127.0.0.1:9092",))
    assert (settings.kafka.ssl, settings.connection_pool) == (Ssl(), ConnectionPool(size=1, timeout=5.0))
    assert (settings.redis, settings.inline, settings.dead_letter, settings.retry) == (None, False, None, Retry())
    assert (settings.job_size, settings.job_seconds, settings.max_backlog) == (5000, 0.1, 100_000)
    assert (settings.job_timeout, settings.shutdown_timeout) == (180.0, 30.0)


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError, match="cannot set 'name': a Settings does not change"):
        load().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a:9092", ("a:9092",)),
        ("a:1,b:2", ("a:1", "b:2")),
        (" a:1 , b:2 ,", ("a:1", "b:2")),
        (["a:1", "b"], ("a:1", "b")),
        (("a:1",), ("a:1",)),
        ("[::1]:9092", ("[::1]:9092",)),
        ("kafka-0.kafka.svc.cluster.local:9092", ("kafka-0.kafka.svc.cluster.local:9092",)),
    ],
    ids=repr,
)
def test_hosts_are_a_list_or_a_text_with_commas(given: Any, expected: tuple[str, ...]) -> None:
    assert load(kafka={"hosts": given}).kafka.hosts == expected


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes", "on", " On "])
def test_texts_that_mean_true(text: str) -> None:
    assert load({"FLOWKIT_INLINE": text}).inline is True


@pytest.mark.parametrize("text", ["0", "false", "No", "off", ""])
def test_texts_that_mean_false(text: str) -> None:
    assert load({"FLOWKIT_INLINE": text}, inline=True).inline is False


@pytest.mark.parametrize(
    ("name", "expected"), [("prod", "production"), ("DEV", "development"), ("staging", "staging"), ("test", "test")]
)
def test_environments_have_short_names_and_may_have_names_of_their_own(name: str, expected: str) -> None:
    assert load({"FLOWKIT_ENV": name}).env == expected


def test_a_misspelt_environment_is_refused() -> None:
    assert mistakes({"FLOWKIT_ENV": "prodution"}) == [
        "env: did you mean production?, got 'prodution' (from FLOWKIT_ENV)"
    ]


def test_an_empty_dead_letter_variable_switches_dead_letters_off() -> None:
    assert load({"FLOWKIT_DEAD_LETTER": ""}, dead_letter="dead").dead_letter is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:pw@r:6379/0",
        "rediss://r",
        "unix:///tmp/redis.sock?db=0",
        {"host": "r", "port": 1},
    ],
    ids=str,
)
def test_redis_is_a_url_or_options(url: Any) -> None:
    assert load(redis=url).redis == url


def test_other_client_options_pass_through() -> None:
    settings = load(kafka={**HOSTS, "sasl_kerberos_name": "x", "fetch_min_bytes": 1})

    assert settings.kafka.options == {"sasl_kerberos_name": "x", "fetch_min_bytes": 1}


# (path, wrong value as a keyword, or as the text of the variable if it is one, what is said)
WRONG: list[tuple[str, Any, str]] = [
    ("name", "", "expected a text that is not empty"),
    ("name", 7, "expected a text that is not empty"),
    ("name", "my shop", "'my shop' cannot be the name of a group: use 1 to 249"),
    ("redis", "localhost:6379", "expected redis://host:port/db"),
    ("redis", "http://r", "expected redis://host:port/db"),
    ("redis", "redis://r:port/0", "expected redis://host:port/db"),
    ("redis", 7, "expected redis://host:port/db"),
    ("env", " ", "expected a text that is not empty"),
    ("env", "prodution", "did you mean production?, got 'prodution'"),
    ("log_level", "loud", "expected one of debug, info, warning, error, got 'loud'"),
    ("log_format", "xml", "expected one of text, json, got 'xml'"),
    ("inline", "maybe", "expected true or false, got 'maybe'"),
    ("inline", 1, "expected true or false, got 1"),
    ("transactional", "maybe", "expected true or false, got 'maybe'"),
    ("monitor", print, "expected an object with notice() and notice_error()"),
    ("logger", "shop", "expected an object with debug() and info() and warning() and error()"),
    ("retry", 0, "expected a whole number of at least 1, got 0"),
    ("retry", "often", "expected a whole number of at least 1, got 'often'"),
    ("retry", {"attempts": 3}, "expected a whole number of at least 1"),
    ("retry_topic", "{name}", "in the name of a retry topic {topic} and {group} may stand, and no other braces"),
    ("dead_letter", "a b", "'a b' cannot be the name of a topic"),
    ("dead_letter", "{name}.dead", "{topic} and {group} may stand, and no other braces"),
    ("dead_letter_limit", 0, "expected a whole number of at least 1, got 0"),
    ("on_poison", "ignore", "expected one of dead_letter, stop, skip, got 'ignore'"),
    ("queue", " ", "expected a text that is not empty"),
    ("job_size", 0, "expected a whole number of at least 1, got 0"),
    ("job_seconds", 0, "expected a number of seconds above 0, got 0"),
    ("max_backlog", 0, "expected a whole number of at least 1, got 0"),
    ("max_message_bytes", 0, "expected a whole number of at least 1, got 0"),
    ("max_message_bytes", 2**26 + 1, "expected a whole number of at most 67108864, got 67108865"),
    ("client", "aiokafka", "expected one of kafka-python, confluent, got 'aiokafka'"),
    ("redis_durability", "disk", "expected one of memory, wait, got 'disk'"),
    ("job_size", 1.5, "expected a whole number of at least 1, got 1.5"),
    ("job_size", True, "expected a whole number of at least 1, got True"),
    ("job_size", "many", "expected a whole number of at least 1, got 'many'"),
    ("job_timeout", 0, "expected a number of seconds above 0, got 0"),
    ("job_timeout", "3 s", "expected a number of seconds above 0, got '3 s'"),
    ("job_timeout", "nan", "expected a number of seconds above 0, got 'nan'"),
    ("shutdown_timeout", -1, "expected a number of seconds above 0, got -1"),
    ("health", "here", "expected a port, or host:port, got 'here'"),
    ("health_file", "", "expected a text that is not empty, got ''"),
    ("stuck_after", 0, "expected a number of seconds above 0, got 0"),
    ("kafka.group_instance_id", "a b", "'a b' cannot be the name of a process: use 1 to 249 of the characters"),
    ("kafka.partition_assignment_strategy", "fair", "expected one of range, roundrobin, sticky, cooperative-sticky"),
    ("kafka.partition_assignment_strategy", [], "expected one or more of range, roundrobin"),
    ("shutdown_timeout", True, "expected a number of seconds above 0, got True"),
    ("shutdown_timeout", "inf", "expected a number of seconds above 0, got 'inf'"),
    ("kafka.hosts", "http://a:9092", "'http://a:9092' is not host:port"),
    ("kafka.hosts", ["a:1", "b c"], "'b c' is not host:port"),
    ("kafka.hosts", "a:port", "'a:port' is not host:port"),
    ("kafka.hosts", "", "expected at least one host:port"),
    ("kafka.hosts", [], "expected at least one host:port"),
    ("kafka.hosts", "ann:pw@a:9092", "give sasl_plain_username and sasl_plain_password"),
    ("kafka.hosts", 9092, "expected a list of host:port, or one text with commas"),
    ("kafka.session_timeout", 0, "expected a number of seconds above 0"),
    ("kafka.heartbeat_interval", "often", "expected a number of seconds above 0"),
    ("kafka.offset_commit_interval", -1, "expected a number of seconds above 0"),
    ("kafka.offset_commit_threshold", -1, "expected a whole number of at least 0"),
    ("kafka.max_poll_interval", [], "expected a number of seconds above 0"),
    ("kafka.transaction_timeout", 0, "expected a number of seconds above 0"),
    ("kafka.max_poll_records", 0, "expected a whole number of at least 1"),
    ("kafka.partitions", 0, "expected a whole number of at least 1"),
    ("kafka.replication_factor", -1, "expected a whole number of at least 1"),
    ("kafka.ssl.ca_cert", "", "expected a text that is not empty"),
    ("kafka.ssl.client_cert", 7, "expected a text that is not empty"),
    ("kafka.ssl.client_cert_key", " ", "expected a text that is not empty"),
    ("kafka.ssl.client_cert_key_password", "", "expected a text that is not empty"),
    ("kafka.security_protocol", " ", "expected a text that is not empty"),
    ("kafka.sasl_mechanism", 7, "expected a text that is not empty"),
    ("kafka.sasl_plain_username", "", "expected a text that is not empty"),
    ("kafka.sasl_plain_password", "", "expected a text that is not empty"),
    ("connection_pool.size", 0, "expected a whole number of at least 1"),
    ("connection_pool.timeout", 0, "expected a number of seconds above 0"),
]


def test_every_setting_is_checked() -> None:
    assert {path for path, _, _ in WRONG} == {path for path, _ in every_option()}


@pytest.mark.parametrize(("path", "value", "text"), WRONG, ids=str)
def test_a_wrong_keyword_is_named_with_what_was_expected(path: str, value: Any, text: str) -> None:
    [mistake] = mistakes(**nest(path, value))

    assert mistake.startswith(f"{path}: ")
    assert text in mistake


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [row for row in WRONG if isinstance(row[1], str) and row[0] not in ("logger", "monitor")],
    ids=str,
)
def test_a_wrong_variable_is_named_with_the_setting(path: str, value: str, text: str) -> None:
    [mistake] = mistakes({variable(path): value})

    assert mistake.startswith(f"{path}: ")
    assert text in mistake
    if "cannot be the name of a group" not in text:  # that one is checked when it is known whose name it is
        assert mistake.endswith(f"(from {variable(path)})")


@pytest.mark.parametrize("path", ["kafka", "kafka.ssl", "connection_pool"])
@pytest.mark.parametrize("value", ["a:9092", 7, ["a:9092"], [], 0], ids=repr)
def test_a_section_is_a_dict(path: str, value: Any) -> None:
    given: dict[str, Any] = {"kafka": value} if path == "kafka" else nest(path, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load({"name": "shop", **given}, {"FLOWKIT_KAFKA_HOSTS": "a:1"})

    assert caught.value.mistakes == [f"{path}: expected a dict, got {type(value).__name__}"]


def test_all_mistakes_are_listed_together() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(
            {"nme": "shop", "job_size": 0, "kafka": {"ssl": {"ca": 1}}, "connection_pool": 3},
            {"FLOWKIT_INLINE": "maybe"},
            needs_redis=True,
        )

    starts = [mistake.split(":")[0] for mistake in caught.value.mistakes]
    assert sorted(starts) == sorted(
        ["nme", "name", "job_size", "kafka.ssl.ca", "connection_pool", "inline", "kafka.hosts", "redis"]
    )
    assert str(caught.value).startswith("the settings have 8 mistakes:\n  - ")
    assert all(f"\n  - {mistake}" in str(caught.value) for mistake in caught.value.mistakes)


@pytest.mark.parametrize("queued", [True, False])
def test_an_application_that_starts_lists_all_mistakes_too(queued: bool) -> None:
    app = Flowkit(job_size=0)
    app.add_topic("orders", print, inline=not queued)

    with pytest.raises(SettingsError) as caught:
        app.start()

    starts = {mistake.split(":")[0] for mistake in caught.value.mistakes}
    assert starts == {"name", "job_size", "kafka.hosts", *(["redis"] if queued else [])}


@pytest.mark.parametrize(
    ("given", "needs", "missing"),
    [
        ({"kafka": HOSTS}, {}, "name: is required, as in Flowkit('shop') or FLOWKIT_NAME=shop"),
        ({"name": "shop"}, {}, "kafka.hosts: is required, as in kafka={'hosts': '127.0.0.1:9092'}"),
        (
            {"name": "shop", "kafka": HOSTS},
            {"needs_redis": True},
            "redis: is required by queued routes, as in redis=",
        ),
    ],
    ids=["name", "kafka.hosts", "redis"],
)
def test_what_is_missing_is_told_with_an_example(given: Any, needs: Any, missing: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(missing)) as caught:
        Settings.load(given, {}, **needs)
    assert len(caught.value.mistakes) == 1


def test_kafka_and_redis_are_asked_for_only_where_they_are_needed() -> None:
    Settings.load({"name": "shop"}, {}, needs_kafka=False)
    Settings.load({"name": "shop", "kafka": HOSTS}, {})


def test_heartbeats_come_at_least_twice_a_session() -> None:
    load(kafka={**HOSTS, "session_timeout": 6, "heartbeat_interval": 3})

    assert mistakes(kafka={**HOSTS, "session_timeout": 5, "heartbeat_interval": 3}) == [
        "kafka.heartbeat_interval: 3 s must be at most half of kafka.session_timeout (5 s)"
    ]


def test_options_of_the_client_stand_beside_the_settings() -> None:
    assert mistakes(kafka={**HOSTS, "options": {"sasl_mechanism": "PLAIN"}}) == [
        "kafka.options: write them directly into kafka={...}, beside the settings"
    ]


@pytest.mark.parametrize(
    ("given", "mistake"),
    [
        ({"reddis": 1}, "reddis: there is no such setting; did you mean 'redis'?"),
        ({"jobsize": 1}, "jobsize: there is no such setting; did you mean 'job_size'?"),
        (
            {"kafka": {**HOSTS, "ssl": {"cacert": "x"}}},
            "kafka.ssl.cacert: there is no such setting; did you mean 'ca_cert'?",
        ),
        ({"connection_pool": {"sise": 1}}, "connection_pool.sise: there is no such setting; did you mean 'size'?"),
        ({"connection_pool": {"xyz": 1}}, "connection_pool.xyz: there is no such setting; known are: size, timeout"),
    ],
    ids=str,
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(given: dict[str, Any], mistake: str) -> None:
    assert mistakes(**given) == [mistake]


def test_an_unknown_name_without_a_near_one_lists_them_all() -> None:
    assert unknown_name("x", "x", ["b", "a"], "thing") == "x: there is no such thing; known are: a, b"


# Secrets.

SECRETIVE: list[dict[str, Any]] = [
    {"redis": f"redis://:{SECRET}@r:6379/0"},
    {"redis": f"rediss://ann:{SECRET}@r:6379/0"},
    {"redis": f"redis://ann:p@{SECRET}@r:6379/0"},
    {"redis": f"redis://{SECRET}@r:6379/0"},
    {"redis": f"redis://p/{SECRET}/@@r:6379/0"},
    {"redis": f"redis://p?@{SECRET}@r:6379/0"},
    {"redis": f"unix:///tmp/redis.sock?db=0&password=p@{SECRET}"},
    {"redis": f"unix://ann@/tmp/redis.sock?db=0&password={SECRET}"},
    {"redis": f"redis://r:6379/0?ssl_password={SECRET}&db=0"},
    {"redis": {"host": "r", "password": SECRET}},
    {"redis": {"url": f"redis://:{SECRET}@r"}},
    {"redis": {"sentinel_kwargs": {"password": SECRET}}},
    {"redis": {"nodes": [{"url": f"redis://{SECRET}@r"}, ("r", {"password": SECRET})]}},
    {"redis": {"nodes": {f"redis://{SECRET}@r"}}},
    {"kafka": {**HOSTS, "proxy_url": f"http://{SECRET}@proxy:3128"}},
    {"kafka": {**HOSTS, "proxy_url": f"http://{SECRET}@proxy:3128".encode()}},
    {"kafka": {**HOSTS, "sasl_plain_password": SECRET}},
    {"kafka": {**HOSTS, "ssl_password": SECRET}},
    {"kafka": {**HOSTS, "ssl": {"client_cert_key_password": SECRET}}},
    {"kafka": {**HOSTS, "sasl.password": SECRET}},
    {"kafka": {**HOSTS, "sasl.jaas.config": f"password={SECRET}"}},
    {"kafka": {**HOSTS, "ssl.key.pem": SECRET}},
    {"kafka": {**HOSTS, "sasl_oauth_token_provider": SECRET}},
    {"kafka": {**HOSTS, "aws_credentials": [SECRET]}},
]


@pytest.mark.parametrize("given", SECRETIVE, ids=str)
def test_a_secret_is_kept_for_the_client_and_shown_to_nobody(given: dict[str, Any]) -> None:
    settings = load(**given)

    kept = [settings.redis, settings.kafka.options, settings.kafka.sasl_plain_password]
    assert SECRET in str([*kept, settings.kafka.ssl.client_cert_key_password])
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings)
    assert SECRET not in repr(settings.kafka)
    assert SECRET not in str(settings.rows())
    assert "***" in str(settings.rows())


@pytest.mark.parametrize("given", SECRETIVE, ids=str)
def test_a_secret_is_not_in_the_repr_of_an_application(given: dict[str, Any]) -> None:
    assert SECRET not in repr(Flowkit("shop", **given))


@pytest.mark.parametrize(
    "given",
    [
        {"redis": f"http://:{SECRET}@r"},
        {"redis": f"redis://:x#{SECRET}@r"},
        {"redis": f"redis://:x/{SECRET}@r"},
        {"redis": f"redis://[{SECRET}@r"},
        {"redis": SECRET},
        {"redis": [f"redis://:{SECRET}@r"]},
        {"kafka": {"hosts": f"kafka://ann:{SECRET}@a:9092"}},
        {"kafka": {"hosts": [f"ann:{SECRET}@a:9092"]}},
        {"kafka": {"hosts": f"ann:{SECRET},{SECRET}@a:9092"}},
        {"kafka": {"hosts": f"kafka://{SECRET} {SECRET}@a:9092"}},
        {"kafka": {"hosts": [{"password": SECRET}]}},
        {"kafka": f"kafka://ann:{SECRET}@a:9092"},
        {"dead_letter": f"redis://ann:{SECRET} '@r"},
        {"dead_letter": f"unix:///tmp/redis.sock?password={SECRET}"},
        {"job_size": [{"password": SECRET}]},
        {"job_size": f"redis://{SECRET} x@r"},
        {"kafka": {**HOSTS, "ssl": {"ca_cert": {"password": SECRET}}}},
        {"kafka": {**HOSTS, "ssl": {"client_cert_key_password": [SECRET]}}},
        {"kafka": {**HOSTS, "sasl_plain_password": SECRET.encode()}},
    ],
    ids=str,
)
def test_a_secret_is_not_in_an_error(given: dict[str, Any]) -> None:
    assert SECRET not in str(mistakes(**given))
    if "redis" in given and isinstance(given["redis"], str):
        assert SECRET not in str(mistakes({"FLOWKIT_REDIS": given["redis"]}))


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("redis", f"redis://:{SECRET}@r:6379/0", "redis://***@r:6379/0"),
        ("redis", f"redis://{SECRET}@host:6379/0", "redis://***@host:6379/0"),
        ("redis", f"redis://:p@/{SECRET}@host:6379/0", "redis://***@host:6379/0"),
        ("redis", f"redis://ann:{SECRET}@r", "redis://***@r"),
        ("redis", "redis://r:6379/0", "redis://r:6379/0"),
        ("redis", f"unix:///s?db=0&password={SECRET}&x=1", "unix:///s?db=0&password=***&x=1"),
        ("redis", {"host": "r", "password": SECRET}, "host=r, password=***"),
        ("sasl_plain_password", SECRET, "***"),
        ("PASSWORD", SECRET, "***"),
        ("password", None, "None"),
        ("hosts", ("a:1", "b:2"), "a:1, b:2"),
        ("job_timeout", 180.0, "180"),
        ("job_timeout", 0.25, "0.25"),
        ("inline", True, "True"),
    ],
)
def test_what_is_shown_of_a_value(name: str, value: Any, shown: str) -> None:
    assert masked(name, value) == shown


def test_rows_name_every_setting_that_has_a_value() -> None:
    rows = dict(load(redis="redis://r", kafka={**HOSTS, "fetch_min_bytes": 1}).rows())

    assert rows["name"] == "shop"
    assert rows["redis"] == "redis://r"
    assert rows["kafka.hosts"] == "127.0.0.1:9092"
    assert rows["kafka.session_timeout"] == "30"
    assert rows["kafka.fetch_min_bytes"] == "1"
    assert rows["connection_pool.size"] == "1"
    assert rows["retry"] == str(Retry())
    assert "kafka.ssl.ca_cert" not in rows
    assert "dead_letter" not in rows


def test_the_logger_is_the_one_given_or_that_of_flowkit() -> None:
    given = logging.getLogger("shop")

    assert logger_of(load(logger=given)) is given
    assert logger_of(load()) is logging.getLogger("flowkit")


def test_a_misspelt_variable_is_named_and_one_that_only_looks_like_ours_is_not() -> None:
    environ = {
        "FLOWKIT_KAFKA_SESION_TIMEOUT": "3",
        "FLOWKIT_KAFKA_SERVICE_HOST": "10.0.0.1",  # as Kubernetes makes them
        "FLOWKIT_KAFKA_HOSTS": "127.0.0.1:9092",
        "FLOWKIT_APP": "shop:app",
        "HOME": "/",
    }
    assert unknown_variables(environ) == [
        "the environment variable FLOWKIT_KAFKA_SESION_TIMEOUT is no setting; did you mean FLOWKIT_KAFKA_SESSION_TIMEOUT?"
    ]
