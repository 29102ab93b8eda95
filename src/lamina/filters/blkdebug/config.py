"""Rules out of a config file and out of options.

The file has sections like ``[inject-error]`` or ``[set-state "name"]`` with lines ``key = "value"``
below them; lines that begin with ``#`` are comments. What follows a closing quote is ignored, a
value without quotes is empty.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

from lamina.block.keyvalue import flatten, subset
from lamina.block.options import Spec, Type, convert
from lamina.errors import StorageError, UsageError
from lamina.filters.blkdebug.rules import EVENTS, IO_TYPES, InjectError, Rule, SetState
from lamina.hints import Any

_KEYS: dict[str, dict[str, Type]] = {
    "inject-error": {
        "event": Type.STRING,
        "state": Type.NUMBER,
        "iotype": Type.STRING,
        "errno": Type.NUMBER,
        "sector": Type.NUMBER,
        "once": Type.BOOL,
        "immediately": Type.BOOL,
    },
    "set-state": {
        "event": Type.STRING,
        "state": Type.NUMBER,
        "new_state": Type.NUMBER,
    },
}

_SECTION = re.compile(r'\[([^\]\s"]+) "([^"]*)"\]|\[([^\]]*)')
_LINE = re.compile(r'\s*(\S+)(?:\s*=\s*"([^"]*))?')


def read_config(path: str) -> list[Rule]:
    """Raises StorageError or UsageError."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        raise StorageError(
            f"Could not read blkdebug config file: {os.strerror(error.errno or 0)}",
            errno=error.errno,
            path=path,
        ) from None
    return [make_rule(name, given) for name, given in _sections(lines)]


def _sections(lines: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    found: list[tuple[str, dict[str, str]]] = []
    identifiers = set()
    for line in lines:
        if line.startswith("#") or not line.strip():
            continue
        section = _SECTION.match(line)
        if section is not None:
            name, identifier = section[1] or section[3], section[2]
            if name not in _KEYS:
                raise UsageError(f"There is no option group '{name}'")
            if identifier is not None and (name, identifier) in identifiers:
                raise UsageError(f"Duplicate ID '{identifier}' for {name}")
            identifiers.add((name, identifier))
            found.append((name, {}))
            continue
        if not found:
            raise UsageError("no group defined")
        name, given = found[-1]
        match = _LINE.match(line)
        assert match is not None  # the line is not blank
        key, value = match[1], match[2] or ""
        if key not in _KEYS[name]:
            raise UsageError(f"Invalid parameter '{key}'", field=key)
        given[key] = value
    yield from found


def rules_from_options(name: str, given: Mapping[str, Any]) -> list[Rule]:
    """``given`` is what follows ``inject-error.`` or ``set-state.``: one rule, or rules numbered
    from 0 on. Raises UsageError."""
    flat = flatten(given)
    found: list[dict[str, Any]] = []
    while part := subset(flat, f"{len(found)}."):
        found.append(part)
    single = {key: value for key, value in flat.items() if "." not in key}
    for key in flat:
        number, dot, _ = key.partition(".")
        if dot and single:
            raise UsageError(f"Unknown option '{key}' for [{name}]", field=key)
        if dot and number not in map(str, range(len(found))):
            raise UsageError(f"Unused option '{key}' for [{name}]", field=key)
    rules = [single] if single else found
    for rule in rules:
        for key in rule:
            if key not in _KEYS[name]:
                raise UsageError(f"[{name}] section doesn't support the option '{key}'", field=key)
    return [make_rule(name, rule) for rule in rules]


def make_rule(name: str, given: Mapping[str, Any]) -> Rule:
    """Raises UsageError."""
    values = {
        key: convert(Spec(key, type, ""), given[key])
        for key, type in _KEYS[name].items()
        if key in given
    }
    if "event" not in values:
        raise UsageError("Missing event name for rule")
    if values["event"] not in EVENTS:
        raise UsageError(f"invalid parameter value: {values['event']}")
    if values.get("iotype", "read") not in IO_TYPES:
        raise UsageError(f"invalid parameter value: {values['iotype']}")
    # Every error is told at once here: there is no later moment that it could be told at.
    values.pop("immediately", None)
    return InjectError(**values) if name == "inject-error" else SetState(**values)
