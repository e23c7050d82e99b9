"""The tests of shop.py, as its author would write them. Run them: pytest test_shop.py"""

# --8<-- [start:app]
import pytest
import responders
import sending
import shop

from flowkit import Flowkit, PayloadError
from flowkit.testing import Client


@pytest.fixture
def flowkit_app() -> Flowkit:
    return shop.app


# --8<-- [end:app]


# --8<-- [start:send]
def test_a_big_order_is_billed_first_and_raises_an_alert(flowkit_client: Client) -> None:
    call = flowkit_client.send("orders", {"id": 7, "user": "ann", "total": 2000.0}, key="ann")

    assert call.queue == "express"
    assert call.sent("invoices").value == {"order": 7, "total": 2000.0}
    assert call.sent("alerts").partition_key == "a"


def test_an_order_of_nothing_is_done_at_once(flowkit_client: Client) -> None:
    call = flowkit_client.send("orders", {"id": 7, "user": "ann", "total": 0})

    assert call.aborted
    assert call.responses == []


# --8<-- [end:send]


# --8<-- [start:errors]
def test_an_order_without_a_user_is_refused(flowkit_client: Client) -> None:
    with pytest.raises(PayloadError, match="user: Field required"):
        flowkit_client.send("orders", {"id": 7, "total": 20})


def test_an_order_that_cannot_be_billed_is_put_aside(flowkit_client: Client) -> None:
    call = flowkit_client.send("orders", {"id": 7, "user": "ann", "total": -1}, raise_errors=False)

    assert str(call.error) == "order 7 has a total of -1.0"
    assert call.attempts == 4
    assert call.dead_letter is not None
    assert call.dead_letter.topic == "orders.dead"


# --8<-- [end:errors]


# --8<-- [start:follow]
def test_an_order_goes_all_the_way(flowkit_client: Client) -> None:
    call = flowkit_client.send("orders", {"id": 7, "user": "ann", "total": 20.0}, follow=True)

    assert call.sent("parcels").key == "7"  # from the handler of invoices


# --8<-- [end:follow]


# --8<-- [start:responder]
def test_a_responder_alone() -> None:
    client = Client(responders.app)

    call = client.respond_with(responders.Notify, responders.User(7, "ann", registered=False), {})

    assert call.sent("users.notified").value["login"] == "ann"
    assert call.all_sent("profiles.notified") == []


# --8<-- [end:responder]


# --8<-- [start:direct]
def test_what_is_sent_outside_handlers() -> None:
    with Client(sending.app) as client:  # as the fixture flowkit_client does
        sending.rename(7, "ann")

    assert client.sent("users.renamed").value == {"id": 7, "name": "ann"}


# --8<-- [end:direct]
