"""Option strings as people write them: ``driver=qcow2,file.filename=a,,b.qcow2,read-only``.

Commas separate, a doubled comma stands for itself, a word without ``=`` is a switch (``x`` for
``x=on``, ``nox`` for ``x=off``), except that the first one may be the value of an implied key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lamina.errors import UsageError
from lamina.hints import Any


def split_pairs(
    text: str, implied_key: str | None = None, *, warn: Callable[[str], None] | None = None
) -> list[tuple[str, str]]:
    """The pairs of an option string in order, repeated keys included.

    ``warn`` hears that switches without ``=on`` are deprecated.
    """
    words = _split_commas(text)
    if words and not words[-1]:
        words.pop()
    pairs = []
    for number, word in enumerate(words):
        key, equals, value = word.partition("=")
        if number == 0 and implied_key is not None and not equals:
            pairs.append((implied_key, word))
            continue
        if not equals:
            key, value = _switch(word)
            if warn:
                warn(
                    f"warning: short-form boolean option '{word}' deprecated\n"
                    f"Please use {key}={value} instead"
                )
        pairs.append((key, value))
    return pairs


def _switch(word: str) -> tuple[str, str]:
    if word.startswith("no") and len(word) > 2:
        return word[2:], "off"
    return word, "on"


def parse_keyvalue(
    text: str, implied_key: str | None = None, *, warn: Callable[[str], None] | None = None
) -> dict[str, str]:
    """The same as a dictionary: the last of repeated keys counts."""
    return dict(split_pairs(text, implied_key, warn=warn))


def has_help(text: str) -> bool:
    """Whether somebody asks what the options are: ``help`` or ``?`` as a word of its own."""
    return any(word in ("help", "?") for word in _split_commas(text))


def _split_commas(text: str) -> list[str]:
    if not text:
        return []
    return [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]


def flatten(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested objects and lists as dotted keys: ``{"a": {"b": [1]}}`` is ``{"a.b.0": 1}``.

    An empty object or list stays as it is; what is given in both ways counts as nested.
    """
    flat: dict[str, Any] = {}
    # No recursion: the depth is up to whoever wrote the options.
    waiting = [("", iter(options.items()))]
    nested: dict[str, Any] = {}
    while waiting:
        prefix, items = waiting[-1]
        for key, value in items:
            inner = None
            if isinstance(value, Mapping) and value:
                inner = iter(value.items())
            elif isinstance(value, list | tuple) and value:
                inner = iter([(str(number), item) for number, item in enumerate(value)])
            if inner is not None:
                waiting.append((f"{prefix}{key}.", inner))
                break
            (nested if prefix else flat)[f"{prefix}{key}"] = value
        else:
            waiting.pop()
    return {**flat, **nested}


def subset(options: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The options whose keys begin with ``prefix``, without it."""
    return {key[len(prefix) :]: value for key, value in options.items() if key.startswith(prefix)}


def take(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The same; they are no longer in ``options``."""
    found = subset(options, prefix)
    for key in found:
        del options[prefix + key]
    return found


def nest(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested objects; where all keys of an object are 0, 1, 2 … it is a list."""
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        level = tree
        for name in parents:
            inner = level.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UsageError(f"Option '{key}' is given both as a value and as an object")
            level = inner
        level[last] = value
    return {key: _lists(value) for key, value in tree.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(item) for key, item in value.items()}
    if inner and set(inner) == {str(number) for number in range(len(inner))}:
        return [inner[str(number)] for number in range(len(inner))]
    return inner
