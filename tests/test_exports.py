"""What ``import flowkit`` gives, and what it does not cost."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flowkit
from flowkit import errors

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEAVY = {"typer", "rich", "click", "pydantic", "redis", "rq", "kafka", "confluent_kafka", "msgspec", "pytest"}

NO_SOCKETS = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

class Socket(socket.socket):
    __init__ = refuse

socket.socket = Socket
socket.create_connection = socket.getaddrinfo = refuse
"""


def python(code: str, *options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_public_name_can_be_imported() -> None:
    for name in flowkit.__all__:
        assert getattr(flowkit, name).__name__ == name


def test_the_public_names_are_sorted() -> None:
    assert flowkit.__all__ == sorted(set(flowkit.__all__))


def test_a_star_import_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from flowkit import *", namespace)

    assert namespace.keys() - {"__builtins__"} == set(flowkit.__all__)


def test_the_public_names_are_offered_for_completion() -> None:
    assert set(flowkit.__all__) <= set(dir(flowkit))


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'flowkit' has no attribute 'Flowkid'"):
        flowkit.Flowkid  # noqa: B018


def test_every_error_is_public_and_in_the_tree_it_is_drawn_in() -> None:
    tree = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }

    assert tree <= set(flowkit.__all__)
    for name in tree:
        assert issubclass(getattr(errors, name), flowkit.FlowkitError)
        assert name in (errors.__doc__ or "")
        assert getattr(errors, name).__doc__


def test_the_version_is_one() -> None:
    assert flowkit.__version__.count(".") == 2


@pytest.mark.parametrize(
    "code",
    [
        "import flowkit",
        "from flowkit import *",
        "from flowkit import Flowkit; Flowkit('shop', kafka={'hosts': 'a:1'}, redis='redis://r')",
        "from flowkit import Flowkit; app = Flowkit('shop'); app.topic('a')(print); app.responds_to('b')(print)",
    ],
)
def test_importing_flowkit_loads_nothing_heavy(code: str) -> None:
    loaded = {line.rpartition("|")[2].strip() for line in python(code, "-X", "importtime").stderr.splitlines()}

    assert "flowkit" in loaded
    assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set()


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_importing_an_application_opens_no_socket(example: str) -> None:
    python(f"{NO_SOCKETS}\nimport {example}", cwd=EXAMPLES)


@pytest.mark.parametrize("example", ["mini", "shop"])
def test_starting_an_application_opens_no_socket(example: str) -> None:
    code = f"{NO_SOCKETS}\nfrom {example} import app\nfrom flowkit.testing import Client\nwith Client(app): pass"

    python(code, cwd=EXAMPLES)


def test_importing_flowkit_starts_no_thread_and_sets_no_logging() -> None:
    python(
        "import flowkit, logging, threading\n"
        "from flowkit import *\n"
        "assert threading.active_count() == 1\n"
        "assert not logging.getLogger().handlers and not logging.getLogger('flowkit').handlers"
    )


HORSE = """
import sys
import rq.cli, rq.worker  # what every horse has of its worker
before = set(sys.modules)
import dataclasses, os, re
import flowkit.jobs
from flowkit import Flowkit
for name in [name for name in os.environ if name.startswith("FLOWKIT_")]:
    del os.environ[name]  # those of the tests look like misspelt settings
os.environ.update(FLOWKIT_ENV="production", FLOWKIT_KAFKA_HOSTS="a:1,[::1]:2", FLOWKIT_REDIS="redis://r", KAFKA_HOME="/opt")
app = Flowkit("shop", retry=3, dead_letter="dead")
app.responds_to("b")(app.topic("a")(lambda payload: payload))
app.start(check_client=False)
app.handling("a")
loaded = set(sys.modules) - before
made = [
    f"{module}.{name}"
    for module in loaded if module.partition(".")[0] == "flowkit"
    for name, value in vars(sys.modules[module]).items()
    if isinstance(value, re.Pattern) or (dataclasses.is_dataclass(value) and value.__module__ == module)
]
print(*loaded, "made:", *made)
"""
SLOW = {
    *HEAVY,
    *("difflib", "secrets", "hmac", "random"),
    *("flowkit.clients", "flowkit.topics", "flowkit.consumer", "flowkit.queueing", "flowkit.shards"),
}


def test_a_work_horse_imports_only_what_most_jobs_need() -> None:
    """It does so for each job: a frozen dataclass or a pattern takes it a millisecond, ``difflib`` two."""
    loaded, _, made = python(HORSE).stdout.partition(" made:")
    modules = set(loaded.split())

    assert {"flowkit.jobs", "flowkit.app", "orjson"} <= modules
    assert {name for name in modules if name in SLOW or name.partition(".")[0] in SLOW} == set()
    assert made.split() == []
