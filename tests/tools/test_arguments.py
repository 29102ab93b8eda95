"""Command lines, read as ``getopt_long`` reads them."""

from __future__ import annotations

import pytest

from lamina.errors import UsageError
from lamina.tools.arguments import (
    GetoptError,
    Option,
    WrongUsage,
    image_size,
    number,
    option_list,
    parse,
)

OPTIONS = (
    Option("h", "help"),
    Option("q", "quiet"),
    Option("f", "format", "FMT"),
    Option("", "force"),
    Option("n", "", "COUNT", read=int),
)


@pytest.mark.parametrize(
    ("line", "given", "operands"),
    [
        ("a -q b", [("quiet", True)], ["a", "b"]),
        ("-qf raw x", [("quiet", True), ("format", "raw")], ["x"]),
        ("-fraw x", [("format", "raw")], ["x"]),
        ("--format=raw", [("format", "raw")], []),
        ("--format raw -f qcow2", [("format", "raw"), ("format", "qcow2")], []),
        ("--format=", [("format", "")], []),
        ("--form raw", [("format", "raw")], []),
        ("--quiet -- -q --help", [("quiet", True)], ["-q", "--help"]),
        ("- -q", [("quiet", True)], ["-"]),
        ("-n5", [("n", 5)], []),
        ("-f --quiet", [("format", "--quiet")], []),
    ],
)
def test_reads(line: str, given: list[tuple[str, object]], operands: list[str]) -> None:
    parsed = parse(line.split(), OPTIONS)
    assert parsed.given == given
    assert parsed.operands == operands


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--nope", "unrecognized option '--nope'"),
        ("--nope=1", "unrecognized option '--nope=1'"),
        ("-x", "invalid option -- 'x'"),
        ("-qx", "invalid option -- 'x'"),
        ("-f", "option requires an argument -- 'f'"),
        ("--format", "option '--format' requires an argument"),
        ("--form", "option '--format' requires an argument"),
        ("--quiet=1", "option '--quiet' doesn't allow an argument"),
        ("--fo", "option '--fo' is ambiguous; possibilities: '--format' '--force'"),
    ],
)
def test_refuses(line: str, message: str) -> None:
    with pytest.raises(GetoptError) as caught:
        parse(line.split(), OPTIONS)
    assert str(caught.value) == message


def test_help_ends_the_reading() -> None:
    parsed = parse(["-q", "--help", "--nonsense"], OPTIONS, stop_at=("help",))
    assert parsed.flag("help")
    with pytest.raises(GetoptError):
        parse(["--nonsense", "--help"], OPTIONS, stop_at=("help",))


def test_an_operand_may_end_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["-q", "info", "-f", "raw"]
    assert parse(line, OPTIONS, permute=False).operands == ["info", "-f", "raw"]
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    assert parse(line, OPTIONS).operands == ["info", "-f", "raw"]


def test_the_last_of_repeated_options_counts() -> None:
    parsed = parse(["-f", "raw", "-f", "qcow2"], OPTIONS)
    assert parsed.value("format") == "qcow2"
    assert parsed.values("format") == ["raw", "qcow2"]
    assert parsed.value("n", 7) == 7


@pytest.mark.parametrize("text", ["", ",", ",a=1", "a=1,", "a=1,,,"])
def test_lists_of_options_have_no_empty_ends(text: str) -> None:
    with pytest.raises(UsageError, match="Invalid option list"):
        option_list(text)


def test_sizes() -> None:
    assert image_size("1.5k") == 1536
    assert number("count", 1, 16)("0x10") == 16
    for text in ("-1", "9E"):
        with pytest.raises(UsageError, match="Must be between 0 and 9223372036854775807"):
            image_size(text)
    with pytest.raises(UsageError, match=r"^Invalid count specified: '1x'\.$"):
        number("count")("1x")


def test_wrong_usage_is_a_usage_error_of_its_own() -> None:
    assert issubclass(WrongUsage, UsageError)
    assert not issubclass(GetoptError, WrongUsage)
