"""The map of an application, as text, Mermaid, DOT and a drawing."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from support import make_app

from flowkit import Flowkit, flowmap
from flowkit.flowdrawing import MANY_DEAD
from flowkit.flowmap import Edge, Node

SVG = "{http://www.w3.org/2000/svg}"


class Huey:
    def perform_async(self, topic: str, params: Any) -> None: ...


def shop() -> Flowkit:
    app = make_app(inline=False)

    @app.topic("orders", queue="bills", dead_letter="orders.dead", retry=3)
    @app.responds_to("invoices")
    @app.responds_to("alerts", required=False, multiple_usage=True)
    def bill(order: Any) -> None: ...

    @app.topic("invoices", inline=True)
    def pack(invoice: Any) -> None: ...

    @app.topic("mails", worker=Huey())
    @app.responds_to("orders", required=False)
    def read(mail: Any) -> None: ...

    for name, function in (("bill", bill), ("pack", pack), ("read", read)):
        function.__qualname__ = name
    return app


def make_app_named(name: str, count: int) -> Flowkit:
    """Routes in a chain, of which each leads to the next, and all to the same dead letters."""
    app = Flowkit(name, dead_letter="dead")
    for number in range(count):

        def handle(value: Any) -> None: ...

        handle.__qualname__ = f"handle_{number}"
        app.add_topic(f"topic-{number:02}", handle, inline=number % 2 == 0)
        app.add_response(handle, f"topic-{number + 1:02}", required=number % 3 == 0)
    return app


def test_the_map_has_topics_handlers_and_the_ways_between_them() -> None:
    found = flowmap.flow_map(shop())
    assert [(node.kind, node.name, node.runs) for node in found.nodes] == [
        ("topic", "alerts", ""),
        ("topic", "invoices", ""),
        ("topic", "mails", ""),
        ("topic", "orders", ""),
        ("topic", "orders.dead", ""),
        ("handler", "pack", "inline"),
        ("handler", "read", "worker Huey"),
        ("handler", "bill", "queue bills"),
    ]
    assert [node.name for node in found.nodes if node.dead_letters] == ["orders.dead"]
    assert found.edges == (
        Edge("topic:invoices", "handler:invoices", "in"),
        Edge("topic:mails", "handler:mails", "in"),
        Edge("handler:mails", "topic:orders", "sometimes"),
        Edge("topic:orders", "handler:orders", "in"),
        Edge("handler:orders", "topic:alerts", "sometimes", many=True),
        Edge("handler:orders", "topic:invoices", "always"),
        Edge("handler:orders", "topic:orders.dead", "dead letter"),
    )


def test_a_handler_says_where_it_is_and_how_it_fails() -> None:
    bill = flowmap.flow_map(shop()).nodes[-1]
    assert re.fullmatch(r"bill \(test_flowmap\.py:\d+\); group shop_orders; 3 attempts", bill.about)


def test_as_text() -> None:
    assert list(flowmap.text(shop())) == [
        "invoices => pack (inline)",
        "  - (nothing)",
        "mails => read (worker Huey)",
        "  - orders: (sometimes, exactly one)",
        "orders => bill (queue bills)",
        "  - alerts:      (sometimes, one or more)",
        "  - invoices:    (always, exactly one)",
        "  - orders.dead: (dead letters, after 3 attempts)",
    ]


def test_as_mermaid() -> None:
    lines = flowmap.mermaid(shop()).splitlines()
    assert lines[0] == "flowchart LR"
    assert '  n4(["orders.dead"]):::dead' in lines
    assert '  n5["pack<br/>inline"]:::inline' in lines
    assert '  n7[["bill<br/>queue bills"]]:::queued' in lines
    assert lines[9:16] == [
        "  n1 --> n5",
        "  n2 --> n6",
        '  n6 -. "sometimes, one" .-> n3',
        "  n3 --> n7",
        '  n7 -. "sometimes, many" .-> n0',
        '  n7 -- "always, one" --> n1',
        '  n7 -. "dead letter" .-> n4',
    ]


def odd() -> Flowkit:
    """Names that mean something to those who read the map."""
    app = make_app(inline=False)
    app.add_topic("end", print, inline=True, dead_letter="graph")
    app.add_topic("o--x", repr, queue='a "b" <c> #d & \\n {e}')
    return app


def test_mermaid_takes_no_name_for_its_own_words() -> None:
    text = flowmap.mermaid(odd())
    assert '(["end"])' in text
    assert "queue a #quot;b#quot; #lt;c#gt; #35;d #amp; \\n {e}" in text


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz (dot) is not installed")
@pytest.mark.parametrize("app", [shop(), odd(), make_app(), make_app_named("chain", 20)], ids=str)
def test_graphviz_reads_it(app: Flowkit) -> None:
    done = subprocess.run(["dot", "-Tplain"], input=flowmap.dot(app), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nnode ") == len(flowmap.flow_map(app).nodes)


def test_as_dot() -> None:
    assert flowmap.dot(shop()).startswith('digraph "shop" {\n')
    lines = flowmap.dot(shop()).splitlines()
    assert (
        '  "handler:orders" [label="bill\\nqueue bills", shape=box, fillcolor="#fdf0d5", color="#a5731a", peripheries=2];'
        in lines
    )
    assert '  "handler:orders" -> "topic:alerts" [style=dashed, label="sometimes, many"];' in lines
    assert r'label="repr\nqueue a \"b\" <c> #d & \\n {e}"' in flowmap.dot(odd())


# The drawing.


def drawn(app: Flowkit) -> ET.Element:
    return ET.fromstring(flowmap.svg(app))


def boxes(root: ET.Element) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of each node, by its name."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        rect = next(r for r in group.iter(f"{SVG}rect") if r.get("class") != "fk-sheet")
        name = group.findtext(f"{SVG}title", "").partition(";")[0]
        x, y, width, height = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
        found[name] = (x, y, x + width, y + height)
    return found


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_the_drawing_shows_every_name_and_where_handlers_run() -> None:
    root = drawn(shop())
    assert {"orders", "invoices", "alerts", "orders.dead", "bill", "queue bills", "pack", "inline"} <= set(
        texts(root)
    )
    kinds = [rect.get("class") for rect in root.iter(f"{SVG}rect")]
    assert kinds.count("fk-queued") == 2 + 1  # bill and read, and the one in the legend
    assert kinds.count("fk-sheet") == 2
    assert kinds.count("fk-dead") == 1 + 1


def test_lines_are_solid_dashed_and_dotted_and_say_how_many() -> None:
    root = drawn(shop())
    lines = [path.get("class") for path in root.iter(f"{SVG}path") if "fk-line" in path.get("class", "")]
    # each one once more in the legend
    assert lines.count("fk-line") == 3 + 1 + 1
    assert lines.count("fk-line fk-sometimes") == 2 + 1
    assert lines.count("fk-line fk-deadline") == 1 + 1
    assert texts(root).count("many") == 1
    assert texts(root).count("one") == 2


def test_messages_go_from_left_to_right() -> None:
    found = boxes(drawn(shop()))
    for left, right in [("mails", "read"), ("read", "orders"), ("orders", "bill"), ("bill", "invoices")]:
        assert found[left][2] < found[right][0]
    assert found["orders.dead"][0] == found["invoices"][0]


def test_a_circle_is_drawn_with_a_way_back() -> None:
    app = make_app()

    @app.topic("jobs")
    @app.responds_to("jobs", required=False)
    @app.responds_to("results")
    def work(job: Any) -> None: ...

    @app.topic("results")
    @app.responds_to("jobs", multiple_usage=True)
    def judge(result: Any) -> None: ...

    root = drawn(app)
    found = boxes(root)
    assert len(found) == 4
    bottom = max(box[3] for box in found.values())
    backward = [path for path in root.iter(f"{SVG}path") if "V" in path.get("d", "")]
    assert len(backward) == 2
    for path in backward:
        lowest = max(float(y) for y in re.findall(r"V([\d.]+)", path.get("d", "")))
        assert lowest > bottom  # below all nodes
    assert texts(root).count("many") == 1


@pytest.mark.parametrize(
    "app", [shop(), odd(), make_app(), make_app_named("one", 1), make_app_named("forty", 40)], ids=str
)
def test_nothing_overlaps_and_everything_is_within_the_picture(app: Flowkit) -> None:
    root = drawn(app)
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    found = list(boxes(root).items())
    assert len(found) == len(flowmap.flow_map(app).nodes)
    for number, (name, (left, top, right, bottom)) in enumerate(found):
        assert 0 <= left < right <= width, name
        assert 0 <= top < bottom <= height, name
        for other, (l2, t2, r2, b2) in found[number + 1 :]:
            assert right < l2 or r2 < left or bottom < t2 or b2 < top, f"{name} and {other}"


def test_where_many_handlers_share_their_dead_letters_they_name_them_instead_of_having_lines() -> None:
    few, many = drawn(make_app_named("few", MANY_DEAD)), drawn(make_app_named("many", MANY_DEAD + 1))
    assert "dead letters to dead" not in texts(few)
    assert texts(many).count("dead letters to dead") == MANY_DEAD + 1
    assert "dead" in boxes(many)


def test_a_long_name_is_cut_in_the_middle_and_whole_in_the_tooltip() -> None:
    app = make_app()
    name = "a-very-long-name.of-a-topic.that-nobody-would-like-to-type.v2"
    app.add_topic(name, print)
    root = drawn(app)
    assert name not in texts(root)
    assert any(text.startswith("a-very-long-name.") and text.endswith("type.v2") for text in texts(root))
    assert name in boxes(root)


def test_a_drawing_needs_nothing_else_and_is_light_or_dark_as_its_viewer() -> None:
    text = flowmap.svg(shop())
    assert "prefers-color-scheme:dark" in text
    assert "<script" not in text
    assert re.findall(r"(?:href|src|url)\s*[=(]", text) == []
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


def test_an_application_without_topics_says_so() -> None:
    assert "No topics yet" in texts(drawn(make_app()))


def test_as_data() -> None:
    assert flowmap.rows(shop())[1] == {
        "topic": "mails",
        "handler": "read",
        "runs": "worker",
        "queue": None,
        "responses": [{"topic": "orders", "required": False, "multiple_usage": False}],
        "retry_topics": [],
        "dead_letter": None,
    }


def test_where_a_handler_runs_and_how() -> None:
    app = make_app()
    app.add_topic("a", lambda value: None)
    app.add_topic("b", lambda values: None, batch=True)
    app.add_topic("c", lambda value: None, concurrency=20, transactional=True)
    assert [flowmap.runs(app.handling(topic)) for topic in "abc"] == [
        "inline",
        "inline, batches",
        "inline, transactional, 20 at once",
    ]


def test_a_handler_is_queued_unless_it_is_inline() -> None:
    assert not Node("n", "handler", "f", "inline").queued
    assert not Node("n", "handler", "f", "inline, transactional").queued
    assert Node("n", "handler", "f", "worker Huey").queued
    assert not Node("n", "topic", "t").queued
