"""The documentation: it builds, its code is that of examples which tests run, and its commands and settings exist."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import command

from flowkit.cli import cli
from flowkit.monitor import EVENTS
from flowkit.settings import Option, Section, Settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
SNIPPET = re.compile(r'--8<-- "([^":]+)(?::(\w+))?"')
ids = [page.name for page in PAGES]


def blocks(page: Path, language: str) -> Iterator[str]:
    for _, found, body in FENCE.findall(page.read_text()):
        if found == language:
            yield body


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_is_included_from_examples(page: Path) -> None:
    for body in blocks(page, "python"):
        for line in filter(str.strip, body.splitlines()):
            found = SNIPPET.fullmatch(line.strip())
            assert found, f"{page.name} has code of its own, which nothing runs: {line}"
            assert found[1].startswith(("examples/", "flowkit/templates/", "tests/")), line


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_and_their_options_exist(page: Path) -> None:
    group: Any = typer.main.get_command(cli)
    for body in blocks(page, "console"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if not words or words[0] != "flowkit" or len(words) < 2 or words[1].startswith("-"):
                continue
            assert words[1] in group.commands, f"{page.name}: {line}"
            named: Any = group.commands[words[1]]
            if hasattr(named, "commands"):  # `flowkit dead list`
                assert words[2] in named.commands, f"{page.name}: {line}"
                named = named.commands[words[2]]
            known = {name for param in named.params for name in param.opts} | {"-h", "--help"}
            for word in words[2:]:
                if word.startswith("--") or re.fullmatch(r"-[a-z]", word):
                    assert word.partition("=")[0] in known, f"{page.name}: {line}"
                if word in ("|", "&&", ";", ">", "&"):
                    break


def every_setting(kind: type[Section] = Settings, path: str = "") -> Iterator[str]:
    for name, described in kind.described.items():
        if isinstance(described, Section):
            yield from every_setting(type(described), f"{path}{name}.")
        elif isinstance(described, Option):
            yield f"{path}{name}"


def test_the_page_of_settings_names_them_all() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \|[^|]*\| (?:`(\w+)`)? *\|", text, re.M)

    assert {name for name, _ in rows} == set(every_setting())
    for name, variable in rows:
        assert variable in ("", "FLOWKIT_" + name.upper().replace(".", "_")), name


def test_the_page_of_events_names_them_all() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.M)

    assert {name for row in rows for name in re.findall(r"\w+", row)} == set(EVENTS)


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    done = command(
        sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"), cwd=ROOT
    )

    assert done.code == 0, done.err
    assert (tmp_path / "site" / "index.html").exists()
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text())
        assert [url for url in loaded if "canonical" not in url] == [], f"{page} loads from elsewhere"


def test_the_map_from_karafka_names_the_tests_there_are() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "karafka.md").read_text()))

    assert named == {path.name for path in (ROOT / "tests" / "seed").glob("test_*.py")}


def test_the_readme_says_where_everything_is() -> None:
    table = (ROOT / "README.md").read_text().partition("| module | one thing |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row]
    named = {name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)}
    modules = {path.stem for path in (ROOT / "flowkit").iterdir() if path.suffix == ".py" or path.is_dir()}

    assert named == {name for name in modules if not name.startswith("__")}
