"""What qcow2 images can be made of, and which of it goes together: for tests that try it all.

A feature is added as a line of ``FEATURES`` and, where it excludes others, a line of ``accepted``.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

KIB = 1 << 10

Choice = dict[str, Any]
"""Feature -> one of its values."""

FEATURES: dict[str, tuple[Any, ...]] = {
    # Options of ``create``, by the names of the fields; the first value is the default.
    "compat": ("1.1", "0.10"),
    "cluster_size": (64 * KIB, 512, 4 * KIB, 16 * KIB, 2048 * KIB),
    "refcount_bits": (16, 1, 2, 4, 8, 32, 64),
    "compression_type": ("zlib", "zstd"),
    "encrypt_format": (None, "luks", "aes"),
    "lazy_refcounts": (False, True),
    "extended_l2": (False, True),
    "data_file": (None, "data", "raw"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    # What else an image has.
    "backing": (None, "raw", "qcow2"),
    "snapshots": (0, 2),
    "bitmaps": (False, True),
}
OPTIONS = tuple(name for name in FEATURES if name not in ("backing", "snapshots", "bitmaps"))
DEFAULTS: Choice = {name: values[0] for name, values in FEATURES.items()}


def accepted(choice: Choice) -> bool:
    """Whether QEMU makes such an image."""
    old = choice["compat"] == "0.10"
    if old and choice["refcount_bits"] != 16:
        return False
    if old and choice["compression_type"] != "zlib":
        return False
    if old and choice["lazy_refcounts"]:
        return False
    if choice["extended_l2"] and (old or choice["cluster_size"] < 16 * KIB):
        return False
    if choice["data_file"] and (old or choice["snapshots"]):
        return False
    if choice["data_file"] == "raw" and choice["backing"]:
        return False
    if choice["preallocation"] != "off" and choice["backing"] and not choice["extended_l2"]:
        return False
    if old and choice["bitmaps"]:
        return False
    # One snapshot makes it two references, two make it three.
    return bool(choice["snapshots"] < (1 << choice["refcount_bits"]))


def compresses(choice: Choice) -> bool:
    """Whether clusters may be compressed. Many share a host cluster, which their counts must say:
    narrow ones leave them apart."""
    if choice["encrypt_format"] or choice["data_file"]:
        return False
    return bool(choice["refcount_bits"] >= 8)


def options_of(choice: Choice, data_file: str = "data") -> dict[str, Any]:
    """As fields of ``CreateOptions``; ``data_file`` is the name of one, if there is one."""
    options = {name: choice[name] for name in OPTIONS if choice[name] is not None}
    if choice["data_file"]:
        options |= {"data_file": data_file, "data_file_raw": choice["data_file"] == "raw"}
    return options


def words_of(choice: Choice, data_file: str = "data") -> str:
    """As users write them behind ``-o``."""
    words = []
    for name, value in options_of(choice, data_file).items():
        text = ("off", "on")[value] if isinstance(value, bool) else value
        words.append(f"{name.replace('encrypt_', 'encrypt.')}={text}")
    if choice["encrypt_format"]:
        words.append("encrypt.key-secret=key")
    if choice["encrypt_format"] == "luks":
        words.append("encrypt.iter-time=1")
    return ",".join(words)


def name_of(choice: Choice) -> str:
    """What differs from the defaults, for the name of a test."""
    different = [f"{name}={value}" for name, value in choice.items() if value != DEFAULTS[name]]
    return " ".join(different) or "defaults"


def product() -> Iterator[Choice]:
    """Every choice that QEMU makes: some ten thousands."""
    for values in itertools.product(*FEATURES.values()):
        choice = dict(zip(FEATURES, values, strict=True))
        if accepted(choice):
            yield choice


def as_new(choice: Choice) -> Choice:
    """The same without what comes after its creation, and without LUKS, which is random."""
    kind = choice["encrypt_format"]
    return {
        **choice,
        "snapshots": 0,
        "bitmaps": False,
        "encrypt_format": "aes" if kind == "luks" else kind,
    }


def combinations_of_new() -> Iterator[Choice]:
    """Every choice that ``create`` can be asked for, whether QEMU makes it or not."""
    for values in itertools.product(*FEATURES.values()):
        choice = dict(zip(FEATURES, values, strict=True))
        if choice == as_new(choice):
            yield choice


def covering(strength: int, *, acceptable: bool = True) -> list[Choice]:
    """Choices in which any so many values of as many features meet at least once.

    ``acceptable``: those that QEMU makes, with each values that it makes together. Otherwise all,
    whether it makes them or not.
    """
    missing = {
        group for group in _groups(strength) if not acceptable or _completions(group)
    }
    rng = random.Random(1)
    found = []
    for group in _groups(strength):
        if group not in missing:
            continue
        tried = [_complete(dict(group), acceptable, rng) for _ in range(_TRIES)]
        best = max(tried, key=lambda choice: len(missing & _covered(choice, strength)))
        missing -= _covered(best, strength)
        found.append(best)
    return found


_Group = tuple[tuple[str, Any], ...]
_TRIES = 12
"""Completions of what is missing, of which the one that brings most is taken."""


def _groups(strength: int) -> Iterator[_Group]:
    for names in itertools.combinations(FEATURES, strength):
        for values in itertools.product(*(FEATURES[name] for name in names)):
            yield tuple(zip(names, values, strict=True))


def _covered(choice: Choice, strength: int) -> set[_Group]:
    return set(itertools.combinations(choice.items(), strength))


def _completions(group: _Group) -> list[Choice]:
    """What makes a choice of these values acceptable: all defaults, or one feature beside them."""
    chosen = {**DEFAULTS, **dict(group)}
    rest = [{**chosen, name: value} for name, values in FEATURES.items() for value in values]
    return [
        choice
        for choice in (chosen, *rest)
        if all(choice[name] == value for name, value in group) and accepted(choice)
    ]


def _complete(chosen: Choice, acceptable: bool, rng: random.Random) -> Choice:
    """Any values for the other features, as far as they go together."""
    choice = {**DEFAULTS, **chosen}
    if acceptable and not accepted(choice):
        choice = rng.choice(_completions(tuple(chosen.items())))
    for name in rng.sample(list(FEATURES), len(FEATURES)):
        if name not in chosen:
            tried = {**choice, name: rng.choice(FEATURES[name])}
            if not acceptable or accepted(tried):
                choice = tried
    return choice
