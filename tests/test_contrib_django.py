"""flowkit.contrib.django: database connections in long-lived processes, on a real PostgreSQL, and the management command."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from asgiref.sync import sync_to_async
from commands import Done, python
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from postgres import Postgres

from flowkit import ConfigurationError, Flowkit, Message
from flowkit.contrib.django import DjangoFlowkit, fresh_connections, setup
from flowkit.testing import Client

SHOP = Path(__file__).parents[1] / "examples" / "django_shop"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as server:
        yield server


@pytest.fixture(scope="module")
def _django(postgres: Postgres) -> None:
    """Django in this process, with connections that are kept for good."""
    server = postgres.settings
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": server["host"],
        "PORT": server["port"],
        "USER": server["user"],
        "NAME": server["dbname"],
        "CONN_MAX_AGE": None,
    }
    settings.configure(INSTALLED_APPS=["flowkit.contrib.django"], DATABASES={"default": database}, USE_TZ=True)
    django.setup()


@pytest.fixture
def database(_django: None) -> Iterator[Any]:
    """The connection of this thread; what is opened in a test is closed at its end."""
    yield connection
    connection.close()


@pytest.fixture(params=[True, False], ids=["checked", "unchecked"])
def checked(request: pytest.FixtureRequest, database: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether CONN_HEALTH_CHECKS is set."""
    monkeypatch.setitem(database.settings_dict, "CONN_HEALTH_CHECKS", request.param)
    return bool(request.param)


def backend() -> int:
    """The process of PostgreSQL that serves this thread's connection."""
    with connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return int(cursor.fetchone()[0])


def make(kind: type[Flowkit] = DjangoFlowkit, **settings: Any) -> Flowkit:
    return kind("shop", **{"inline": True, "retry": 3, **settings})


# Connections.


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "in a job"])
def test_a_broken_connection_costs_one_attempt_at_most(inline: bool, checked: bool, postgres: Postgres) -> None:
    app = make(inline=inline, redis="redis://127.0.0.1:1/0")
    seen = []

    @app.topic("orders")
    def handle(order: Any) -> None:
        seen.append(backend())

    client = Client(app)
    client.send("orders", 1)
    client.send("orders", 2)
    assert seen[0] == seen[1]  # the connection is kept
    assert postgres.break_connections() == 1
    call = client.send("orders", 3, raise_errors=False)
    assert (call.error, call.attempts) == (None, 1 if checked else 2)
    assert seen[2] != seen[1]


def test_without_it_a_broken_connection_fails_for_good(database: Any, postgres: Postgres) -> None:
    app = make(Flowkit)
    app.add_topic("orders", lambda order: backend() and None)
    client = Client(app)
    client.send("orders", 1)
    postgres.break_connections()
    for _ in range(2):
        call = client.send("orders", 2, raise_errors=False)
        assert call.attempts == 3
        assert type(call.error).__name__ in ("OperationalError", "InterfaceError")


def test_a_plain_application_may_wrap_single_handlers(database: Any, postgres: Postgres) -> None:
    app = make(Flowkit)
    app.topic("orders")(app.responds_to("invoices")(fresh_connections(lambda order: backend())))
    client = Client(app)
    first = client.send("orders", 1).sent("invoices").value
    postgres.break_connections()
    assert client.send("orders", 2, raise_errors=False).sent("invoices").value != first


