"""The map of an application: topics in, the handlers they come to, topics out; as text, Mermaid, DOT and SVG.

A solid line is a response that every call sends, a dashed one may be sent, a dotted one leads to the dead letters.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .signature import name_of

if TYPE_CHECKING:
    from .app import Flowkit
    from .dispatch import Handling
    from .route import Declaration, Route

When = Literal["in", "always", "sometimes", "dead letter"]


@dataclass(frozen=True, slots=True)
class Node:
    """A topic, or a handler with where it runs: ``inline``, ``queue default``, ``worker Huey``."""

    id: str
    kind: Literal["topic", "handler"]
    name: str
    runs: str = ""
    about: str = ""
    dead_letters: bool = False

    @property
    def queued(self) -> bool:
        return self.kind == "handler" and not self.runs.startswith("inline")


@dataclass(frozen=True, slots=True)
class Edge:
    """A way that messages go. ``many``: one call may send several."""

    source: str
    target: str
    when: When
    many: bool = False

    @property
    def how_many(self) -> str:
        return "many" if self.many else "one"


@dataclass(frozen=True, slots=True)
class FlowMap:
    """What leads where in an application."""

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def runs(handling: Handling) -> str:
    """Where the handler of a route runs."""
    if handling.inline:
        more = {
            "transactional": handling.transactional,
            "batches": handling.max_batch > 1,
            f"{handling.concurrency} at once": handling.concurrency > 1,
        }
        return ", ".join(["inline", *(name for name, so in more.items() if so)])
    return f"worker {name_of(handling.worker)}" if handling.worker else f"queue {queue_name(handling)}"


def queue_name(handling: Handling) -> str:
    """The queue of a route; of an ordered one those of its shards, in one word."""
    first, *others = handling.shards or (handling.queue,)
    return f"{first}..{len(others)}" if others else first


def flow_map(app: Flowkit) -> FlowMap:
    """The map of an application, topics in the order of their names."""
    handlings = sorted(app.handlings.items())
    dead = {handling.dead_letter for _, handling in handlings if handling.dead_letter}
    topics: dict[str, None] = {}
    handlers: list[Node] = []
    edges: list[Edge] = []
    for topic, handling in handlings:
        handler = f"handler:{topic}"
        about = f"{_where(handling.route)}; group {handling.group}; {_attempts(handling)}"
        if handling.retry_topics:
            about += f", between them in {', '.join(waiting for waiting, _ in handling.retry_topics)}"
        handlers.append(Node(handler, "handler", handling.route.name, runs(handling), about))
        topics[topic] = None
        edges.append(Edge(f"topic:{topic}", handler, "in"))
        for declared in _responses(handling):
            topics[declared.topic] = None
            when: When = "always" if declared.required else "sometimes"
            edges.append(Edge(handler, f"topic:{declared.topic}", when, declared.multiple_usage))
        if handling.dead_letter:
            topics[handling.dead_letter] = None
            edges.append(Edge(handler, f"topic:{handling.dead_letter}", "dead letter"))
    nodes = [Node(f"topic:{topic}", "topic", topic, dead_letters=topic in dead) for topic in sorted(topics)]
    return FlowMap(app.settings.name, (*nodes, *handlers), tuple(edges))


def _where(route: Route) -> str:
    """The handler with the file it is in; not the whole path, which is nobody's business who sees the map."""
    code = getattr(inspect.unwrap(route.handler), "__code__", None)
    return f"{route.name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})" if code else route.name


def rows(app: Flowkit) -> list[dict[str, Any]]:
    """The map as data: a row for each route."""
    return [
        {
            "topic": topic,
            "handler": handling.route.name,
            "runs": "inline" if handling.inline else "worker" if handling.worker else "queue",
            "queue": None if handling.inline or handling.worker else queue_name(handling),
            "responses": [
                {"topic": d.topic, "required": d.required, "multiple_usage": d.multiple_usage}
                for d in _responses(handling)
            ],
            "retry_topics": [waiting for waiting, _ in handling.retry_topics],
            "dead_letter": handling.dead_letter,
        }
        for topic, handling in sorted(app.handlings.items())
    ]


def leads_to(handling: Handling) -> list[tuple[str, str]]:
    """Each topic that a route sends to, and when and how often, in words."""
    found = [(d.topic, f"{d.when}, {d.how_many}") for d in _responses(handling)]
    found += [(waiting, f"failed ones, for {wait:g} s") for waiting, wait in handling.retry_topics]
    if handling.dead_letter:
        found.append((handling.dead_letter, f"dead letters, after {_attempts(handling)}"))
    return found


