"""Drawing a flow map as SVG: layers from left to right, few crossings, ways back below.

The steps are those of Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of Hierarchical System Structures" (1981):
turn back edges around, put each node into a layer, order the layers by barycentres, then place what is ordered.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from .flowmap import Edge, FlowMap, Node

CHARACTER = 7.3
"""Width of a character of the 12 px monospace font, in pixels; a little more than that of any usual font."""
SMALL_CHARACTER = 6.2
"""The same for the 11 px text."""
LONGEST = 38
"""Characters of a name that are shown; the whole one is in the tooltip."""
TOPIC_HEIGHT, HANDLER_HEIGHT = 32.0, 46.0
LINE = 14.0
PADDING = 15.0
GAP = 16.0
"""Between nodes of a layer, and between the parts of a map that no line connects."""
GUTTER = 92.0
"""Between layers, where the lines run."""
LANE = 13.0
"""Between the ways back that run below."""
MARGIN = 24.0
LEGEND = 54.0
SWEEPS = 12
DEAD = "dead letters to "
MANY_DEAD = 3
"""So many handlers have lines to the topic of their dead letters; where there are more, each of them names it instead."""

STYLE = """
.fk-ground{fill:#fff}
.fk-name{font:600 12px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}.fk-name{fill:#16202e}
.fk-runs,.fk-many,.fk-key{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#4d5a6b}
.fk-many{font-size:10px;text-anchor:middle;paint-order:stroke;stroke:#fff;stroke-width:4px;stroke-linejoin:round}
.fk-topic{fill:#e6eefc;stroke:#4a73bd}.fk-dead{fill:#fce5e4;stroke:#b9504b}.fk-inline{fill:#e3f3e7;stroke:#3f8a55}
.fk-queued{fill:#fcf0d8;stroke:#ad7c22}.fk-sheet{fill:#f6e2b8;stroke:#ad7c22}
.fk-line{fill:none;stroke:#6b7889;stroke-width:1.4}.fk-sometimes{stroke-dasharray:6 4}
.fk-deadline{stroke:#b9504b;stroke-dasharray:1.5 4;stroke-linecap:round;stroke-width:1.8}
.fk-tip{fill:#6b7889}.fk-deadtip,.fk-deadname{fill:#b9504b}
@media (prefers-color-scheme:dark){
.fk-ground{fill:#12171f}.fk-name{fill:#eef2f7}.fk-runs,.fk-many,.fk-key{fill:#a9b5c4}.fk-many{stroke:#12171f}
.fk-topic{fill:#1d2c47;stroke:#7ea3e6}.fk-dead{fill:#44211f;stroke:#e28a85}.fk-inline{fill:#1b3523;stroke:#74bf8a}
.fk-queued{fill:#3b2f16;stroke:#dbb05c}.fk-sheet{fill:#2b2210;stroke:#dbb05c}
.fk-line{stroke:#94a2b5}.fk-deadline{stroke:#e28a85}.fk-tip{fill:#94a2b5}.fk-deadtip,.fk-deadname{fill:#e28a85}
}
""".strip()


@dataclass(slots=True)
class Box:
    """A node with its place (``x`` is its left, ``y`` its middle); without a node, where a line passes through a layer."""

    id: str
    node: Node | None
    width: float = 0.0
    height: float = 0.0
    layer: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def right(self) -> float:
        return self.x + self.width


@dataclass(slots=True)
class Part:
    """Nodes that lines connect, in layers, and the lines: forward ones as the boxes they pass, and those that go back."""

    layers: list[list[Box]]
    ways: dict[Edge, list[Box]]
    backward: list[Edge]
    boxes: dict[str, Box]
    links: list[tuple[Box, Box]] = field(default_factory=list)


def draw(found: FlowMap) -> str:
    """The SVG text."""
    if not found.nodes:
        return _document(found, 320.0, 80.0, ['<text class="fk-runs" x="24" y="44">No topics yet</text>'])
    found, dead_of = _without_crowds(found)
    parts = [_layered(nodes, edges, dead_of) for nodes, edges in _parts(found)]
    columns = _columns(parts, MARGIN + (GUTTER / 4 if any(part.backward for part in parts) else 0))
    shapes: list[str] = []
    lines: list[str] = []
    bottom = MARGIN
    right = 0.0
    for part in parts:
        _place(part)
        top = min(box.y - box.height / 2 for layer in part.layers for box in layer)
        for layer in part.layers:
            for box in layer:
                box.y += bottom - top
                box.x, room = columns[box.layer]
                if box.node is None:
                    box.width = room  # a line passes its column straight
                right = max(right, box.right)
        lowest = max(box.y + box.height / 2 for layer in part.layers for box in layer)
        lines += _lines(part, lowest)
        shapes += [_shape(box, dead_of.get(box.id)) for box in part.boxes.values()]
        bottom = lowest + GAP + (LANE * len(part.backward) + GAP if part.backward else 0)
    legend, least = _legend(found, bottom - GAP + LEGEND - 22)
    width = max(right + MARGIN + (GUTTER / 4 if any(part.backward for part in parts) else 0), least)
    return _document(found, width, bottom - GAP + LEGEND, [*lines, *shapes, legend])


def _without_crowds(found: FlowMap) -> tuple[FlowMap, dict[str, str]]:
    """The map without the lines of many handlers to one topic of dead letters, and that topic by the id of each handler."""
    handlers: dict[str, list[Edge]] = defaultdict(list)
    for edge in found.edges:
        if edge.when == "dead letter":
            handlers[edge.target].append(edge)
    crowds = {edge for edges in handlers.values() if len(edges) > MANY_DEAD for edge in edges}
    names = {node.id: node.name for node in found.nodes}
    edges = tuple(edge for edge in found.edges if edge not in crowds)
    return FlowMap(found.name, found.nodes, edges), {edge.source: names[edge.target] for edge in crowds}


# Layers.


def _parts(found: FlowMap) -> Iterable[tuple[list[Node], list[Edge]]]:
    """The map in parts that no line connects."""
    near: dict[str, set[str]] = defaultdict(set)
    for edge in found.edges:
        near[edge.source].add(edge.target)
        near[edge.target].add(edge.source)
    part_of: dict[str, int] = {}
    count = 0
    for node in found.nodes:
        if node.id in part_of:
            continue
        waiting = [node.id]
        while waiting:
            here = waiting.pop()
            if here not in part_of:
                part_of[here] = count
                waiting += near[here]
        count += 1
    for number in range(count):
        yield (
            [node for node in found.nodes if part_of[node.id] == number],
            [edge for edge in found.edges if part_of[edge.source] == number],
        )


def _layered(nodes: Sequence[Node], edges: Sequence[Edge], dead_of: Mapping[str, str]) -> Part:
    boxes = {node.id: Box(node.id, node, *_size(node, dead_of.get(node.id))) for node in nodes}
    backward = _backward(nodes, edges)
    forward = [edge for edge in edges if edge not in backward]
    _assign_layers(boxes, forward)
    layers: list[list[Box]] = [[] for _ in range(max(box.layer for box in boxes.values()) + 1)]
    for box in boxes.values():
        layers[box.layer].append(box)
    part = Part(layers, {}, backward, boxes)
    for edge in forward:
        source, target = boxes[edge.source], boxes[edge.target]
        way = [source]
        for layer in range(source.layer + 1, target.layer):
            bend = Box(f"{edge.source}>{edge.target}@{layer}", None, layer=layer)
            layers[layer].append(bend)
            way.append(bend)
        way.append(target)
        part.ways[edge] = way
        part.links += itertools.pairwise(way)
    _order(part)
    return part


def _size(node: Node, dead: str | None) -> tuple[float, float]:
    name = len(_shown(node.name)) * CHARACTER
    if node.kind == "topic":
        return name + 2 * PADDING + 4, TOPIC_HEIGHT
    small = max(len(_shown(node.runs)), len(DEAD) + len(_shown(dead)) if dead else 0) * SMALL_CHARACTER
    return max(name, small) + 2 * PADDING, HANDLER_HEIGHT + (LINE if dead else 0)


def _backward(nodes: Sequence[Node], edges: Sequence[Edge]) -> list[Edge]:
    """The edges that close a circle: those that lead to a node which is still being visited."""
    out: dict[str, list[Edge]] = defaultdict(list)
    into: dict[str, int] = defaultdict(int)
    for edge in edges:
        out[edge.source].append(edge)
        into[edge.target] += 1
    found: list[Edge] = []
    state: dict[str, str] = {}
    for start in sorted(
        nodes, key=lambda node: into[node.id] > 0
    ):  # from where messages only come from outside, first
        if start.id in state:
            continue
        state[start.id] = "open"
        stack = [(start.id, iter(out[start.id]))]
        while stack:
            here, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[here] = "done"
                stack.pop()
            elif state.get(following.target) == "open":
                found.append(following)
            elif following.target not in state:
                state[following.target] = "open"
                stack.append((following.target, iter(out[following.target])))
    return found


def _assign_layers(boxes: dict[str, Box], forward: Sequence[Edge]) -> None:
    """Each node as far left as what leads to it allows; a topic that nothing leads to, next to its first handler."""
    changed = True
    while changed:
        changed = False
        for edge in forward:
            source, target = boxes[edge.source], boxes[edge.target]
            if target.layer <= source.layer:
                target.layer = source.layer + 1
                changed = True
    reached = {edge.target for edge in forward}
    for box in boxes.values():
        if box.id not in reached:
            box.layer = max(0, min((boxes[e.target].layer for e in forward if e.source == box.id), default=1) - 1)


def _order(part: Part) -> None:
    """Orders each layer by where its neighbours are, to and fro; keeps the order that crosses least."""
    left: dict[str, list[Box]] = defaultdict(list)
    right: dict[str, list[Box]] = defaultdict(list)
    for source, target in part.links:
        right[source.id].append(target)
        left[target.id].append(source)
    best = [list(layer) for layer in part.layers]
    fewest = _crossings(part, best)
    at = {box.id: number for layer in part.layers for number, box in enumerate(layer)}
    for sweep in range(SWEEPS):
        near, order = (left, part.layers[1:]) if sweep % 2 == 0 else (right, part.layers[-2::-1])
        for layer in order:
            middle = {
                box.id: sum(at[other.id] for other in near[box.id]) / len(near[box.id])
                if near[box.id]
                else at[box.id]
                for box in layer
            }
            layer.sort(key=lambda box: middle[box.id])
            at.update((box.id, number) for number, box in enumerate(layer))
        crossings = _crossings(part, part.layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in part.layers], crossings
    part.layers[:] = best


def _crossings(part: Part, layers: Sequence[Sequence[Box]]) -> int:
    at = {box.id: number for layer in layers for number, box in enumerate(layer)}
    between: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for source, target in part.links:
        between[source.layer].append((at[source.id], at[target.id]))
    crossings = 0
    for links in between.values():
        ends: list[int] = []
        for _, end in sorted(links):  # one crosses those that begin above it and end below it
            crossings += len(ends) - bisect.bisect_right(ends, end)
            bisect.insort(ends, end)
    return crossings


# Places.


def _columns(parts: Sequence[Part], x: float) -> list[tuple[float, float]]:
    """Left edge and width of each layer, the same in every part."""
    count = max(len(part.layers) for part in parts)
    widths = [0.0] * count
    for part in parts:
        for box in part.boxes.values():
            widths[box.layer] = max(widths[box.layer], box.width)
    places = []
    for width in widths:
        places.append((x, width))
        x += width + GUTTER
    return places


def _place(part: Part) -> None:
    """Gives each box the height of its neighbours, as far as the order and the gaps allow."""
    for layer in part.layers:
        y = 0.0
        for box in layer:
            box.y = y + box.height / 2
            y += box.height + GAP
    left: dict[str, list[Box]] = defaultdict(list)
    right: dict[str, list[Box]] = defaultdict(list)
    for source, target in part.links:
        right[source.id].append(target)
        left[target.id].append(source)
    for sweep in range(SWEEPS):
        near, order = (left, part.layers[1:]) if sweep % 2 == 0 else (right, part.layers[-2::-1])
        for layer in order:
            wish = [_middle(near[box.id], box.y) for box in layer]
            for box, y in zip(layer, _apart(layer, wish), strict=True):
                box.y = y


def _middle(near: Sequence[Box], otherwise: float) -> float:
    if not near:
        return otherwise
    found = sorted(box.y for box in near)
    return (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2


def _apart(layer: Sequence[Box], wish: Sequence[float]) -> list[float]:
    """The heights closest to those wished for (by squares) that keep the order and the gaps: boxes that would overlap form
    a block around the mean of their wishes."""
    offsets = [0.0]
    for above, below in itertools.pairwise(layer):
        offsets.append(offsets[-1] + (above.height + below.height) / 2 + GAP)
    blocks: list[tuple[float, int]] = []  # mean of wish minus offset, and number of boxes
    for y, offset in zip(wish, offsets, strict=True):
        mean, count = y - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean = (mean * count + before * number) / (count + number)
            count += number
        blocks.append((mean, count))
    found = [mean for mean, count in blocks for _ in range(count)]
    return [mean + offset for mean, offset in zip(found, offsets, strict=True)]


# Lines and shapes.


def _lines(part: Part, lowest: float) -> list[str]:
    ports = _ports(part)
    ends = Counter(edge.target for edge in part.ways)
    begins = Counter(edge.source for edge in part.ways)
    found = []
    for edge, way in part.ways.items():
        x, y = way[0].right, way[0].y + ports[edge, "out"]
        path = f"M{x:.1f} {y:.1f}"
        for box in way[1:]:
            to_y = box.y + (ports[edge, "in"] if box is way[-1] else 0.0)
            to_x = box.x - (7 if box is way[-1] else 0)
            bend = (to_x - x) / 2
            path += f"C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
            x, y = to_x, to_y
            if box.node is None:
                x = box.right
                path += f"H{x:.1f}"
        found.append(_line(edge, path, (x, y)))
        if edge.when in ("always", "sometimes"):
            found.append(_how_many(edge, way, ports, ends[edge.target] > begins[edge.source]))
    for number, edge in enumerate(part.backward):
        source, target = part.boxes[edge.source], part.boxes[edge.target]
        lane = lowest + GAP + number * LANE
        start, end = source.right + 14 + number % 4 * 5, target.x - 16 - number % 4 * 5
        y, to_y = source.y + source.height / 4, target.y + target.height / 4
        path = (
            f"M{source.right:.1f} {y:.1f}H{start - 6:.1f}q6 0 6 6V{lane - 6:.1f}q0 6 -6 6"
            f"H{end + 6:.1f}q-6 0 -6 -6V{to_y + 6:.1f}q0 -6 6 -6H{target.x - 7:.1f}"
        )
        found.append(_line(edge, path, (target.x - 7, to_y)))
        if edge.when in ("always", "sometimes"):
            found.append(f'<text class="fk-many" x="{start - 22:.1f}" y="{lane + 3:.1f}">{edge.how_many}</text>')
    return found


def _ports(part: Part) -> dict[tuple[Edge, str], float]:
    """Where on the side of its box each line begins and ends, from the middle: in the order of their other ends."""
    sides: dict[tuple[str, str], list[tuple[float, Edge]]] = defaultdict(list)
    for edge, way in part.ways.items():
        sides[edge.source, "out"].append((way[1].y, edge))
        sides[edge.target, "in"].append((way[-2].y, edge))
    found: dict[tuple[Edge, str], float] = {}
    for (name, side), lines in sides.items():
        lines.sort(key=lambda line: line[0])
        step = min(9.0, (part.boxes[name].height - 16) / max(1, len(lines) - 1))
        for number, (_, edge) in enumerate(lines):
            found[edge, side] = (number - (len(lines) - 1) / 2) * step
    return found


def _line(edge: Edge, path: str, tip: tuple[float, float]) -> str:
    kind = {"sometimes": " fk-sometimes", "dead letter": " fk-deadline"}.get(edge.when, "")
    x, y = tip
    arrow = f"M{x + 7:.1f} {y:.1f}l-8.5 -4v8z"
    head = "fk-deadtip" if edge.when == "dead letter" else "fk-tip"
    return f'<path class="fk-line{kind}" d="{path}"/><path class="{head}" d="{arrow}"/>'


def _how_many(edge: Edge, way: Sequence[Box], ports: dict[tuple[Edge, str], float], crowded: bool) -> str:
    """Near the end of the line; where others end as well, near its beginning."""
    first, then, share = (way[0], way[1], 0.4) if crowded else (way[-2], way[-1], 0.62)
    from_y = first.y + (ports[edge, "out"] if first is way[0] else 0.0)
    to_y = then.y + (ports[edge, "in"] if then is way[-1] else 0.0)
    x = first.right + (then.x - first.right) * share
    smooth = share * share * (3 - 2 * share)  # close to the height of the curve there
    return (
        f'<text class="fk-many" x="{x:.1f}" y="{from_y + (to_y - from_y) * smooth + 3.5:.1f}">{edge.how_many}</text>'
    )


def _shape(box: Box, dead: str | None) -> str:
    node = box.node
    assert node is not None
    top, middle = box.y - box.height / 2, box.x + box.width / 2

    def text(kind: str, y: float, words: str) -> str:
        return f'<text class="{kind}" x="{middle:.1f}" y="{y:.1f}" text-anchor="middle">{escape(words)}</text>'

    def sheet(kind: str, away: float, corner: int) -> str:
        return (
            f'<rect class="{kind}" x="{box.x + away:.1f}" y="{top + away:.1f}" width="{box.width:.1f}"'
            f' height="{box.height:.1f}" rx="{corner}"/>'
        )

    title = f"<title>{escape(f'{node.name}; {node.about}' if node.about else node.name)}</title>"
    if node.kind == "topic":
        kind = "fk-dead" if node.dead_letters else "fk-topic"
        return f"<g>{title}{sheet(kind, 0, 16)}{text('fk-name', box.y + 4, _shown(node.name))}</g>"
    behind = sheet("fk-sheet", 4, 5) if node.queued else ""  # its messages lie on a pile first
    body = sheet("fk-queued" if node.queued else "fk-inline", 0, 5)
    words = text("fk-name", top + 20, _shown(node.name)) + text("fk-runs", top + 37, _shown(node.runs))
    if dead:
        words += text("fk-runs fk-deadname", top + 37 + LINE, DEAD + _shown(dead))
    return f"<g>{title}{behind}{body}{words}</g>"


def _shown(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-(LONGEST // 2 - 1) :]}"


def _legend(found: FlowMap, y: float) -> tuple[str, float]:
    """What the shapes and lines of this map mean, and the width that takes."""
    topics = [node for node in found.nodes if node.kind == "topic"]
    handlers = [node for node in found.nodes if node.kind == "handler"]
    ways = {edge.when for edge in found.edges}
    items = [
        ("fk-topic", "topic", any(not node.dead_letters for node in topics)),
        ("fk-inline", "runs inline", any(not node.queued for node in handlers)),
        ("fk-queued", "queued", any(node.queued for node in handlers)),
        ("fk-dead", "dead letters", any(node.dead_letters for node in topics)),
        ("fk-line", "always", "always" in ways),
        ("fk-line fk-sometimes", "sometimes", "sometimes" in ways),
        ("fk-line fk-deadline", "when every attempt failed", "dead letter" in ways),
    ]
    shapes = []
    x = MARGIN
    for kind, label, shown in items:
        if not shown:
            continue
        if kind.startswith("fk-line"):
            shapes.append(f'<path class="{kind}" d="M{x:.1f} {y - 4:.1f}h26"/>')
            x += 32
        else:
            corner = 6 if kind in ("fk-topic", "fk-dead") else 3
            shapes.append(f'<rect class="{kind}" x="{x:.1f}" y="{y - 10:.1f}" width="18" height="12" rx="{corner}"/>')
            x += 24
        shapes.append(f'<text class="fk-key" x="{x:.1f}" y="{y:.1f}">{label}</text>')
        x += len(label) * SMALL_CHARACTER + 18
    return "".join(shapes), x + MARGIN - 18


def _document(found: FlowMap, width: float, height: float, inside: Sequence[str]) -> str:
    label = escape(f"Flow of messages in {found.name}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fk-map" role="img" aria-label="{label}"'
        f' width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="fk-ground" width="100%" height="100%"/>\n' + "\n".join(inside) + "\n</svg>\n"
    )
