"""Sizes as people write them; the figures are those of qemu-io 10.0.2."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import UsageError
from lamina.units import parse_size, size_to_str

READ = {
    "5": 5,
    " 5": 5,
    "+5": 5,
    "010": 10,
    "0x10": 16,
    "0xb": 11,
    "0b": 0,
    "1b": 1,
    "1.0": 1,
    "1.": 1,
    "1.0b": 1,
    "0.5k": 512,
    ".5k": 512,
    "1.1k": 1126,
    "1.0004882812k": 1024,
    "1.00048828125k": 1025,
    "1.9999999999k": 2048,
    "0.0005k": 1,
    "0.0004k": 0,
    "1.2345678901234567M": 1294538,
    "0.3P": 337769972052787,
    "1.7E": 1959966557831639808,
}
REFUSED = [
    "", ".", "k", "1.5", "0.5", "1.5b", "0x", "0x1k", "0x1.8", "0x1_0", "0x-5", "1_0", "1kb", "1e3",
    "1,5", "inf", "nan", "-5", "+-1", "++1", "1s", "5 ", "٣", "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_sizes_are_read(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", REFUSED)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


def test_without_a_suffix_the_default_one_counts() -> None:
    assert parse_size("3", default_suffix="M") == 3 << 20
    assert parse_size("3k", default_suffix="M") == 3 << 10


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) >= 0


def test_sizes_are_shown_with_three_digits() -> None:
    shown = {0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1024: "1 KiB", 8 << 20: "8 MiB"}
    assert {value: size_to_str(value) for value in shown} == shown
