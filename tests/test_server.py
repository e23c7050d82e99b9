"""What a process of ``flowkit run`` does besides its consumers."""

from __future__ import annotations

import gc

import pytest

from flowkit.server import OBJECTS, collecting_less


@pytest.mark.parametrize(("before", "within"), [((700, 10, 10), OBJECTS), ((0, 10, 10), 0), ((50_000, 5, 5), 50_000)])
def test_python_looks_for_cycles_less_often_while_messages_flow(before: tuple[int, int, int], within: int) -> None:
    """But never more often than the application says; switched off it stays off."""
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    gc.set_threshold(*before)
    try:
        with collecting_less():
            assert gc.get_threshold() == (within, *before[1:])
            assert gc.get_freeze_count() > frozen
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() == 0
    finally:
        gc.set_threshold(*usual)
