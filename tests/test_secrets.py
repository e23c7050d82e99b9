"""Secrets stay where they are: no command prints one, whatever fails, and no repr, log line or error has one."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
import typer
from commands import NOBODY, flowkit
from cryptography.hazmat.primitives import serialization
from processes import APPS, program

from flowkit import Flowkit, FlowkitError, Settings, SettingsError
from flowkit.cli import cli
from flowkit.parsers.registry import Avro
from flowkit.settings import masked

SECRET = "s3cret-"
"""How every secret of these tests begins."""

WAIT = 60.0
"""Seconds that a command may take: several of them start at once."""

GO_ON = {"run": "trying again", "web": "is shown at", "worker": "does not answer"}
"""The commands that do not end by themselves, and what they say when they have done what they can."""

APP = "secretive:app"
LEFT_ALONE = {
    "help": (),
    "install": ("shop",),
    "stop": (),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    **LEFT_ALONE,
    "dev": (APP, "--broker-port", "0", "--redis-port", "0", "--seconds", "2"),
    "send": (APP, "orders", '{"id": 1}'),
    "run": (APP, "--log-level", "debug"),
    "worker": (APP, "--log-level", "debug"),
    "routes": (APP, "--json"),
    "flow": (APP, "--json"),
    "topics": (APP,),
    "lag": (APP, "--watch"),
    "info": (APP, "--json"),
    "console": (APP,),
    "web": (APP, "--port", "0", "--log-level", "debug"),
    "dead list": (APP,),
    "dead show": (APP, "orders.dead[0]@0"),
    "dead replay": (APP, "--all"),
    "dead drop": (APP, "--all"),
}
"""Every command, with debug lines where it has them."""

LOOK = "print(app, app.settings, app.settings.kafka, app.producer, app.routes)\n"


def names(group: Any, before: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from names(command, f"{before}{name} ")
        elif not command.hidden:
            yield before + name


def test_every_command_is_tried() -> None:
    assert set(names(typer.main.get_command(cli))) == COMMANDS.keys()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a certificate and its key, which is encrypted."""
    pair = trustme.CA().issue_cert("shop@example.com")
    loaded = serialization.load_pem_private_key(pair.private_key_pem.bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"s3cret-key")
    pem = loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    path = tmp_path_factory.mktemp("key") / "key.pem"
    path.write_bytes(pem + pair.cert_chain_pems[0].bytes())
    return path


