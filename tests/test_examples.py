"""The examples, tested with flowkit's fixtures the way their author would. examples/quakes.py has a file of its own."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet
import pytest

from flowkit import Flowkit, ParserError, PayloadError
from flowkit.clients.memory import Broker
from flowkit.consumer import Consumer
from flowkit.producer import Producer
from flowkit.testing import Client

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("mini", "shop", "configured", "observed", "patient", "ledger", "lake")


ORDER = {"id": 7, "user": "ann", "total": 20.0}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example, and forgets it afterwards: other tests have modules of these names too."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


class TestMini:
    @pytest.fixture
    def flowkit_app(self, load: Callable[[str], Any]) -> Flowkit:
        return load("mini").app

    def test_a_greeting_comes_back_louder(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("greetings", "hello", key="ann")
        assert call.sent("shouts").value == "HELLO!"
        assert call.queue is None  # it ran in the consumer

    def test_a_greeting_that_is_no_text_is_refused(self, flowkit_client: Client) -> None:
        with pytest.raises(PayloadError, match="payload: Input should be a valid string"):
            flowkit_client.send("greetings", 42)

    def test_a_greeting_as_another_program_would_write_it(self, flowkit_client: Client) -> None:
        assert flowkit_client.send_raw("greetings", b'"hi"').sent("shouts").raw == b"HI!"
        with pytest.raises(ParserError, match="Invalid JSON"):
            flowkit_client.send_raw("greetings", b"hi")


class TestPatient:
    @pytest.fixture
    def flowkit_app(self, load: Callable[[str], Any]) -> Flowkit:
        return load("patient").app

    def test_what_will_never_be_known_is_not_tried_again(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("payments", {"invoice": 1001}, raise_errors=False)
        assert call.attempts == 1
        assert call.dead_letter is not None
        assert call.dead_letter.topic == "payments.dead"

    def test_each_route_has_an_end_of_its_own(self, flowkit_client: Client) -> None:
        ends = {topic: handling.on_poison for topic, handling in flowkit_client.app.handlings.items()}
        assert ends == {"payments": "dead_letter", "mails": "dead_letter", "clicks": "skip", "postings": "stop"}
        waiting = {topic: len(handling.retry_topics) for topic, handling in flowkit_client.app.handlings.items()}
        assert waiting == {"payments": 0, "mails": 3, "clicks": 0, "postings": 0}
        call = flowkit_client.send_raw("clicks", b"{", raise_errors=False)
        assert (call.skipped, call.attempts) == (True, 1)


class TestLedger:
    @pytest.fixture
    def flowkit_app(self, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Flowkit:
        monkeypatch.setenv("LEDGER", ":memory:")
        return load("ledger").app

    def test_payments_are_stored_together_and_each_once(self, flowkit_client: Client) -> None:
        database = sys.modules["ledger"].database
        payments = [{"id": number, "cents": 100 * number} for number in (1, 2, 3, 2)]
        assert len(flowkit_client.send_batch("payments", payments)) == 1
        assert database.execute("SELECT id, cents FROM payments").fetchall() == [(1, 100), (2, 200), (3, 300)]
        flowkit_client.send_batch("refunds", payments[:2])
        assert database.execute("SELECT id FROM payments").fetchall() == [(3,)]

    def test_a_payment_that_the_database_refuses_takes_no_other_with_it(self, flowkit_client: Client) -> None:
        database = sys.modules["ledger"].database
        database.execute(
            "CREATE TRIGGER no_three BEFORE INSERT ON payments WHEN new.id = 3 BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
        payments = [{"id": number, "cents": 1} for number in (1, 2, 3, 4)]
        (call,) = flowkit_client.send_batch("payments", payments, raise_errors=False)
        assert "no" in str(call.error)
        assert database.execute("SELECT id FROM payments").fetchall() == [(1,), (2,)]


class TestLake:
    @pytest.fixture
    def flowkit_app(self, load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flowkit:
        monkeypatch.setenv("LAKE", str(tmp_path / "clicks"))
        return load("lake").app

    def test_a_batch_is_a_table(self, flowkit_client: Client, tmp_path: Path) -> None:
        clicks = [{"user": f"u{number}", "page": "/", "seconds": number / 2, "more": 1} for number in range(3)]
        assert len(flowkit_client.send_batch("clicks", clicks)) == 1
        (path,) = (tmp_path / "clicks").iterdir()
        assert path.name == "0-000000000000.parquet"
        table = pyarrow.parquet.read_table(path)
        assert table.column_names == ["user", "page", "seconds", "offset"]
        assert table["seconds"].to_pylist() == [0.0, 0.5, 1.0]
        assert table["offset"].to_pylist() == [0, 1, 2]

    def test_a_click_that_fits_no_column_takes_no_other_with_it(self, flowkit_client: Client, tmp_path: Path) -> None:
        clicks = [{"user": "ann", "seconds": 1}, {"user": "bob", "seconds": "long"}]
        (call,) = flowkit_client.send_batch("clicks", clicks, raise_errors=False)
        assert "long" in str(call.error)
        (path,) = (tmp_path / "clicks").iterdir()
        assert pyarrow.parquet.read_table(path).to_pylist() == [
            {"user": "ann", "page": None, "seconds": 1.0, "offset": 0}
        ]


class TestShop:
    @pytest.fixture
    def flowkit_app(self, load: Callable[[str], Any]) -> Flowkit:
        return load("shop").app

    def test_an_order_is_billed_in_a_worker(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("orders", ORDER)
        invoice = call.sent("invoices")
        assert (invoice.key, invoice.value) == ("ann", {"order": 7, "total": 20.0})
        assert call.queue == "default"
        assert len(call.responses) == 1

    def test_a_big_order_overtakes_and_raises_an_alert(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("orders", ORDER | {"total": 1000.5})
        assert call.queue == "express"
        alert = call.sent("alerts")
        assert (alert.key, alert.partition_key, alert.value) == (None, "a", {"order": 7, "why": "big"})

    def test_an_order_of_exactly_the_limit_is_not_big(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("orders", ORDER | {"total": 1000})
        assert (call.queue, call.all_sent("alerts")) == ("default", [])

    def test_an_order_of_nothing_is_done_at_once(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("orders", ORDER | {"total": 0})
        assert call.aborted
        assert call.queue is None
        assert call.responses == []

    def test_an_order_below_nothing_is_reported_and_put_aside(
        self, flowkit_client: Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "shop")
        call = flowkit_client.send("orders", ORDER | {"total": -1}, key="ann", raise_errors=False)
        assert str(call.error) == "order 7 has a total of -1.0"
        assert (call.attempts, call.responses) == (4, [])
        assert call.dead_letter is not None
        assert (call.dead_letter.topic, call.dead_letter.key) == ("orders.dead", "ann")
        assert call.dead_letter.value == ORDER | {"total": -1}
        assert [record.getMessage() for record in caplog.records if record.name == "shop"] == [
            f"order at offset 0 failed on attempt {attempt}: order 7 has a total of -1.0" for attempt in (1, 2, 3, 4)
        ]

    def test_an_order_without_a_user_is_refused(self, flowkit_client: Client) -> None:
        with pytest.raises(PayloadError, match="user: Field required"):
            flowkit_client.send("orders", {"id": 7, "total": 20})

    def test_an_invoice_becomes_a_parcel(self, flowkit_client: Client) -> None:
        parcel = flowkit_client.send("invoices", {"order": 7, "total": 20}).sent("parcels")
        assert (parcel.key, parcel.value["order"]) == ("7", 7)
        assert datetime.fromisoformat(parcel.value["at"]).tzinfo is not None

    def test_an_order_goes_all_the_way(self, flowkit_client: Client) -> None:
        call = flowkit_client.send("orders", ORDER, follow=True)
        assert call.sent("parcels").key == "7"
        assert [item.topic for item in call.responses] == ["invoices"]

    def test_many_orders(self, flowkit_client: Client) -> None:
        calls = flowkit_client.send_batch("orders", [ORDER | {"id": number} for number in range(5)])
        assert [call.sent("invoices").value["order"] for call in calls] == [0, 1, 2, 3, 4]


class TestConfigured:
    @pytest.fixture
    def module(self, load: Callable[[str], Any]) -> Any:
        return load("configured")

    @pytest.fixture
    def flowkit_app(self, module: Any) -> Flowkit:
        app: Flowkit = module.app
        return app

    def test_the_rate_is_that_of_development(self, flowkit_client: Client) -> None:
        assert flowkit_client.send("store.orders", {"total": 50}).sent("store.taxes").value == 5.0

    def test_the_rate_is_that_of_production(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLOWKIT_ENV", "production")
        with Client(module.app) as client:
            assert client.send("store.orders", {"total": 100}).sent("store.taxes").value == 19.0
            assert module.DATABASE == ["connected"]
        assert module.DATABASE == []

    def test_settings_are_as_written(self, flowkit_app: Flowkit) -> None:
        settings = flowkit_app.settings
        assert (settings.kafka.offset_commit_interval, settings.retry.attempts) == (1, 3)


class TestObserved:
    """On the consumer itself: the test client tells no monitor."""

    def test_events_are_counted_and_told(
        self, load: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        module = load("observed")
        app: Flowkit = module.app
        broker = Broker()
        broker.create("numbers")
        broker.create("numbers.dead")
        for value in (b"2", b"3", b"4"):
            broker.append("numbers", value)
        producer = Producer(lambda: app.settings, broker.producer)
        consumer = Consumer("g", app.handlings, app.settings, app.events, producer, broker.consumer)
        consumer.turn()
        consumer.turn()
        assert module.COUNTS == {"numbers": 3}
        assert app.monitor.last_dead == "numbers[0]@1"
        assert capsys.readouterr().out == "failed: numbers at offset 1\ndead: numbers at offset 1\n"
