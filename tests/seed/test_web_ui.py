"""The seed's "Sidekiq Web UI with a password": the page of ``flowkit web``, in a real browser, on a real Kafka and Redis."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Watched, opened_browser
from kafka import KafkaProducer
from processes import Process
from redis import Redis
from servers import Kafka, WaitFor

PASSWORD = "correct horse"
TOPICS = {"orders": 3, "invoices": 1, "alerts": 1, "refunds": 2, "refunds.dead": 1}
SHOTS = os.environ.get("FLOWKIT_SCREENSHOTS")
"""1: take the pictures of docs/web.md anew."""
IMAGES = Path(__file__).parents[2] / "docs" / "images"


class Shop:
    """The application ``apps/bills.py`` with topics of its own, its processes, and what is sent to it."""

    def __init__(self, kafka: Kafka, redis: Redis, url: str, logs: Path, wait_for: WaitFor, prefix: str) -> None:
        self.hosts = kafka.hosts
        self.redis = redis
        self.logs = logs
        self.wait_for = wait_for
        self.prefix = prefix
        self.env = {"FLOWKIT_KAFKA_HOSTS": kafka.hosts, "FLOWKIT_REDIS": url, "BILLS_PREFIX": prefix}
        for name, partitions in TOPICS.items():
            kafka.create_topic(prefix + name, partitions)

    def start(self, command: str, *options: str, **env: str) -> Process:
        log = self.logs / f"{command}-{uuid.uuid4().hex[:4]}.log"
        return Process("flowkit", command, "bills:app", *options, env={**self.env, **env}, log=log)

    def web(self, *options: str, **env: str) -> Process:
        return self.start("web", "--port", "0", *options, FLOWKIT_WEB_PASSWORD=PASSWORD, **env)

    def send(self, topic: str, *values: dict[str, Any], partition: int = 0) -> None:
        producer = KafkaProducer(bootstrap_servers=self.hosts)
        try:
            for value in values:
                producer.send(self.prefix + topic, json.dumps(value).encode(), partition=partition)
            producer.flush()
        finally:
            producer.close()

    def fail(self, why: str, *values: dict[str, Any]) -> None:
        """Has these orders fail every attempt with this error."""
        self.redis.set("broken", why)
        self.send("orders", *values)
        with self.start("run"), self.start("worker") as worker:
            self.wait_for(lambda: self.redis.zcard("rq:failed:default") == len(values), 60, "the failed jobs")
            assert worker.stop() == 0

    @property
    def billed(self) -> list[str]:
        items: Any = self.redis.lrange("billed", 0, -1)
        return [item.decode() for item in items]


def address_of(web: Process) -> str:
    web.wait_for(" is shown at ")
    return re.findall(r"is shown at (\S+)", web.output)[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened_browser() as opened:
        yield opened


@pytest.fixture
def shop(kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor) -> Shop:
    return Shop(kafka, redis, redis_url, tmp_path, wait_for, f"{uuid.uuid4().hex[:8]}.")


def test_nobody_comes_in_without_the_password(shop: Shop, browser: Any) -> None:
    with shop.web("--user", "ops") as web:
        address = address_of(web)
        for user, password in (("", None), ("ops", "wrong"), ("flowkit", PASSWORD)):
            with Watched(browser, address, password, user, expected="401") as nobody:
                for path in ("", "flow.svg", "static/style.css", "delete?queue=default&job=x"):
                    try:
                        answer = nobody.page.goto(address + path)
                    except Exception as error:
                        assert "ERR_INVALID_AUTH_CREDENTIALS" in str(error)  # noqa: PT017 - Chromium's word for it
                    else:
                        assert answer.status == 401
                        assert "password are needed" in nobody.page.inner_text("body")
        assert "refused a login as 'ops' from 127.0.0.1" in web.output

        with Watched(browser, address, PASSWORD, "ops") as ops:
            assert ops.page.goto(address).status == 200
            assert ops.page.inner_text(".brand") == "shop flowkit"
        assert PASSWORD not in web.output
        assert web.stop() == 0


def test_a_failed_job_is_seen_retried_and_really_runs_again_and_another_is_deleted(shop: Shop, browser: Any) -> None:
    shop.fail("<img src=x onerror=alert(1)><script>alert(2)</script>", {"id": 7}, {"id": 8})
    with shop.web() as web, Watched(browser, address_of(web), PASSWORD) as watched:
        page = watched.page
        page.goto(watched.address)
        rows = page.locator("#failed tbody tr")
        assert rows.count() == 2
        first = page.locator("#failed tbody tr", has_text=f"{shop.prefix}orders[0]@0")
        assert "2 of 2" in first.inner_text()

        # what the error says stays text
        assert "ValueError: <img src=x onerror=alert(1)><script>alert(2)</script>" in first.inner_text()
        first.locator("summary").click()
        assert "in bill" in first.locator("pre").inner_text()
        assert page.locator("#failed img, #failed script").count() == 0

        # it stays open, and keeps the focus, while the page looks again
        before = first.locator("time").inner_text()
        shop.wait_for(lambda: first.locator("time").inner_text() != before, 20, "the page to look again")
        assert first.locator("pre").is_visible()
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"

        # retried while nothing is mended: it fails again, and is back
        second = page.locator("#failed tbody tr", has_text=f"{shop.prefix}orders[0]@1")
        with shop.start("worker") as worker:
            second.get_by_role("button", name="Retry").click()
            worker.wait_for(f"{shop.prefix}orders[0]@1 failed, attempt 2 of 2")
            shop.wait_for(lambda: shop.redis.zcard("rq:failed:default") == 2, 20, "it to be back")
            assert worker.stop() == 0
        page.goto(watched.address)
        assert rows.count() == 2

        # retried: with the fault mended, a real worker handles it
        shop.redis.delete("broken")
        first.get_by_role("button", name=f"Retry {shop.prefix}orders[0]@0").click()
        assert page.inner_text(".notice") == f"{shop.prefix}orders[0]@0 is back in its queue."
        assert rows.count() == 1
        assert "1 (1)" in page.inner_text("[data-queue=default]")
        with shop.start("worker"):
            shop.wait_for(lambda: shop.billed == ["7 attempt 2"], 30, "the order to be handled")

        # deleted: only after a question
        page.locator("#failed tbody tr").get_by_role("link", name="Delete").click()
        assert page.inner_text("h1") == "Delete this job?"
        assert f"{shop.prefix}orders[0]@1" in page.inner_text("main")
        page.get_by_role("link", name="Keep it").click()
        assert rows.count() == 1
        page.locator("#failed tbody tr").get_by_role("link", name="Delete").click()
        page.get_by_role("button", name="Delete it").click()
        assert page.inner_text(".notice") == f"{shop.prefix}orders[0]@1 is deleted."
        assert rows.count() == 0
        assert shop.redis.zcard("rq:failed:default") == 0
        assert [key for key in shop.redis.scan_iter("rq:job:*") if b"orders-0-1-" in key] == []
        with shop.start("worker", "--burst") as worker:
            assert worker.wait() == 0
        assert shop.billed == ["7 attempt 2"]


def test_lag_queues_workers_and_the_flow_map_are_there_and_the_page_keeps_itself_fresh(
    shop: Shop, browser: Any
) -> None:
    shop.send("orders", {"id": 1}, {"id": 2}, {"id": 3}, partition=1)
    shop.send("refunds", {"id": 4})
    with shop.web() as web, Watched(browser, address_of(web), PASSWORD) as watched:
        page = watched.page
        page.goto(watched.address)
        group = page.locator(f"[data-group='shop_{shop.prefix}orders']")
        assert "3 behind" in group.inner_text()
        cells = [row.inner_text().split() for row in group.locator("tbody tr").all()]
        assert [row[-4:-2] for row in cells] == [["0", "0"], ["1", "3"], ["2", "0"]]  # partition, lag
        assert page.locator(".pill").all_inner_texts() == ["Kafka answers", "Redis answers"]
        assert "nobody works on the queues" in page.inner_text("#workers")

        # the flow map: a drawing that the browser can show, and words
        image = page.locator("#flow img")
        shop.wait_for(lambda: image.evaluate("image => image.complete && image.naturalWidth > 100"), 10, "the map")
        drawing = page.request.get(watched.address + "flow.svg").text()
        assert all(f"{shop.prefix}{name}" in drawing for name in ("orders", "invoices", "alerts", "refunds"))
        page.get_by_text("In words").click()
        assert f"{shop.prefix}invoices (always, exactly one)" in page.inner_text("#flow dl")

        # without being loaded again, it shows that the messages are consumed and one is in hand
        page.evaluate("window.same = true")
        with shop.start("run"), shop.start("worker"):
            page.locator("#workers tbody").get_by_text(f"{shop.prefix}refunds[0]@0").wait_for(timeout=40_000)
            group.get_by_text("up to date").wait_for(timeout=30_000)
            assert "1 (1)" in page.inner_text("[data-queue=slow]")
            assert page.locator("#workers tbody tr").count() == 2
            shop.redis.rpush("gate", "go")
        assert page.evaluate("window.same") is True
        page.get_by_role("link", name="Stop refreshing").click()
        assert page.locator("script").count() == 0


def test_without_scripts_on_a_phone_and_in_the_dark_it_works_as_well(shop: Shop, browser: Any) -> None:
    shop.fail("no " * 200, {"id": 1})
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "color_scheme": "dark"}
    with (
        shop.web() as web,
        Watched(browser, address_of(web), PASSWORD, java_script_enabled=False, **phone) as watched,
    ):
        page = watched.page
        page.goto(watched.address)
        assert page.locator("noscript meta[http-equiv=refresh]").count() == 1
        box = page.locator("#failed").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360  # nothing is wider than the phone
        page.get_by_role("button", name="Retry").click()
        assert "is back in its queue" in page.inner_text(".notice")

    with shop.web() as web:
        grounds = []
        for scheme in ("light", "dark"):
            with Watched(browser, address_of(web), PASSWORD, color_scheme=scheme) as watched:
                watched.page.goto(watched.address)
                grounds.append(watched.page.evaluate("getComputedStyle(document.body).backgroundColor"))
                assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert grounds == ["rgb(245, 246, 248)", "rgb(17, 21, 27)"]


def test_another_site_cannot_press_the_buttons(shop: Shop, browser: Any) -> None:
    shop.fail("no", {"id": 1})
    (job,) = shop.redis.zrange("rq:failed:default", 0, -1)
    with shop.web() as web, Watched(browser, address_of(web), PASSWORD, expected="403") as watched:
        page = watched.page
        page.goto(watched.address)  # logged in
        token = page.locator("#failed input[name=token]").get_attribute("value")
        for guess in ("", "x", token):  # even with the token, which it cannot know
            page.goto("about:blank")
            page.set_content(
                f'<form method="post" action="{watched.address}retry"><input name="token" value="{guess}">'
                f'<input name="queue" value="default"><input name="job" value="{job.decode()}"><button>Win</button></form>'
            )
            page.get_by_role("button", name="Win").click()
            page.get_by_text("Nothing was changed").wait_for()
        assert shop.redis.zrange("rq:failed:default", 0, -1) == [job]


def test_who_may_only_read_finds_no_buttons(shop: Shop, browser: Any) -> None:
    shop.fail("no", {"id": 1})
    (job,) = shop.redis.zrange("rq:failed:default", 0, -1)
    with shop.web("--read-only") as web, Watched(browser, address_of(web), PASSWORD) as watched:
        page = watched.page
        page.goto(watched.address)
        assert page.locator("#failed tbody tr").count() == 1
        assert page.locator("button").count() == 0
        form = {"queue": "default", "job": job.decode(), "token": "x"}
        answer = page.request.post(watched.address + "delete", form=form)
        assert answer.status == 403
        assert "--read-only" in answer.text()
        assert shop.redis.zcard("rq:failed:default") == 1


@pytest.mark.skipif(not SHOTS, reason="FLOWKIT_SCREENSHOTS=1 takes the pictures of docs/web.md anew")
def test_the_pictures_of_the_docs(
    kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor, browser: Any
) -> None:
    shop = Shop(kafka, redis, redis_url, tmp_path, wait_for, prefix="")
    shop.fail("card declined: insufficient funds", {"id": 7}, {"id": 8})
    shop.redis.delete("broken")
    shop.send("refunds", {"id": 1}, {"id": 2}, {"id": 3})
    with shop.start("run") as run, shop.start("worker"), shop.web() as web:
        wait_for(lambda: shop.redis.llen("rq:queue:slow") or shop.redis.zcard("rq:wip:slow"), 30, "the refunds")
        wait_for(lambda: shop.redis.hget("flowkit:marks:shop_refunds", "committed:refunds:0") == b"3", 30, "commits")
        assert run.stop() == 0
        shop.send("orders", *({"id": number} for number in range(42)), partition=1)
        IMAGES.mkdir(parents=True, exist_ok=True)
        sizes = {"light": (960, 1060), "dark": (960, 640), "phone": (390, 780)}
        for name, (width, height) in sizes.items():
            scheme = "dark" if name == "dark" else "light"
            options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
            with Watched(browser, address_of(web), PASSWORD, **options) as watched:
                watched.page.goto(watched.address)
                watched.page.locator("[data-group=shop_orders]").get_by_text("42 behind").wait_for()
                picture = IMAGES / f"web-{name}.png"
                watched.page.screenshot(path=picture)
                if name == "light":
                    watched.page.locator("#flow").screenshot(path=IMAGES / "web-flow.png")
        with Watched(browser, address_of(web), PASSWORD, viewport={"width": 960, "height": 470}) as watched:
            watched.page.goto(watched.address)
            watched.page.get_by_role("link", name="Delete").first.click()
            watched.page.screenshot(path=IMAGES / "web-delete.png")
        shop.redis.rpush("gate", "go", "go", "go")
    pictures = [IMAGES / f"web-{name}.png" for name in (*sizes, "flow", "delete")]
    assert max(picture.stat().st_size for picture in pictures) < 150_000
