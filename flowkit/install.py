"""``flowkit install``: the files of a new project, from the templates beside this module. Nothing is ever overwritten."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from . import __version__
from .errors import ConfigurationError, FlowkitError

SUFFIX = ".tmpl"
"""Ends the names of templates, so that no tool takes them for files of flowkit's own. None begins with a dot, because
setuptools would leave it out of the wheel."""

NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Installed:
    """One file of the project, by its path in the folder. ``made`` is False where it was there already."""

    path: str
    made: bool


def project_name(folder: Path, given: str | None) -> str:
    """The name of the project: the given one, or one made from the folder's. It names the application, units and pods.

    Raises ``ConfigurationError`` if it is none that all of them allow.
    """
    made = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    name = made if given is None else given
    if not NAME.fullmatch(name):
        what = f"the folder {folder.resolve().name!r} gives no name" if given is None else f"{name!r} is no name"
        raise ConfigurationError(
            f"{what} for a project: 1 to 40 of a-z, 0-9 and -, from a letter on, as --name shop; it names the application,"
            " its groups, units and pods"
        )
    return name


def install(folder: Path, name: str) -> Iterator[Installed]:
    """Writes the project's files one by one into ``folder``, and makes that if need be.

    Raises ``FlowkitError`` where one cannot be written.
    """
    words = {"@DOT@": ".", "@NAME@": name, "@VERSION@": __version__, "@NEXT@": _next(__version__)}
    for path, template in sorted(_templates(files(__package__) / "templates" / "project", "")):
        where = _filled(path.removesuffix(SUFFIX), words)
        target = folder / where
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("x", encoding="utf-8") as opened:
                opened.write(_filled(template.read_text(encoding="utf-8"), words))
        except FileExistsError as error:
            if not target.exists() and not target.is_symlink():
                raise FlowkitError(f"{target} cannot be made: {error.filename} is there, and is no folder") from error
            yield Installed(where, made=False)
        except OSError as error:
            raise FlowkitError(f"{target} cannot be made: {error.strerror}") from error
        else:
            yield Installed(where, made=True)


def _templates(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        where = f"{path}{entry.name}"
        if entry.is_dir():
            yield from _templates(entry, f"{where}/")
        elif entry.name.endswith(SUFFIX):
            yield where, entry


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def _next(version: str) -> str:
    """The first version that may break what works with this one: the next minor one before 1.0, then the next major one."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f"{major + 1}" if major else f"0.{minor + 1}"
