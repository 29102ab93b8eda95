"""Our named tuples do what those of the standard library do."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from typing import NamedTuple as StandardTuple

import pytest

from lamina import hints
from lamina.tuples import NamedTuple


class Place(NamedTuple):
    """Where."""

    host: int
    length: int = 4
    name: str = "x"

    @property
    def end(self) -> int:
        return self.host + self.length


class Nothing(NamedTuple):
    pass


class Standard(StandardTuple):
    host: int
    length: int = 4
    name: str = "x"


def test_it_is_what_programs_get() -> None:
    assert hints.NamedTuple is NamedTuple


@pytest.mark.parametrize(
    ("args", "named"),
    [((1,), {}), ((1, 2), {"name": "y"}), ((), {"length": 3, "host": 2}), ((1, 2, "z"), {})],
)
def test_instances(args: Any, named: Any) -> None:
    ours, theirs = Place(*args, **named), Standard(*args, **named)
    assert ours == theirs
    assert tuple(ours) == (ours.host, ours.length, ours.name)
    assert ours.end == ours[0] + ours[1]
    assert repr(ours) == repr(theirs).replace("Standard", "Place")
    assert ours._replace(length=9) == theirs._replace(length=9)
    assert type(ours._replace(length=9)) is Place
    assert Place._make(ours) == ours
    assert {ours: 1}[Place(*ours)] == 1
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin == ours
        assert type(twin) is Place


@pytest.mark.parametrize("named", [{}, {"host": 1, "size": 2}])
def test_wrong_arguments_are_refused(named: Any) -> None:
    with pytest.raises(TypeError):
        Standard(**named)
    with pytest.raises(TypeError):
        Place(**named)
    with pytest.raises(TypeError):
        Place(1)._replace(size=2)
    with pytest.raises(AttributeError):
        Place(1).host = 2  # type: ignore[misc]


def test_patterns_and_descriptions() -> None:
    match Place(1, 2):
        case Place(host, length):
            assert (host, length) == (1, 2)
    assert Place.__doc__ == "Where."
    assert not hasattr(Place(1), "__dict__")


def test_without_fields() -> None:
    assert Nothing() == ()
    assert repr(Nothing()) == "Nothing()"
