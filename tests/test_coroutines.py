"""Coroutines of hooks and handlers: one event loop a process, whichever thread waits, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from servers import WaitFor
from support import connect, make_app

from flowkit import Flowkit, coroutines
from flowkit.coroutines import close_loop, run_async
from flowkit.server import Server
from flowkit.testing import Client


class TimeOut(Exception):
    """What a signal handler raises, as RQ does when a job takes too long."""


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    close_loop()
    assert "flowkit-asyncio" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Interrupts the main thread, wherever it waits."""

    def ring(*_: object) -> None:
        raise TimeOut

    before = signal.signal(signal.SIGUSR1, ring)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


async def loop_in_use() -> Any:
    return asyncio.get_running_loop()


async def forever() -> None:
    await asyncio.Event().wait()


def make_asking_app() -> Flowkit:
    """Its handler asks, over a connection and under a lock that on_startup made, and sends on what it is answered."""
    app = make_app(kafka={"hosts": "in-memory:1"})
    made: dict[str, Any] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
        writer.close()

    @app.on_startup
    async def up() -> None:
        made["server"] = await asyncio.start_server(answer, "127.0.0.1", 0)
        made["connection"] = await asyncio.open_connection(*made["server"].sockets[0].getsockname())
        made["lock"] = asyncio.Lock()

    @app.on_shutdown
    async def down() -> None:
        made["connection"][1].close()
        await made["connection"][1].wait_closed()
        made["server"].close()

    @app.responds_to("answers")
    async def ask(question: str) -> None:
        async with asyncio.timeout(10), made["lock"]:
            reader, writer = made["connection"]
            writer.write(question.encode() + b"\n")
            app.respond_to("answers", (await reader.readline()).strip())

    app.add_topic("questions", ask)
    return app


def test_what_startup_opened_serves_an_inline_handler(wait_for: WaitFor) -> None:
    app = make_asking_app()
    broker = connect(app)
    for word in (b'"one"', b'"two"'):
        broker.append("questions", word)
    server = Server(app, broker.consumer)

    def stop() -> None:
        try:
            wait_for(lambda: len(broker.records("answers")) == 2, what="the answers")
        finally:
            server.stop()

    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in signals]
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(stop)
        try:
            code = server.run()
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
        stopped.result()

    assert code == 0
    assert [record.value for record in broker.records("answers")] == [b"ONE", b"TWO"]


def test_what_startup_opened_serves_a_handler_under_test() -> None:
    with Client(make_asking_app()) as client:
        assert client.send("questions", "one").sent("answers").raw == b"ONE"
        with ThreadPoolExecutor() as pool:
            assert pool.submit(client.send, "questions", "two").result().sent("answers").raw == b"TWO"


def test_all_threads_share_one_loop() -> None:
    with ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: run_async(loop_in_use())).result()

    assert run_async(loop_in_use()) is other


def test_threads_do_not_mix_up_their_messages() -> None:
    app = make_app()
    both = asyncio.Barrier(2)

    async def echo(value: str) -> None:
        async with asyncio.timeout(10):
            await both.wait()  # each handler is in the midst of its message when the other responds
        app.respond_to("echoes", value)

    app.add_response(echo, "echoes")
    app.add_topic("a", echo)
    app.add_topic("b", echo)
    client = Client(app)

    def values(topic: str) -> list[Any]:
        return [client.send(topic, f"{topic}{number}").sent("echoes").raw for number in range(50)]

    with ThreadPoolExecutor() as pool:
        a, b = pool.map(values, "ab")

    assert a == [f"a{number}".encode() for number in range(50)]
    assert b == [f"b{number}".encode() for number in range(50)]


