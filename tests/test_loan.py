"""A handler that takes long: what becomes of the partitions while somebody else polls, on the broker in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from servers import WaitFor
from test_consumer import Clock, Late, Loop, Redis, make_app, refuse_values

import flowkit.consumer
from flowkit import Flowkit
from flowkit.errors import BrokerUnavailable
from flowkit.message import Partition

PLACE = Partition("a", 0)
OTHER = Partition("a", 1)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowkit.consumer, "POLL_TIMEOUT", 0.0)


class Kept(Loop):
    """A loop whose handler takes long at the value 2: somebody polls meanwhile, and something happens within that poll."""

    def __init__(self, app: Flowkit, redis: Redis | None = None) -> None:
        super().__init__(app, Clock(), redis)
        self.happens: list[Callable[[], None]] = []
        self.polled = threading.Event()
        self.paused: set[Partition] = set()
        self.broker.create("a", 2)
        self.turn()
        poll = self.client.poll
        for name in ("seek", "pause", "resume"):  # kafka-python does these with what is assigned only
            self._only_ours(name)

        def observed(timeout: float, most: int = 500) -> Any:
            if not threading.current_thread().name.startswith("flowkit-keeps-"):
                return poll(timeout, most)
            if self.happens:
                self.happens.pop(0)()
                return poll(0, most)
            self.paused = set(self.client.paused)
            self.polled.set()
            return poll(0.01, most)

        self.client.poll = observed

    def _only_ours(self, name: str) -> None:
        do = getattr(self.client, name)

        def checked(partition: Partition, *arguments: Any) -> None:
            assert partition in self.client.positions, f"{name}() of {partition}, which is not assigned"
            do(partition, *arguments)

        setattr(self.client, name, checked)

    def turn(self, times: int = 1, *, after: float = 0.0) -> None:
        for _ in range(times):
            self.consumer.turn()
            self.consumer.commit()

    def take_long(self) -> None:
        """In the handler: until what is to happen has happened, and there was one more poll."""
        self.polled.clear()
        assert self.consumer.loan.keep()
        assert self.consumer.loan.keep()  # it is kept already
        assert self.polled.wait(30)

    def leave(
        self,
        *partitions: Partition,
        lost: bool = False,
        committed: int | None = None,
        back: bool = True,
        stays: bool = False,
    ) -> None:
        """What is to happen: partitions go, somebody else commits, and they come back with the same poll; with ``stays`` each
        has the position that it had, as in kafka-python where nobody else was given it.
        """

        def happen() -> None:
            for partition in partitions:
                position = self.client.positions[partition]
                self.take_away(partition.topic, partition.partition, lost=lost)
                if committed is not None:
                    self.broker.commits["g"][partition] = committed
                if stays:
                    self.client.positions[partition] = position
                    self.consumer.assigned([partition])
            if not back:
                self.client._assign = lambda: None

        self.happens.append(happen)


def slow(at: int = 2, **settings: Any) -> tuple[Kept, list[int]]:
    app = make_app(**settings)
    seen: list[int] = []

    def handle(value: int) -> None:
        seen.append(value)
        if value == at and seen.count(at) == 1:
            loop.take_long()

    app.add_topic("a", handle)
    loop = Kept(app)
    return loop, seen


def test_everything_is_paused_while_a_handler_takes_long_and_goes_on_afterwards() -> None:
    loop, seen = slow()
    loop.put("a", 1, 2, 3)
    loop.put("a", 10, partition=1)
    loop.turn()
    assert loop.paused == {PLACE, OTHER}
    assert loop.client.paused == set()
    loop.turn(3)
    assert sorted(seen) == [1, 2, 3, 10]
    assert (loop.committed("a"), loop.committed("a", 1)) == (3, 1)


def test_nobody_takes_the_client_of_a_loop_that_is_not_in_a_handler() -> None:
    loop, _ = slow()
    assert not loop.consumer.loan.keep()
    loop.put("a", 1)
    loop.turn()
    assert not loop.consumer.loan.keep()


@pytest.mark.parametrize("stays", [False, True], ids=["its position is new", "its position stays"])
@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
@pytest.mark.parametrize("values", [(2,), (1, 2), (2, 3), (1, 2, 3)], ids=str)
def test_a_partition_that_leaves_and_comes_back_goes_on_and_nothing_is_repeated(
    values: tuple[int, ...], lost: bool, stays: bool
) -> None:
    loop, seen = slow()
    loop.put("a", *values)
    loop.leave(PLACE, OTHER, lost=lost, stays=stays)
    loop.turn(3)
    assert tuple(seen) == values
    assert loop.committed("a") == len(values)
    assert loop.client.paused == set()


@pytest.mark.parametrize("stays", [False, True], ids=["its position is new", "its position stays"])
def test_a_partition_that_somebody_else_has_brought_further_goes_on_there(stays: bool) -> None:
    loop, seen = slow()
    loop.put("a", 1, 2, 3, 4)
    loop.leave(PLACE, committed=3, stays=stays)
    loop.turn(3)
    assert seen == [1, 2, 4]
    assert loop.committed("a") == 4


@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
@pytest.mark.parametrize("passed", [0, 1])
def test_a_partition_whose_messages_are_handled_at_once_goes_on_behind_what_was_passed(
    lost: bool, passed: int, wait_for: WaitFor
) -> None:
    app = make_app()
    runs: Counter[int] = Counter()
    gate = threading.Event()

    def at_once(value: int) -> None:
        runs[value] += 1
        if value == passed:
            gate.wait(30)

    app.add_topic("a", at_once, concurrency=5)
    app.add_topic("b", lambda _: loop.take_long())
    loop = Kept(app)
    loop.put("a", 0, 1, 2)
    wait_for(lambda: loop.turn() or (len(runs) == 3 and loop.consumer.tracks[PLACE].done == passed))
    loop.put("a", 3)
    loop.put("b", 7)
    loop.leave(PLACE, lost=lost)
    loop.turn()
    gate.set()
    wait_for(lambda: loop.turn() or loop.committed("a") == 4)
    assert runs[passed] == 2
    assert passed == 0 or runs[0] == 1


def test_a_partition_that_left_for_good_is_abandoned_and_others_go_on() -> None:
    loop, seen = slow()
    loop.put("a", 1, 2, 3)
    loop.leave(PLACE, back=False)
    loop.turn()
    assert seen == [1, 2]
    assert loop.committed("a") in (None, 0)  # neither the message in hand, nor what its slice had before it
    loop.put("a", 10, partition=1)
    loop.turn(2)
    assert seen == [1, 2, 10]
    assert loop.committed("a", 1) == 1


@pytest.mark.parametrize("lost", [False, True], ids=["revoked", "lost"])
@pytest.mark.parametrize("elsewhere", [0, 2], ids=["nobody handled it", "somebody did"])
def test_what_was_finished_too_late_is_not_repeated_if_its_partition_comes_back(lost: bool, elsewhere: int) -> None:
    """Else a message that costs the membership each time would come again each time, and nothing behind it ever."""
    loop, seen = slow()
    loop.put("a", 1, 2, 3, 4)
    assign = loop.client._assign
    loop.leave(PLACE, back=False, lost=lost)
    loop.turn()
    loop.turn()
    assert seen == [1, 2]
    if elsewhere:
        loop.broker.commits["g"][PLACE] = elsewhere + 1
    loop.client._assign = assign
    loop.turn(2)
    assert seen == ([1, 2, 4] if elsewhere else [1, 2, 3, 4])
    assert loop.committed("a") == 4


def test_what_was_finished_too_late_is_repeated_if_its_response_did_not_arrive() -> None:
    app = make_app()
    seen: list[int] = []

    @app.topic("a")
    @app.responds_to("out", required=False)
    def handle(value: int) -> None:
        seen.append(value)
        if value == 2 and seen.count(2) == 1:
            app.respond_to("out", value)
            loop.take_long()

    loop = Kept(app)
    assign = loop.client._assign
    loop.put("a", 1, 2, 3)
    loop.leave(PLACE, back=False)
    refuse_values(loop, 2, times=1)
    loop.turn()
    loop.client._assign = assign
    loop.turn(2)
    assert seen == [1, 2, 1, 2, 3]


def test_what_was_known_of_a_partition_that_was_lost_and_kept_is_not_known_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = make_app(kafka={"offset_commit_interval": 3600})
    seen: list[int] = []

    @app.topic("a")
    @app.responds_to("out")
    def handle(value: int) -> int:
        seen.append(value)
        if value == 2 and seen.count(2) == 1:
            loop.take_long()
        return value

    # Given a partition that was lost and came back while a message of it was in hand
    loop = Kept(app)
    loop.put("a", 1)
    loop.turn()
    loop.put("a", 2, 3)
    loop.leave(PLACE, lost=True)
    loop.turn(2)
    assert (seen, loop.committed("a")) == ([1, 2, 3], 3)
    # When it goes to another one in due form, with a response that Kafka refuses under way, and comes back
    Late(monkeypatch)
    refuse_values(loop, 4, times=1)
    loop.producer.renew()
    loop.put("a", 4, 5)
    loop.consumer.turn()
    loop.take_away("a")
    loop.consumer.confirmed({PLACE: 3})
    # Then the message of that response comes again
    loop.turn(3)
    assert seen == [1, 2, 3, 4, 5, 4, 5]
    assert loop.committed("a") == 5


def test_a_partition_that_waits_in_the_batch_and_left_is_not_touched() -> None:
    loop, seen = slow()
    loop.put("a", 2)
    loop.put("a", 10, 11, partition=1)
    loop.leave(OTHER, back=False)
    loop.turn(2)
    assert seen == [2]
    assert loop.committed("a") == 1
    assert loop.committed("a", 1) in (None, 0)


def test_what_was_done_of_the_batch_is_committed_when_its_partition_leaves() -> None:
    loop, seen = slow(kafka={"offset_commit_interval": 3600, "offset_commit_threshold": 1})
    loop.put("a", 1, 2, 3)
    loop.leave(PLACE, back=False)
    loop.turn()
    assert seen == [1, 2]
    assert loop.committed("a") == 1


def test_messages_of_a_partition_that_comes_meanwhile_are_not_lost() -> None:
    loop, seen = slow()
    loop.put("a", 2)
    loop.happens.append(
        lambda: (loop.broker.create("a", 2), loop.broker.topics["a"].append([]), loop.put("a", 20, partition=2))
    )
    loop.turn()
    assert seen == [2]
    loop.turn(2)
    assert seen == [2, 20]
    assert loop.committed("a", 2) == 1


def test_a_poll_that_fails_meanwhile_costs_the_client_and_not_the_message(wait_for: WaitFor) -> None:
    loop, seen = slow()

    def fail() -> None:
        raise BrokerUnavailable("gone")

    loop.happens.append(fail)
    loop.put("a", 1, 2, 3)

    def take_long() -> None:
        assert loop.consumer.loan.keep()
        wait_for(lambda: loop.consumer.loan.error is not None)
        assert not loop.consumer.loan.keep()  # it is not polled again

    loop.take_long = take_long  # type: ignore[method-assign]
    loop.turn()
    with pytest.raises(BrokerUnavailable):
        loop.turn()
    loop.consumer._drop_client(0)
    loop.turn(2)
    assert seen == [1, 2, 3]
    assert loop.committed("a") == 3


def test_a_response_of_a_message_that_was_abandoned_is_no_failure_of_it() -> None:
    app = make_app()
    seen: list[int] = []

    def relay(value: int) -> None:
        seen.append(value)
        app.respond_to("out", value)
        if value == 2 and seen.count(2) == 1:
            loop.take_long()

    app.topic("a")(app.responds_to("out")(relay))
    loop = Kept(app)
    loop.put("a", 1, 2, 3)
    loop.leave(PLACE, back=False)
    loop.turn()
    assert [event for event, _, _ in loop.events.errors if event != "topics"] == []
    assert loop.committed("a") in (None, 0)


def test_an_after_failure_hook_that_takes_long_keeps_the_partition_too() -> None:
    app = make_app(kafka={"offset_commit_interval": 3600})
    seen: list[int] = []

    def handle(value: int) -> None:
        seen.append(value)
        if value == 2 and seen.count(2) == 1:
            raise ValueError("once")

    app.add_topic("a", handle)
    app.after_failure("a")(lambda error: loop.take_long())
    loop = Kept(app)
    loop.put("a", 1, 2, 3)
    loop.leave(PLACE, OTHER)
    loop.turn(4)
    assert seen == [1, 2, 2, 3]


def test_a_message_that_fails_after_its_partition_left_is_no_failure_here() -> None:
    app = make_app()
    told: list[Exception] = []

    def handle(value: int) -> None:
        loop.take_long()
        raise ValueError(value)

    app.add_topic("a", handle)
    app.after_failure("a")(lambda error: told.append(error))
    loop = Kept(app)
    loop.put("a", 2)
    loop.leave(PLACE, back=False)
    loop.turn()
    assert told == []
    assert loop.events.count("retried") == 0


def test_a_message_whose_partition_leaves_while_its_after_failure_hook_takes_long_is_left_alone() -> None:
    app = make_app()

    def handle(value: int) -> None:
        raise ValueError(value)

    app.add_topic("a", handle)
    app.after_failure("a")(lambda error: loop.take_long())
    loop = Kept(app)
    loop.put("a", 2)
    loop.leave(PLACE, back=False)
    loop.turn(2)
    assert loop.events.count("retried") == 0


def test_what_passed_its_hooks_is_not_queued_if_its_partition_leaves_before_the_batch_is() -> None:
    app = make_app(inline=False, redis="redis://127.0.0.1:9")
    app.add_topic("a", lambda value: None)
    app.before_enqueue("a")(lambda value: loop.take_long() if value == 2 else None)
    redis = Redis()
    loop = Kept(app, redis)
    loop.put("a", 1)
    loop.put("a", 2, partition=1)
    loop.leave(PLACE, back=False)
    loop.turn()
    assert redis.jobs == [("a", 1, 0)]
    assert loop.committed("a", 1) == 1


@pytest.mark.parametrize("stays", [False, True], ids=["its position is new", "its position stays"])
@pytest.mark.parametrize("back", [True, False], ids=["comes back", "leaves for good"])
def test_a_hook_of_a_queued_route_that_takes_long_loses_and_repeats_nothing(back: bool, stays: bool) -> None:
    app = make_app(inline=False, redis="redis://127.0.0.1:9")
    hooked: list[int] = []

    def hook(value: int) -> None:
        hooked.append(value)
        if value == 2 and hooked.count(2) == 1:
            loop.take_long()

    app.add_topic("a", lambda value: None)
    app.before_enqueue("a")(hook)
    redis = Redis()
    loop = Kept(app, redis)
    loop.put("a", 1, 2, 3)
    loop.put("a", 10, partition=1)
    loop.leave(PLACE, OTHER, back=back, stays=back and stays)
    loop.turn(4)
    if not back:
        assert redis.jobs == []
        assert (loop.committed("a"), loop.committed("a", 1)) in ((None, None), (0, 0))
        return
    assert sorted(redis.jobs) == [("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("a", 1, 0)]
    assert sorted(hooked) == [1, 2, 3, 10]
    assert (loop.committed("a"), loop.committed("a", 1)) == (3, 1)


def test_what_was_done_before_a_partition_was_lost_is_not_done_again_unless_somebody_committed_meanwhile() -> None:
    loop, seen = slow(at=-1, kafka={"offset_commit_interval": 3600})
    loop.put("a", 1, 2)
    loop.consumer.turn()
    loop.take_away("a", lost=True)
    loop.put("a", 3)
    loop.consumer.turn()
    loop.consumer.turn()
    assert seen == [1, 2, 3]
    loop.take_away("a", lost=True)
    loop.broker.commits["g"][PLACE] = 1  # by somebody who had it in between, or on purpose
    loop.consumer.turn()
    loop.consumer.turn()
    assert seen == [1, 2, 3, 2, 3]
