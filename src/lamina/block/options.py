"""Options: one frozen dataclass per driver, from which everything else is derived.

``-o help``, dotted options, ``json:{}``, ``--blockdev``, the documentation and ``info`` all read
the fields of these classes. A driver writes:

    @dataclass(frozen=True)
    class Options:
        offset: int = option("offset", Type.SIZE, 0, "first byte of the window")

and receives an instance whose values have been parsed and checked.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from lamina.errors import UsageError
from lamina.hints import Any, TypeVar
from lamina.records import dataclass, field, fields
from lamina.units import _parse_size


class Type(enum.Enum):
    """How the text of an option is read."""

    STRING = "str"
    SIZE = "size"
    NUMBER = "num"
    BOOL = "bool (on/off)"


@dataclass(frozen=True)
class Spec:
    """What a field of an options class says about itself."""

    key: str
    """As users write it: ``cluster_size``, ``l2-cache-size``, ``encrypt.key-secret``."""
    type: Type
    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    listed: bool = False
    """Creating an image tells the value even where it is the default."""


def option(
    key: str,
    type: Type = Type.STRING,
    default: Any = None,
    help: str = "",
    *,
    choices: Iterable[str] = (),
    aliases: Iterable[str] = (),
    listed: bool = False,
) -> Any:
    """A field of an options class. ``choices`` limits a string to a set of words."""
    spec = Spec(key, type, help, tuple(choices), tuple(aliases), listed)
    return field(default=default, metadata={"option": spec})


def specs(cls: type) -> dict[str, Spec]:
    """Field name -> what it says, in declaration order."""
    return {
        f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata
    }


T = TypeVar("T")


def parse(cls: type[T], given: Mapping[str, Any]) -> tuple[T, dict[str, Any]]:
    """An instance of ``cls`` from user-written keys, and the keys that it does not know.

    Raises UsageError for a value that does not fit its type.
    """
    fields = {}
    by_key = {}
    for name, spec in specs(cls).items():
        for key in (spec.key, *spec.aliases):
            by_key[key] = (name, spec)
    unknown = {}
    for key, value in given.items():
        if key in by_key:
            name, spec = by_key[key]
            if value is not None:  # JSON's null: as if it were not there
                fields[name] = convert(spec, value)
        else:
            unknown[key] = value
    return cls(**fields), unknown


def convert(spec: Spec, value: Any) -> Any:
    """``value`` (text from a command line, or a JSON value) as the type of the option."""
    if spec.type is Type.BOOL:
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise UsageError(f"Parameter '{spec.key}' expects 'on' or 'off'", field=spec.key)
    if spec.type is Type.SIZE:
        return _size(spec, value)
    if spec.type is Type.NUMBER:
        return _number(spec, value)
    text = str(value)
    if spec.choices and text not in spec.choices:
        raise UsageError(f"Parameter '{spec.key}' does not accept value '{text}'", field=spec.key)
    return text


def _size(spec: Spec, value: Any) -> int:
    size = value if isinstance(value, int) else _parse_size(str(value), "b")
    negative = str(value).lstrip().startswith("-") and str(value).lstrip()[1:].isdigit()
    if negative or (size is not None and size >= 1 << 64):
        raise UsageError(
            f"Value '{value}' is out of range for parameter '{spec.key}'", field=spec.key
        )
    if size is None or isinstance(value, bool):
        raise UsageError(
            f"Parameter '{spec.key}' expects a non-negative number below 2^64",
            field=spec.key,
            hint="Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively.",
        )
    return size


def _number(spec: Spec, value: Any) -> int:
    """As C reads it: ``0x`` is hexadecimal, a leading 0 octal."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    digits = text.lstrip("+-")
    base = 8 if digits[:1] == "0" and digits[1:].isdigit() else 0
    try:
        return int(text, base)
    except ValueError:
        raise UsageError(f"Parameter '{spec.key}' expects a number", field=spec.key) from None
