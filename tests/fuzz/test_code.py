"""flowkit's own code: what it never does with what comes from outside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowkit

ROOT = Path(flowkit.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

NEVER = {
    *(
        f"{module}.{name}"
        for module in ("pickle", "_pickle", "marshal", "dill", "shelve")
        for name in ("load", "loads", "open")
    ),
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "jsonpickle.decode",
    ),
    *("code.interact", "runpy.run_path", "runpy.run_module", "subprocess.getoutput", "subprocess.getstatusoutput"),
}
"""Calls that would run, or let something run, what is in their argument."""

ALLOWED = {
    ("queues.py", "pickle.Unpickler"): "which refuses every name: Envelope",
    ("cli/console.py", "code.interact"): "for the person at the terminal",
}


def called(tree: ast.AST) -> Iterator[tuple[str, ast.Call | ast.ClassDef]]:
    """What is called, or subclassed, by its dotted name, whatever it was imported as."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in ast.walk(tree):
        targets = [node.func] if isinstance(node, ast.Call) else node.bases if isinstance(node, ast.ClassDef) else []
        for target in targets:
            head, dot, rest = ast.unparse(target).partition(".")
            assert isinstance(node, ast.Call | ast.ClassDef)
            yield names.get(head, head) + dot + rest, node


def faults(path: str, text: str) -> list[str]:
    """What a module does that none may."""
    found = []
    for name, node in called(ast.parse(text)):
        shell = isinstance(node, ast.Call) and any(
            word.arg == "shell" and not (isinstance(word.value, ast.Constant) and not word.value.value)
            for word in node.keywords
        )
        if (name in NEVER or name.endswith(".Unpickler") or shell) and (path, name) not in ALLOWED:
            found.append(f"{path}:{node.lineno} {name}{' with a shell' if shell else ''}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_comes_from_outside(path: Path) -> None:
    assert faults(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads as read\nread(b'')",
        "import pickle as p\np.load(open('x'))",
        "import pickle\nclass All(pickle.Unpickler): pass",
        "import marshal\nmarshal.loads(b'')",
        "eval('1')",
        "exec('1')",
        "import yaml\nyaml.load('')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "from subprocess import Popen\nPopen('x', shell=bool(1))",
        "import os\nos.system('x')",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert len(faults("some.py", text)) == 1
