from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.block.jsontext import MAX_DEPTH, parse
from lamina.errors import UsageError

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES, st.booleans())
def test_reads_what_the_standard_library_writes(value: Any, ascii: bool) -> None:
    if any(0xD800 <= ord(letter) < 0xE000 for letter in json.dumps(value, ensure_ascii=False)):
        return
    assert parse(json.dumps(value, ensure_ascii=ascii)) == value


def test_single_quotes() -> None:
    assert parse("{'a': 'x\"y', \"b\": 'it\\'s'}") == {"a": 'x"y', "b": "it's"}


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ("", "Expecting a JSON value"),
        (" \n", "Expecting a JSON value"),
        ("{", "premature EOI"),
        ('{"a":', "premature EOI"),
        ('{"a":1,', "premature EOI"),
        ('{"a":}', "expecting value"),
        ('{"a":1,}', "expecting value"),
        ('{"a" 1}', "missing : in object pair"),
        ("{a:1}", "invalid keyword 'a'"),
        ("{1:1}", "key is not a string in object"),
        ('{"a":1 "b":2}', "expected separator in dict"),
        ('{"a":[1 2]}', "expected separator in list"),
        ('{"a":1}}', "Expecting at most one JSON value"),
        ('{"a":1, "a":2}', "duplicate key"),
        ('{"a":True}', "stray 'T'"),
        ('{"a":01}', "stray '01'"),
        ('{"a":1.}', "stray '1.}'"),
        ('{"a":"x', "stray '\"x'"),
        ('{"a":"\\q"}', "invalid escape sequence in string"),
        ('{"a":"\\ud800"}', "\\ud800 is not a valid Unicode character"),
        ('{"a":"\\u12"}', '\\u12" is not a valid Unicode character'),
    ],
)
def test_mistakes(text: str, trouble: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value).removeprefix("JSON parse error, ") == trouble


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded(start: str, end: str) -> None:
    deep = start * MAX_DEPTH + ("1" if start != "[" else "") + end * MAX_DEPTH
    parse(deep)
    with pytest.raises(UsageError, match="depth limit"):
        parse(start * 100_000)


@given(st.text(alphabet="{}[]:,'\"\\u0129e.-+ tfnalsruex\x00\ud800"))
def test_never_anything_but_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse(text)
