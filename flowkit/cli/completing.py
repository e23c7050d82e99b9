"""What a shell may complete: applications in the working directory, and the topics, groups and queues they name.

The files are read, never run: completing must be quick, and nobody expects that pressing a key starts their program.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BASH = "_FLOWKIT_COMPLETE", "complete_bash"
"""The environment variable by which bash asks for completions, and its value."""

APPLICATION = re.compile(r"^([A-Za-z_]\w*)\s*(?::\s*\w+\s*)?=\s*(?:\w+\.)?Flowkit\(", re.MULTILINE)
MOST_FILES = 500
LARGEST = 500_000
"""Bytes of a file that is looked into."""
SKIPPED = {"node_modules", "site-packages", "tests", "test", "build", "dist", "venv"}
FIRST_IS_TOPIC = {"topic", "add_topic", "responds_to", "declare_topic"}


@contextlib.contextmanager
def words_with_colons() -> Iterator[None]:
    """Bash splits words at colons, so that ``shop:app`` comes as three: puts them together before they are looked at, and
    gives bash only what comes behind the last colon, which it takes for the word. Where bash was told not to split, the words
    come whole and stay so.
    """
    if os.environ.get(BASH[0]) != BASH[1]:
        yield
        return
    words, current = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0"))
    joined: list[str] = []
    at = 0
    for number, word in enumerate(words):
        if number > 1 and (word == ":" or joined[-1].endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
        if number == current:
            at = len(joined) - 1
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(joined), str(at)
    before, colon, _ = ("", "", "") if joined[at] == words[current] else joined[at].rpartition(":")
    stdout = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()) as found:
        try:
            yield
        finally:
            for line in found.getvalue().splitlines():
                print(line.removeprefix(before + colon), file=stdout)


def applications(incomplete: str) -> list[str]:
    """``module:attribute`` of every application in the working directory and the folders right below it."""
    found = []
    for module, path in _modules():
        text = _read(path)
        found += [f"{module}:{name}" for name in APPLICATION.findall(text)]
    return [name for name in sorted(found) if name.startswith(incomplete)]


def topics(incomplete: str) -> list[str]:
    """Topics of routes, in an option that takes several with commas."""
    return _last_of_several(incomplete, _names(_application())["route"])


def groups(incomplete: str) -> list[str]:
    """Groups, in an option that takes several with commas."""
    return _last_of_several(incomplete, _names(_application())["group"])


def queues(incomplete: str) -> list[str]:
    """Queues, in an option that takes several with commas."""
    return _last_of_several(incomplete, _names(_application())["queue"])


def application_or_topic(ctx: Any, incomplete: str) -> list[str]:
    """What comes next in ``flowkit send``: the application, then a topic; the topic at once where FLOWKIT_APP is set."""
    given = [str(word) for word in ctx.params.get("arguments") or ()]
    if not given and not os.environ.get("FLOWKIT_APP"):
        return applications(incomplete)
    reference = given[0] if given else os.environ["FLOWKIT_APP"]
    return [topic for topic in _names(reference)["topic"] if topic.startswith(incomplete)] if len(given) < 2 else []


def _application() -> str:
    """The application on the line so far: a word that leads to a file of Python; else that of FLOWKIT_APP."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        words = line.split("\n") if "COMP_WORDS" in os.environ else shlex.split(line)
    except ValueError:  # a quote is still open
        words = line.split()
    return next((word for word in words[2:] if _file(word)), os.environ.get("FLOWKIT_APP", ""))


def _last_of_several(incomplete: str, names: list[str]) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    taken = set(before.split(","))
    return [f"{before}{comma}{name}" for name in names if name.startswith(last) and name not in taken]


def _modules() -> Iterator[tuple[str, Path]]:
    here = Path()
    count = 0
    for folder in [here, *sorted(path for path in here.iterdir() if path.is_dir())]:
        if folder is not here and (folder.name in SKIPPED or not folder.name.isidentifier()):
            continue
        for path in sorted(folder.glob("*.py")):
            if not (path.stem.isidentifier() and path.is_file()):
                continue
            count += 1
            if count > MOST_FILES:
                return
            yield ".".join([*path.parts[:-1], path.stem]).removesuffix(".__init__"), path


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace") if path.stat().st_size <= LARGEST else ""
    except OSError:
        return ""


def _file(reference: str) -> Path | None:
    """The file of an application in the working directory."""
    module = reference.partition(":")[0].removesuffix(".py").replace("/", ".").lstrip(".")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", module):
        return None
    for path in (Path(*module.split(".")).with_suffix(".py"), Path(*module.split("."), "__init__.py")):
        if path.is_file():
            return path
    return None


def _names(reference: str) -> dict[str, list[str]]:
    """The topics, groups and queues that the file of an application names as texts."""
    import ast

    found: dict[str, set[str]] = {"topic": set(), "route": set(), "group": set(), "queue": set()}
    path = _file(reference)
    try:
        tree = ast.parse(_read(path) if path else "")
    except SyntaxError:
        return {kind: [] for kind in found}

    def text(node: ast.expr | None) -> str | None:
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    application = next((text(call.args[0]) for call in calls if _called(call.func) == "Flowkit" and call.args), None)
    for call in calls:
        called = _called(call.func)
        options = {keyword.arg: text(keyword.value) for keyword in call.keywords}
        first = text(call.args[0]) if call.args else None
        second = text(call.args[1]) if len(call.args) > 1 else None
        if called in FIRST_IS_TOPIC and first:
            found["topic"].add(first)
        if called == "add_response" and second:
            found["topic"].add(second)
        if called in ("topic", "add_topic"):
            group = options.get("group") or (f"{application}_{first}" if application and first else None)
            dead_letter, queue = options.get("dead_letter"), options.get("queue")
            for kind, name in (("route", first), ("topic", dead_letter), ("group", group), ("queue", queue)):
                if name and "{" not in name:
                    found[kind].add(name)
            if "queue" not in options and not any(k.arg in ("inline", "worker") for k in call.keywords):
                found["queue"].add("default")
    return {kind: sorted(names) for kind, names in found.items()}


def _called(function: Any) -> str:
    """The last name of what is called: ``topic`` of ``app.topic``."""
    return str(getattr(function, "attr", None) or getattr(function, "id", ""))