def outputs(commands: Mapping[str, tuple[str, ...]], directory: Path, env: Mapping[str, str]) -> dict[str, str]:
    """What commands print that start at once, each until its end, or until it has said what is in ``GO_ON``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLOWKIT_")}
    given = {
        **inherited,
        "PYTHONPATH": str(APPS),
        "FLOWKIT_WEB_PASSWORD": "s3cret-web",
        "PYTHONUNBUFFERED": "1",
        **env,
    }
    running = {}
    for name, arguments in commands.items():
        folder = directory / name.replace(" ", "-")
        folder.mkdir()
        with (folder / "output").open("wb") as output:
            running[name] = subprocess.Popen(
                [program("flowkit"), *name.split(), *arguments],
                cwd=folder,
                env=given,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stdin = running[name].stdin
            assert stdin is not None
            stdin.write(LOOK.encode() if name == "console" else b"")
            stdin.close()
    files = {name: directory / name.replace(" ", "-") / "output" for name in commands}
    until = time.monotonic() + WAIT
    try:
        for name, process in running.items():
            while process.poll() is None and GO_ON.get(name, "\0") not in files[name].read_text():
                assert time.monotonic() < until, f"{name} goes on and on:\n{files[name].read_text()[-2000:]}"
                time.sleep(0.05)
        for name, process in running.items():
            if name in GO_ON:
                process.terminate()
            process.wait(40)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return {name: file.read_text() for name, file in files.items()}


def test_no_command_prints_a_secret(tmp_path: Path) -> None:
    found = outputs(COMMANDS, tmp_path, {})

    assert {name: text for name, text in found.items() if SECRET in text} == {}
    # and they did what they are for, as far as that goes where nobody answers
    assert "Attempting to connect" in found["run"]  # kafka-python's own debug lines
    assert f"no Kafka broker answers at {NOBODY}" in found["run"]
    assert "Redis does not answer" in found["worker"]
    assert '"redis": "Redis does not answer' in found["info"]
    assert "***" in found["info"]
    assert "is shown at" in found["web"]
    assert "kafka.sasl_plain_password=***" in found["console"]
    for name in ("send", "topics", "lag", "dead list"):
        assert "no Kafka broker answers" in found[name], name


@pytest.mark.parametrize("redis", ["dict", "query", "tls", "unix"])
def test_no_command_prints_a_secret_of_redis(tmp_path: Path, redis: str) -> None:
    chosen = {name: COMMANDS[name] for name in ("info", "worker", "lag", "routes")}

    found = outputs(chosen, tmp_path, {"SECRETIVE_REDIS": redis})

    assert {name: text for name, text in found.items() if SECRET in text} == {}
    assert '"redis": "Redis does not answer' in found["info"]


def test_no_command_prints_the_password_of_a_key(tmp_path: Path, key: Path) -> None:
    chosen = {name: COMMANDS[name] for name in ("info", "run", "send")}

    found = outputs(chosen, tmp_path, {"SECRETIVE_KEY": str(key)})
    wrong = outputs(
        {"topics": (APP,)},
        tmp_path,
        {"SECRETIVE_KEY": str(key), "FLOWKIT_KAFKA_SSL_CLIENT_CERT_KEY_PASSWORD": "s3cret-other"},
    )

    assert {name: text for name, text in {**found, **wrong}.items() if SECRET in text} == {}
    assert '"kafka.ssl.client_cert_key_password": "***"' in found["info"]
    assert f"no Kafka broker answers at {NOBODY}" in found["run"]
    assert "is not the password of" in wrong["topics"]


# The page.


def test_no_page_has_a_secret() -> None:
    from flowkit.web.pages import Access, make_pages

    app = Flowkit("shop", kafka={"hosts": NOBODY, **LOGIN}, redis=f"redis://ann:{SECRET}redis@{NOBODY}/0")
    app.topic("orders")(lambda order: None)
    browser = make_pages(app, Access(f"{SECRET}web")).test_client()

    for path in ("/", "/flow.svg", "/delete", "/delete?queue=default&job=x", "/nowhere"):
        answer = browser.get(path, auth=("flowkit", f"{SECRET}web"))
        assert answer.status_code in (200, 404, 503)
        assert SECRET not in answer.text + str(answer.headers), path
    assert "Redis is away" in browser.get("/", auth=("flowkit", f"{SECRET}web")).text
    assert SECRET not in browser.get("/", auth=("flowkit", f"{SECRET}wrong")).text


def test_a_wrong_login_at_the_page_is_logged_without_its_password(caplog: pytest.LogCaptureFixture) -> None:
    from flowkit.web.pages import Access, make_pages

    app = Flowkit("shop", kafka={"hosts": NOBODY})
    with caplog.at_level(logging.DEBUG):
        make_pages(app, Access("right")).test_client().get("/", auth=("ann", f"{SECRET}wrong"))

    assert "refused a login as 'ann'" in caplog.text
    assert SECRET not in caplog.text


# Settings.

LOGIN: dict[str, Any] = {
    "sasl_mechanism": "PLAIN",
    "sasl_plain_username": "ann",
    "sasl_plain_password": f"{SECRET}sasl",
    "ssl": {"client_cert": "a", "client_cert_key": "b", "client_cert_key_password": f"{SECRET}key"},
}


class TokenProvider:
    """One whose repr tells everything, as that of a dataclass does."""

    def __repr__(self) -> str:
        return f"TokenProvider({SECRET}token)"


OPTIONS: list[dict[str, Any]] = [
    {"ssl_password": f"{SECRET}key"},
    {"proxy_url": f"socks5://ann:{SECRET}proxy@127.0.0.1:1"},
    {"socks5_proxy": f"socks5://ann:{SECRET}proxy@127.0.0.1:1"},
    {"sasl_oauth_token_provider": TokenProvider()},
    {"sasl.jaas.config": f'PlainLoginModule required username="ann" password="{SECRET}jaas";'},
    {"sasl_jaas_config": f"{SECRET}jaas"},
    {"basic.auth.user.info": f"ann:{SECRET}registry"},
    {"basic_auth_user_info": f"ann:{SECRET}registry"},
    {"api_key": f"{SECRET}api"},
    {"sasl_plain_pasword": f"{SECRET}sasl"},
    {"schema.registry.url": f"http://ann:{SECRET}registry@127.0.0.1:1"},
    {"access_key": f"{SECRET}access", "private_key": f"{SECRET}private"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_no_option_of_the_client_shows_its_secret(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    app = Flowkit("shop", kafka={"hosts": NOBODY, **options}, redis=f"redis://:{SECRET}redis@{NOBODY}/0")
    app.topic("orders", inline=True)(lambda order: None)
    shown = ""
    with caplog.at_level(logging.DEBUG):
        settings = app.settings
        shown += f"{settings!r}{settings}{settings.kafka!r}{settings.rows()}{app!r}"
        try:
            app.settings_for_kafka()
            app.producer.send("orders", b"")
        except FlowkitError as error:
            shown += f"{error!r}{error}"

    assert SECRET not in shown + caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS", "http://ann:s3cret-redis@127.0.0.1:1"),
        ("REDIS", "s3cret-redis"),
        ("REDIS", "redis://ann:s3cret-redis@127.0.0.1:port"),
        ("KAFKA_HOSTS", "ann:s3cret-sasl@127.0.0.1:1"),
        ("KAFKA_HOSTS", "sasl://ann:s3cret-sasl@127.0.0.1:1"),
        ("KAFKA_SASL_PLAIN_PASSWORD", ""),
    ],
)
def test_a_wrong_setting_is_told_without_its_secret(name: str, value: str) -> None:
    given = {"name": "shop", "kafka": {"hosts": NOBODY}}
    with pytest.raises(SettingsError) as caught:
        Settings.load(given, {f"FLOWKIT_{name}": value}, needs_redis=True)

    assert SECRET not in str(caught.value)
    done = flowkit("info", "hello:app", env={f"FLOWKIT_{name}": value})
    assert SECRET not in done.out + done.err


def test_a_misspelt_variable_is_told_without_its_value() -> None:
    done = flowkit("routes", "hello:app", env={"FLOWKIT_KAFKA_SASL_PLAIN_PASWORD": f"{SECRET}sasl"})

    assert SECRET not in done.out + done.err


@pytest.mark.parametrize(
    "config",
    [
        {"url": f"http://ann:{SECRET}registry@127.0.0.1:1"},
        {"url": "http://127.0.0.1:1", "basic.auth.user.info": f"ann:{SECRET}registry"},
        {"url": "http://127.0.0.1:1", "bearer.auth.token": f"{SECRET}bearer", "bearer.auth.credentials.source": "?"},
        {"url": "http://127.0.0.1:1", "no.such.option": f"{SECRET}x"},
    ],
    ids=range(4),
)
def test_a_registry_shows_no_secret(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    shown = ""
    with caplog.at_level(logging.DEBUG):
        try:
            avro = Avro(config, topic="orders", schema='{"type": "string"}')
            shown += repr(avro)
            avro.generate("a")
        except FlowkitError as error:
            shown += f"{error!r}{error}{error.__cause__!r}"

    assert shown
    assert SECRET not in shown + caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kafka", {"nested": {"password": f"{SECRET}x"}}),
        ("retry", [{"token": f"{SECRET}x"}]),
        ("proxy_url", f"http://ann:{SECRET}@host"),
        ("hosts", (f"http://ann:{SECRET}@a", f"http://ann:{SECRET}@b")),
        ("url", f"redis://h/0?username=ann&password={SECRET}"),
        ("api_key", SECRET),
        ("api.key", SECRET),
        ("PRIVATE_KEY", SECRET),
        ("basic.auth.user.info", f"ann:{SECRET}"),
        ("passphrase", SECRET),
        ("authorization", f"Bearer {SECRET}"),
    ],
)
def test_a_mask_hides_what_is_named_or_written_like_a_secret(name: str, value: Any) -> None:
    assert SECRET not in masked(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ssl_keyfile", "certs/key.pem"),
        ("client_cert_key", "certs/key.pem"),
        ("partition_key", "user"),
        ("key", "ann"),
    ],
)
def test_a_mask_leaves_what_is_none(name: str, value: str) -> None:
    assert masked(name, value) == value
