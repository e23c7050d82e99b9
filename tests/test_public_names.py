"""What ``import flowkit`` gives, and what it does not load."""

from __future__ import annotations

import pytest
from commands import python

import flowkit


@pytest.mark.parametrize("name", flowkit.__all__)
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(flowkit, name)
    assert found.__name__ == name
    assert found.__doc__
    assert found.__module__.startswith("flowkit.")
    assert name in dir(flowkit)


def test_every_error_is_public() -> None:
    import flowkit.errors

    errors = {name for name, value in vars(flowkit.errors).items() if isinstance(value, type)}
    assert errors <= set(flowkit.__all__)


def test_an_unknown_name_is_told_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'flowkit' has no attribute 'Flowkitt'"):
        _ = flowkit.Flowkitt


def test_an_application_loads_neither_clients_nor_the_command_line() -> None:
    source = (
        "import sys; from flowkit import *; app = Flowkit('x')\n"
        "@app.topic('orders')\n"
        "def handle(order): ...\n"
        "print(sorted({'typer', 'rich', 'pydantic', 'redis', 'rq', 'kafka'} & set(sys.modules)))"
    )
    assert python("-c", source) == (0, "[]\n", "")