@pytest.mark.parametrize("age", [0, None])
def test_a_connection_is_closed_when_it_is_too_old(age: int | None, database: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(database.settings_dict, "CONN_MAX_AGE", age)
    app = make()
    app.add_topic("orders", lambda order: backend() and None)
    Client(app).send("orders", 1)
    assert (database.connection is None) == (age == 0)


@pytest.mark.parametrize("named", [True, False], ids=["for a topic", "for all"])
def test_hooks_have_fresh_connections_too(named: bool, checked: bool, postgres: Postgres) -> None:
    app = make()
    app.add_topic("orders", len)
    seen = []

    @app.before_enqueue("orders") if named else app.before_enqueue
    def hook(order: Any, message: Message) -> None:
        seen.append((message.topic, backend()))
        app.abort()  # so that no handler does it in its place

    client = Client(app)
    client.send("orders", 1)
    postgres.break_connections()
    call = client.send("orders", 2, raise_errors=False)
    assert (call.aborted, call.attempts) == (True, 1 if checked else 2)
    assert len(set(seen)) == 2
    assert hook.__name__ == "hook"


@pytest.mark.parametrize("named", [True, False], ids=["for a topic", "for all"])
def test_what_a_hook_opens_after_a_failure_is_closed(named: bool, database: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(database.settings_dict, "CONN_MAX_AGE", 0)
    app = make(retry=1)
    seen = []

    @app.topic("orders")
    def handle(order: Any) -> None:
        raise ValueError("no order")

    @app.after_failure("orders") if named else app.after_failure
    def hook(error: Exception, message: Message) -> None:
        seen.append((str(error), message.attempt, backend() > 0))

    Client(app).send("orders", 1, raise_errors=False)
    assert seen == [("no order", 1, True)]
    assert database.connection is None


def test_the_connections_of_coroutines_are_fresh(checked: bool, postgres: Postgres) -> None:
    app = make()
    seen = []

    @app.topic("orders")
    async def handle(order: Any) -> None:
        await asyncio.sleep(0)
        seen.append(await sync_to_async(backend)())

    @app.on_shutdown
    async def close() -> None:
        await sync_to_async(lambda: connection.close())()

    client = Client(app)
    client.send("orders", 1)
    assert postgres.break_connections() == 1
    assert client.send("orders", 2, raise_errors=False).attempts == (1 if checked else 2)
    assert len(set(seen)) == 2
    app.start(connected=False)
    app.stop()


def test_a_transaction_of_a_test_is_left_alone(database: Any) -> None:
    app = make()
    seen = []
    app.add_topic("orders", lambda order: seen.append(backend()))
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("create temporary table kept (n int) on commit drop")
        Client(app).send("orders", 1)
        assert seen == [backend()]
        with connection.cursor() as cursor:
            cursor.execute("select count(*) from kept")
            assert cursor.fetchone() == (0,)


# What is wrapped behaves as it did.


def test_a_handler_is_still_itself(database: Any) -> None:
    app = make()

    @app.responds_to("invoices")
    @app.topic("orders")
    def bill(order: int, message: Message) -> int:
        return order + message.offset

    assert bill(1, type("At", (), {"offset": 2})()) == 3  # type: ignore[arg-type]  # not the wrapper
    assert app.routes["orders"].name.endswith("bill")
    assert f"{__file__}:{bill.__code__.co_firstlineno}" in app.routes["orders"].where
    assert Client(app).send("orders", 5).sent("invoices").value == 5
    with pytest.raises(ConfigurationError, match=r"'orders': a handler is a function, not 5"):
        make().add_topic("orders", 5)  # type: ignore[arg-type]


def test_an_object_may_be_a_handler(database: Any) -> None:
    class Bill:
        def __call__(self, order: int) -> None:
            self.order = order

    bill, app = Bill(), make()
    app.add_topic("orders", bill)
    Client(app).send("orders", 5)
    assert bill.order == 5
    assert app.routes["orders"].name == repr(bill)


# Setting up, and the command.


def test_setup_does_nothing_where_django_is_ready(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "no.such.module")
    setup("nor.this.one")
    assert os.environ["DJANGO_SETTINGS_MODULE"] == "no.such.module"


def test_without_django_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['django'] = None; import flowkit.contrib.django"
    done = python("-c", code)
    assert done.err.splitlines()[-1].endswith(
        "flowkit.contrib.django needs the package Django: pip install 'flowkit-kafka[django]'"
    )


def manage(*arguments: str, cwd: Path = SHOP, **env: str) -> Done:
    return python(str(SHOP / "manage.py"), "flowkit", *arguments, cwd=cwd, env=env)


def test_manage_py_passes_everything_on() -> None:
    done = manage("routes")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1].startswith("django-orders    pack     inline")
    usage = manage("run", "-h").out
    assert usage.startswith("Usage: manage.py flowkit run [OPTIONS] [APP]")
    assert manage("--version").out.startswith("flowkit ")
    assert manage("routes", "--settings", "website.settings", "--json").out.startswith("[\n")
    wrong = manage("rout")
    assert (wrong.code, wrong.out) == (2, "")
    assert "No such command 'rout'" in wrong.err


def test_an_application_that_is_named_wins_over_the_setting(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "import flowkit\napp = flowkit.Flowkit('o')\napp.add_topic('t', len, inline=True)"
    )
    for done in (manage("routes", "other", cwd=tmp_path), manage("routes", cwd=tmp_path, FLOWKIT_APP="other:app")):
        assert done.out.splitlines()[1].split()[:2] == ["t", "len"]


def test_call_command_raises_what_a_shell_would_get_as_a_code(
    database: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "FLOWKIT_APP", "no_such_module", raising=False)
    monkeypatch.setattr(sys, "argv", ["untouched"])
    monkeypatch.delenv("FLOWKIT_APP", raising=False)
    with pytest.raises(CommandError, match="flowkit routes ended with code 2") as raised:
        call_command("flowkit", "routes")
    assert raised.value.returncode == 2
    assert "there is no module 'no_such_module'" in capfd.readouterr().err
    call_command("flowkit", "routes", "-h")
    assert "Usage: manage.py flowkit routes" in capfd.readouterr().out
    assert sys.argv == ["untouched"]
    assert "FLOWKIT_APP" not in os.environ
    monkeypatch.setattr(settings, "FLOWKIT_APP", 5)
    with pytest.raises(CommandError, match=r"the setting FLOWKIT_APP is a text, 'module:attribute', not 5"):
        call_command("flowkit", "routes", stderr=io.StringIO())
