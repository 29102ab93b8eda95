from __future__ import annotations

import pytest

from lamina.tools.io.commands import CommandFailed
from lamina.tools.io.numbers import (
    MAX_REQUEST,
    c_integer,
    check_sector_aligned,
    length,
    number,
    pattern_byte,
    total_length,
)

NOT_NUMERIC = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- "


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("abc", NOT_NUMERIC + "abc"),
        ("-1k", NOT_NUMERIC + "-1k"),
        ("-", NOT_NUMERIC + "-"),
        ("-1", "Parsing error: argument too large -- -1"),
        ("-0", "Parsing error: argument too large -- -0"),
        ("8E", "Parsing error: argument too large -- 8E"),
        ("0x8000000000000000", "Parsing error: argument too large -- 0x8000000000000000"),
    ],
)
def test_what_is_no_number(text: str, complaint: str) -> None:
    with pytest.raises(CommandFailed) as failure:
        number(text)
    assert str(failure.value) == complaint


def test_the_largest_number() -> None:
    assert number("0x7fffffffffffffff") == (1 << 63) - 1


def test_requests_have_a_longest_length() -> None:
    assert length(str(MAX_REQUEST)) == total_length(["1G", str(MAX_REQUEST - (1 << 30))])
    with pytest.raises(CommandFailed, match=r"^length cannot exceed 2147483136, given 2G$"):
        length("2G")
    with pytest.raises(CommandFailed, match=r"^Argument '2G' exceeds maximum size 2147483136$"):
        total_length(["512", "2G"])
    with pytest.raises(CommandFailed, match=r"^The total number of bytes exceed the maximum size"):
        total_length(["1G", "1G"])


def test_integers_are_read_as_in_c() -> None:
    texts = {"0": 0, "10": 10, "010": 8, "0x1F": 31, "-3": -3, "+3": 3, " 7": 7}
    assert {text: c_integer(text) for text in texts} == texts
    for text in ("", "0x", "08", "1k", "1_0", "x", "--1", "1 "):
        assert c_integer(text) is None


def test_patterns_are_bytes() -> None:
    assert [pattern_byte(text) for text in ("0", "255", "0xcd")] == [0, 255, 0xCD]
    for text in ("256", "-1", "x", "0x100"):
        with pytest.raises(CommandFailed, match=rf"^{text} is not a valid pattern byte$"):
            pattern_byte(text)


def test_sectors() -> None:
    check_sector_aligned(512, 1024)
    with pytest.raises(CommandFailed, match=r"^3 is not a sector-aligned value for 'offset'$"):
        check_sector_aligned(3, 3)
    with pytest.raises(CommandFailed, match=r"^3 is not a sector-aligned value for 'count'$"):
        check_sector_aligned(0, 3)