def test_what_interrupts_the_wait_cancels_the_coroutine_and_lets_it_clean_up(interrupt: Callable[[], None]) -> None:
    seen: list[str] = []

    async def work() -> None:
        try:
            asyncio.get_running_loop().call_soon(interrupt)
            await forever()
        except asyncio.CancelledError:
            await asyncio.sleep(0.01)
            seen.append("cleaned up")
            raise

    with pytest.raises(TimeOut):
        run_async(work())
    assert seen == ["cleaned up"]


def test_a_coroutine_that_cannot_be_cancelled_is_named_and_waited_for(
    interrupt: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wait_for: WaitFor,
) -> None:
    monkeypatch.setattr(coroutines, "GRACE", 0.01)
    seen: list[str] = []

    async def blocks() -> None:
        interrupt()
        wait_for(lambda: "blocks" in caplog.text, what="the log")
        seen.append("ended")

    with caplog.at_level(logging.ERROR), pytest.raises(TimeOut):
        run_async(blocks())
    assert seen == ["ended"]
    assert "goes on, 0.01 s after it was interrupted" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError, StopAsyncIteration])
def test_what_a_coroutine_raises_comes_out_and_the_loop_goes_on(error: type[BaseException]) -> None:
    async def work() -> None:
        raise error

    before = run_async(loop_in_use())
    with pytest.raises(error):
        run_async(work())
    assert run_async(loop_in_use()) is before


def test_waiting_inside_a_coroutine_is_refused() -> None:
    async def outer() -> Any:
        return run_async(forever())

    with pytest.raises(RuntimeError, match=r"called inside a coroutine.*await the other one"):
        run_async(outer())


def test_a_coroutine_may_wait_for_another_one_in_a_thread() -> None:
    async def outer() -> Any:
        return await asyncio.to_thread(lambda: run_async(loop_in_use()))

    assert run_async(outer()) is run_async(loop_in_use())


def test_at_its_end_the_loop_cancels_what_is_left() -> None:
    seen: list[str] = []
    started = threading.Event()

    async def background() -> None:
        try:
            started.set()
            await forever()
        finally:
            seen.append("cancelled")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            seen.append("generator ended")

    kept: list[Any] = []

    async def start() -> None:
        kept.append(asyncio.create_task(background()))
        kept.append(numbers())
        await anext(kept[1])

    run_async(start())
    assert started.wait(10)
    loop = run_async(loop_in_use())
    close_loop()
    close_loop()

    assert seen == ["cancelled", "generator ended"]
    assert loop.is_closed()
    assert run_async(loop_in_use()) is not loop


def test_who_waits_for_a_coroutine_is_told_of_the_end_of_the_loop() -> None:
    started = threading.Event()

    async def work() -> None:
        started.set()
        await forever()

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(run_async, work())
        assert started.wait(10)
        close_loop()
        with pytest.raises(RuntimeError, match="the coroutine was cancelled"):
            waiting.result(10)


def test_coroutines_that_come_during_the_end_have_an_end_too() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    def results() -> set[str]:
        found = set()
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            try:
                found.add(run_async(work()))
            except RuntimeError as error:
                found.add(str(error))
        return found

    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(results) for _ in range(4)]
        while not all(future.done() for future in waiting):
            close_loop()
        found = set().union(*(future.result() for future in waiting))

    assert found <= {"done", "the coroutine was cancelled, by itself or by what it waited for"}


def test_the_end_of_the_application_is_the_end_of_the_loop() -> None:
    app = make_app()
    loops: list[Any] = []

    @app.on_startup
    async def up() -> None:
        loops.append(asyncio.get_running_loop())

    @app.on_shutdown
    async def down() -> None:
        loops.append(asyncio.get_running_loop())

    with Client(app):
        pass

    assert loops[0] is loops[1]
    assert loops[0].is_closed()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_a_loop_of_its_own_and_leaves_its_parents_alone() -> None:
    before = run_async(loop_in_use())
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(10)
            own = run_async(loop_in_use())
            close_loop()
            gc.collect()
            code = 0 if own is not before and not before.is_closed() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert run_async(loop_in_use()) is before
