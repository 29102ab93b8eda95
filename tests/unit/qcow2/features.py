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
    "cluster_size": (64 * KIB, 512, 4 * KIB, 2048 * KIB),
    "refcount_bits": (16, 1, 2, 4, 8, 32, 64),
    "compression_type": ("zlib", "zstd"),
    "encrypt_format": (None, "luks", "aes"),
    "lazy_refcounts": (False, True),
    "extended_l2": (False, True),
    "data_file": (None, "data"),
    "data_file_raw": (False, True),
    # What else an image has.
    "backing": (None, "raw", "qcow2"),
    "snapshots": (0, 2),
}
OPTIONS = tuple(name for name in FEATURES if name not in ("backing", "snapshots"))
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
    if choice["data_file_raw"] and (choice["data_file"] is None or choice["backing"]):
        return False
    # One snapshot makes it two references, two make it three.
    return bool(choice["snapshots"] < (1 << choice["refcount_bits"]))


def compresses(choice: Choice) -> bool:
    """Whether clusters may be compressed. Many share a host cluster, which their counts must say:
    narrow ones leave them apart."""
    if choice["encrypt_format"] or choice["data_file"]:
        return False
    return bool(choice["refcount_bits"] >= 8)


def options_of(choice: Choice) -> dict[str, Any]:
    """As fields of ``CreateOptions``."""
    return {name: choice[name] for name in OPTIONS if choice[name] is not None}


def words_of(choice: Choice) -> str:
    """As users write them behind ``-o``."""
    words = []
    for name, value in options_of(choice).items():
        text = ("off", "on")[value] if isinstance(value, bool) else value
        words.append(f"{name.replace('encrypt_', 'encrypt.')}={text}")
    if choice["encrypt_format"]:
        words.append("encrypt.key-secret=key")
    if choice["encrypt_format"] == "luks":
        words.append("encrypt.iter-time=10")
    return ",".join(words)


def name_of(choice: Choice) -> str:
    """What differs from the defaults, for the name of a test."""
    different = [f"{name}={value}" for name, value in choice.items() if value != DEFAULTS[name]]
    return " ".join(different) or "defaults"


def pairs(*, acceptable: bool = True) -> list[Choice]:
    """Choices in which any two values of two features meet at least once.

    ``acceptable``: those that QEMU makes, with each two values that it makes together. Otherwise
    all, whether it makes them or not.
    """
    missing = dict.fromkeys(pair for pair in _all_pairs() if not acceptable or _possible(pair))
    rng = random.Random(1)
    found = []
    while missing:
        choice = _complete(dict(next(iter(missing))), missing, acceptable, rng)
        covered = [pair for pair in missing if _covers(choice, pair)]
        assert covered, "a pair that nothing can cover"
        for pair in covered:
            del missing[pair]
        found.append(choice)
    return found


_Pair = tuple[tuple[str, Any], tuple[str, Any]]


def _all_pairs() -> Iterator[_Pair]:
    for (one, values), (other, others) in itertools.combinations(FEATURES.items(), 2):
        for value, another in itertools.product(values, others):
            yield (one, value), (other, another)


def _possible(pair: _Pair) -> bool:
    return accepted({**DEFAULTS, **dict(pair)})


def _covers(choice: Choice, pair: _Pair) -> bool:
    return all(choice[name] == value for name, value in pair)


def _complete(
    choice: Choice, missing: dict[_Pair, None], acceptable: bool, rng: random.Random
) -> Choice:
    """Fill in the other features, greedily: the values that cover most of what is missing."""
    for name, values in FEATURES.items():
        if name in choice:
            continue

        def gain(value: Any, name: str = name) -> int:
            tried = {**choice, name: value}
            if acceptable and not accepted({**DEFAULTS, **tried}):
                return -1
            return sum(
                all(tried.get(key, _NOTHING) == wanted for key, wanted in pair)
                for pair in missing
            )

        choice[name] = max(rng.sample(values, len(values)), key=gain)
    return {name: choice[name] for name in FEATURES}


_NOTHING = object()
