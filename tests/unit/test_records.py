from __future__ import annotations

from typing import ClassVar

import pytest

from lamina.records import dataclass, field, fields, replace


@dataclass
class Base:
    first: int
    listed: list[int] = field(default_factory=list)
    shared: ClassVar[int] = 3


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 2


@dataclass
class Derived(Base):
    last: str = "end"


def test_fields_come_by_position_keyword_default_and_factory() -> None:
    one, other = Derived(1), Derived(1, [2], last="x")
    assert (one.first, one.listed, one.last) == (1, [], "end")
    assert (other.listed, other.last) == ([2], "x")
    assert Derived(1).listed is not one.listed
    assert [one.name for one in fields(Derived)] == ["first", "listed", "last"]
    assert Derived.last == "end"


@pytest.mark.parametrize(
    ("args", "given"), [((), {}), ((1, [], "x", 4), {}), ((1,), {"z": 2}), ((1,), {"first": 2})]
)
def test_wrong_arguments_are_refused(args: tuple[object, ...], given: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        Derived(*args, **given)  # type: ignore[arg-type]


def test_frozen_ones_are_values() -> None:
    assert {Point(1): "a"}[Point(1, 2)] == "a"
    assert replace(Point(1), y=5) == Point(1, 5)
    assert Point(1) != Point(2)
    assert repr(Point(1)) == "Point(x=1, y=2)"
    with pytest.raises(AttributeError):
        Point(1).x = 2  # type: ignore[misc]


def test_changeable_ones_cannot_be_keys() -> None:
    with pytest.raises(TypeError):
        hash(Base(1))
    assert Base(1) == Base(1)
    assert Base(1) != Derived(1)
