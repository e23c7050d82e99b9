"""Values that do not change: equality, hash, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from flowkit.frozen import Frozen


class Size(Frozen):
    width: int
    height: int


class Weight(Frozen):
    width: int
    height: int


def test_it_holds_what_it_was_made_with() -> None:
    size = Size(width=2, height=3)

    assert (size.width, size.height) == (2, 3)
    assert repr(size) == "Size(width=2, height=3)"


def test_those_that_hold_the_same_are_equal() -> None:
    size = Size(width=2, height=3)

    assert size == Size(height=3, width=2)
    assert size != Size(width=2, height=4)
    assert len({size, Size(width=2, height=3), Size(width=2, height=4)}) == 2


def test_one_of_another_class_is_another_value() -> None:
    other: Any = Weight(width=2, height=3)

    assert Size(width=2, height=3) != other
    assert Size(width=2, height=3) != (2, 3)


def test_it_does_not_change() -> None:
    size: Any = Size(width=2, height=3)

    with pytest.raises(AttributeError, match="cannot set 'width': a Size does not change"):
        size.width = 4
    with pytest.raises(AttributeError, match="cannot set 'depth'"):
        size.depth = 4
    with pytest.raises(AttributeError, match="cannot delete 'width': a Size does not change"):
        del size.width
    assert size == Size(width=2, height=3)


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_is_equal(copied: Any) -> None:
    assert copied(Size(width=2, height=3)) == Size(width=2, height=3)
