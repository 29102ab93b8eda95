"""``NamedTuple`` at a tenth of the price that ``collections.namedtuple`` takes for each class.

Most of that price is for compiling a constructor, here done when there is something to construct:
of the classes that a tool imports it uses few. Their instances cost what they cost there.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from lamina.hints import Any

try:
    from _collections import _tuplegetter as _getter  # type: ignore[import-not-found]
except ImportError:

    def _getter(index: int, doc: str | None) -> Any:
        return property(itemgetter(index), doc=doc)


class _Tuple(tuple[Any, ...]):
    """What all named tuples have in common."""

    __slots__ = ()
    _fields: tuple[str, ...]
    _defaults: tuple[Any, ...]
    """Of the last fields."""

    def __new__(cls, *values: Any, **named: Any) -> Any:
        """The first one of its class."""
        names = "".join(f"{name}, " for name in cls._fields)
        make = eval(f"lambda _class, {names}: _new(_class, ({names}))", {"_new": tuple.__new__})
        make.__defaults__ = cls._defaults
        cls.__new__ = staticmethod(make)  # type: ignore[method-assign]
        return make(cls, *values, **named)

    @classmethod
    def _make(cls, values: Iterable[Any]) -> Any:
        return cls(*values)

    def _replace(self, **changes: Any) -> Any:
        return type(self)(**{**dict(zip(self._fields, self, strict=True)), **changes})

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True)
        )
        return f"{type(self).__name__}({inside})"

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)


class _NamedTupleType(type):
    """Makes of ``class X(NamedTuple)`` a tuple with names for its items."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, namespace)
        fields = tuple(namespace.get("__annotations__", ()))
        defaults = tuple(namespace[field] for field in fields if field in namespace)
        namespace.pop("__classcell__", None)
        namespace.update(__slots__=(), __match_args__=fields, _fields=fields, _defaults=defaults)
        for index, field in enumerate(fields):
            namespace[field] = _getter(index, None)
        return type(name, (_Tuple,), namespace)


class NamedTuple(metaclass=_NamedTupleType):
    """``typing.NamedTuple``: annotations are the fields, values of theirs defaults."""
