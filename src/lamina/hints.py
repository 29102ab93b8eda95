"""Names for type checkers that programs need not load ``typing`` for.

``typing``, with ``re`` that it imports, takes a sixth of the time of ``lamina-img info``. Modules
take from here what they need of it: type checkers see the real thing, a running program a stand-in
that does no more than it must. Annotations are never evaluated.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import (
        Any,
        ClassVar,
        Final,
        Generic,
        NamedTuple,
        NoReturn,
        Protocol,
        Self,
        TextIO,
        TypeAlias,
        TypeVar,
        cast,
        dataclass_transform,
    )
else:

    class _Hint:
        """Means nothing, whatever it is told."""

        def __class_getitem__(cls, _parameters):
            return cls

    class Any(_Hint): ...

    class ClassVar(_Hint): ...

    class Final(_Hint): ...

    class Generic(_Hint): ...

    class NoReturn(_Hint): ...

    class Protocol(_Hint): ...

    class Self(_Hint): ...

    class TextIO(_Hint): ...

    class TypeAlias(_Hint): ...

    def TypeVar(name, *_constraints, **_bounds):
        return name

    def cast(_type, value):
        return value

    def dataclass_transform(**_what):
        return lambda decorator: decorator

    from lamina.tuples import NamedTuple


__all__ = [
    "TYPE_CHECKING",
    "Any",
    "ClassVar",
    "Final",
    "Generic",
    "NamedTuple",
    "NoReturn",
    "Protocol",
    "Self",
    "TextIO",
    "TypeAlias",
    "TypeVar",
    "cast",
    "dataclass_transform",
]
