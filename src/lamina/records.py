"""``dataclass``, ``field`` and ``replace`` without the price of importing them.

The standard module loads ``inspect`` and compiles source text for every class, which together costs
more than everything else that ``lamina-img info`` does. This is the part of it that the project
uses: ``__init__`` by position or keyword, ``__repr__``, ``__eq__``, ``__hash__`` of frozen classes,
inherited fields, default factories. Type checkers treat the classes as dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable

from lamina.hints import Any, TypeVar, dataclass_transform

T = TypeVar("T")

_MISSING: Any = object()


class Field:
    """One field of a class, as ``fields`` yields it."""

    __slots__ = ("default", "default_factory", "metadata", "name")

    def __init__(
        self, name: str, default: Any, default_factory: Any, metadata: dict[str, Any]
    ) -> None:
        self.name = name
        self.default = default
        self.default_factory = default_factory
        self.metadata = metadata

    def make_default(self) -> Any:
        if self.default_factory is not _MISSING:
            return self.default_factory()
        return self.default


def field(
    *,
    default: Any = _MISSING,
    default_factory: Any = _MISSING,
    metadata: dict[str, Any] | None = None,
) -> Any:
    return Field("", default, default_factory, metadata or {})


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    cls: type[T] | None = None, /, *, frozen: bool = False, eq: bool = True
) -> Any:
    if cls is None:
        return lambda cls: _make(cls, frozen, eq)
    return _make(cls, frozen, eq)


def fields(cls: Any) -> tuple[Field, ...]:
    """Of a class or an instance, in the order of declaration, inherited ones first."""
    result: tuple[Field, ...] = cls.__record_fields__
    return result


def replace(instance: T, **changes: Any) -> T:
    """A copy with other values in some fields."""
    for one in fields(instance):
        changes.setdefault(one.name, getattr(instance, one.name))
    return type(instance)(**changes)


def _make(cls: type[T], frozen: bool, eq: bool) -> type[T]:
    found: dict[str, Field] = {}
    for base in reversed(cls.__mro__[1:]):
        found.update((one.name, one) for one in base.__dict__.get("__record_fields__", ()))
    for name, annotation in cls.__annotations__.items():
        if "ClassVar" in str(annotation):
            continue
        value = cls.__dict__.get(name, _MISSING)
        one = value if isinstance(value, Field) else Field("", value, _MISSING, {})
        one.name = name
        found[name] = one
        if one.default is not _MISSING:
            setattr(cls, name, one.default)
        elif value is one:
            delattr(cls, name)
    methods: dict[str, Callable[..., Any]] = {"__init__": _init, "__repr__": _repr}
    if eq:
        methods["__eq__"] = _eq
        if frozen:
            methods["__hash__"] = _hash
        elif "__hash__" not in cls.__dict__:
            cls.__hash__ = None  # type: ignore[assignment]
    if frozen:
        methods["__setattr__"] = methods["__delattr__"] = _refuse_change
    for name, method in methods.items():
        if name not in cls.__dict__:
            setattr(cls, name, method)
    cls.__record_fields__ = tuple(found.values())  # type: ignore[attr-defined]
    return cls


def _init(self: Any, *args: Any, **given: Any) -> None:
    known = self.__record_fields__
    if len(args) > len(known):
        raise TypeError(f"{type(self).__name__}() takes {len(known)} values, not {len(args)}")
    values = self.__dict__
    for one, value in zip(known, args):  # noqa: B905 - fewer values than fields is the normal case
        values[one.name] = value
    for one in known[len(args) :]:
        value = given.pop(one.name, _MISSING)
        if value is _MISSING:
            value = one.make_default()
            if value is _MISSING:
                raise TypeError(f"{type(self).__name__}() lacks a value for '{one.name}'")
        values[one.name] = value
    if given:
        raise TypeError(f"{type(self).__name__}() does not take '{next(iter(given))}'")
    finish = getattr(self, "__post_init__", None)
    if finish is not None:
        finish()


def _values(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, one.name) for one in self.__record_fields__)


def _repr(self: Any) -> str:
    inside = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(self))
    return f"{type(self).__qualname__}({inside})"


def _eq(self: Any, other: object) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return _values(self) == _values(other)


def _hash(self: Any) -> int:
    return hash((type(self), _values(self)))


def _refuse_change(self: Any, name: str, *_: Any) -> None:
    raise AttributeError(f"{type(self).__name__} is frozen: cannot change '{name}'")
