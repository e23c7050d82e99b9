"""The fixtures that installing flowkit brings to pytest. They do nothing until a test asks for one.

Name the application once: ``flowkit_app = shop:app`` in the pytest settings, or a fixture ``flowkit_app`` that returns it.
flowkit is imported inside the fixtures only, because every pytest run of the environment loads this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .devstack import EmbeddedBroker, EmbeddedRedis
    from .testing import Client


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("flowkit_app", "the flowkit application under test, as module:attribute")


@pytest.fixture
def flowkit_app(request: pytest.FixtureRequest) -> Any:
    """The application under test: the one named by ``flowkit_app`` in the pytest settings."""
    reference = request.config.getini("flowkit_app")
    if not reference:
        pytest.fail(
            "no flowkit application is named: write `flowkit_app = shop:app` in the pytest settings, or a fixture"
            " flowkit_app that returns it",
            pytrace=False,
        )
    from .errors import AppNotFound
    from .locate import locate

    try:
        return locate(reference, request.config.rootpath)
    except AppNotFound as error:
        mistake = f"flowkit_app in the pytest settings: {error}"
    return pytest.fail(mistake, pytrace=False)


@pytest.fixture
def flowkit_client(flowkit_app: Any) -> Iterator[Client]:
    """A client that sends messages to the handlers of ``flowkit_app`` without a broker; see ``flowkit.testing``."""
    from .testing import Client

    with Client(flowkit_app) as client:
        yield client


@pytest.fixture(scope="session")
def flowkit_broker() -> Iterator[EmbeddedBroker]:
    """A real embedded broker for the whole test run (``.hosts``); skips the test, with the reason, where none can start."""
    from .devstack import EmbeddedBroker

    yield from _server(EmbeddedBroker)


@pytest.fixture(scope="session")
def flowkit_redis() -> Iterator[EmbeddedRedis]:
    """A real embedded Redis for the whole test run (``.url``); skips the test, with the reason, where none can start."""
    from .devstack import EmbeddedRedis

    yield from _server(EmbeddedRedis)


def _server(kind: type[Any]) -> Iterator[Any]:
    from .errors import DevStackError

    try:
        server = kind().start()
    except DevStackError as error:
        pytest.skip(str(error))
    try:
        yield server
    finally:
        server.stop()