def _responses(handling: Handling) -> list[Declaration]:
    return sorted(handling.all_declarations.values(), key=lambda declared: declared.topic)


def _attempts(handling: Handling) -> str:
    attempts = handling.retry.attempts
    return f"{attempts} attempt{'' if attempts == 1 else 's'}"


def text(app: Flowkit) -> Iterator[str]:
    """The map line by line, for a terminal."""
    for topic, handling in sorted(app.handlings.items()):
        yield f"{topic} => {handling.route.name} ({runs(handling)})"
        out = leads_to(handling)
        width = max((len(name) for name, _ in out), default=0) + 1
        yield from (f"  - {name + ':':<{width}} ({how})" for name, how in out)
        if not out:
            yield "  - (nothing)"


def mermaid(app: Flowkit) -> str:
    """The map as a Mermaid flowchart, for Markdown on GitHub, GitLab and in mkdocs."""
    found = flow_map(app)
    ids = {node.id: f"n{number}" for number, node in enumerate(found.nodes)}
    lines = ["flowchart LR"]
    for node in found.nodes:
        label = _mermaid_text(node.name)
        if node.kind == "topic":
            lines.append(f'  {ids[node.id]}(["{label}"]):::{"dead" if node.dead_letters else "topic"}')
        else:
            shape = ('[["', '"]]') if node.queued else ('["', '"]')
            label = f"{label}<br/>{_mermaid_text(node.runs)}"
            lines.append(f"  {ids[node.id]}{shape[0]}{label}{shape[1]}:::{'queued' if node.queued else 'inline'}")
    for edge in found.edges:
        source, target = ids[edge.source], ids[edge.target]
        if edge.when == "in":
            lines.append(f"  {source} --> {target}")
        elif edge.when == "dead letter":
            lines.append(f'  {source} -. "dead letter" .-> {target}')
        else:
            label = f'"{edge.when}, {edge.how_many}"'
            arrow = f"-- {label} -->" if edge.when == "always" else f"-. {label} .->"
            lines.append(f"  {source} {arrow} {target}")
    lines += [
        "  classDef topic fill:#e3edff,stroke:#3d68b8,color:#14264a",
        "  classDef dead fill:#fde4e4,stroke:#b3403c,color:#521513",
        "  classDef inline fill:#e2f3e6,stroke:#35824a,color:#123a1d",
        "  classDef queued fill:#fdf0d5,stroke:#a5731a,color:#4a3206",
    ]
    return "\n".join(lines) + "\n"


def _mermaid_text(name: str) -> str:
    """Mermaid reads HTML in its labels and knows entities by ``#``."""
    for character, entity in (("#", "#35;"), ("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        name = name.replace(character, entity)
    return name


def dot(app: Flowkit) -> str:
    """The map for Graphviz: ``flowkit flow shop:app --format dot | dot -Tpng``."""
    found = flow_map(app)
    lines = [
        f"digraph {_dot(found.name)} {{",
        "  rankdir=LR; bgcolor=transparent;",
        '  node [fontname="sans-serif", fontsize=11, style=filled]; edge [fontname="sans-serif", fontsize=9];',
    ]
    for node in found.nodes:
        if node.kind == "topic":
            fill, line = ("#fde4e4", "#b3403c") if node.dead_letters else ("#e3edff", "#3d68b8")
            shape, label = "cds", node.name
        else:
            fill, line = ("#fdf0d5", "#a5731a") if node.queued else ("#e2f3e6", "#35824a")
            shape, label = "box", f"{node.name}\n{node.runs}"
        sheets = ", peripheries=2" if node.queued else ""
        lines.append(
            f'  {_dot(node.id)} [label={_dot(label)}, shape={shape}, fillcolor="{fill}", color="{line}"{sheets}];'
        )
    for edge in found.edges:
        style, label = "solid", ""
        if edge.when == "dead letter":
            style, label = 'dotted, color="#b3403c"', "dead letter"
        elif edge.when != "in":
            style, label = "solid" if edge.when == "always" else "dashed", f"{edge.when}, {edge.how_many}"
        named = f", label={_dot(label)}" if label else ""
        lines.append(f"  {_dot(edge.source)} -> {_dot(edge.target)} [style={style}{named}];")
    return "\n".join([*lines, "}"]) + "\n"


def _dot(value: str) -> str:
    """A quoted string of the DOT language, in which a line break is written as one."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def svg(app: Flowkit) -> str:
    """The map as a picture of its own: no script, no font, nothing loaded from elsewhere. Light and dark as its viewer is."""
    from .flowdrawing import draw

    return draw(flow_map(app))
