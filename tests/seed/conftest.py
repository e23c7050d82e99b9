"""What the seed's tests share: a running application, and the examples."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from redis import Redis
from servers import Kafka, WaitFor

from seed.system import System

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def system(kafka: Kafka, redis: Redis, redis_url: str, tmp_path: Path, wait_for: WaitFor) -> System:
    """The application ``apps/shapes.py`` with topics of its own; nothing runs yet."""
    return System(kafka, redis, redis_url, tmp_path, wait_for)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of ``examples/`` anew: an application can be started once, and other tests have such names too."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = dict(sys.modules)
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in loaded:
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]
