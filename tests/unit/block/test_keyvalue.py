from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.block.keyvalue import flatten, has_help, nest, parse_keyvalue, split_pairs, subset


def test_commas_separate_and_doubled_ones_do_not() -> None:
    assert split_pairs("a=1,b=x,,y,a=2") == [("a", "1"), ("b", "x,y"), ("a", "2")]
    assert parse_keyvalue("a=1,b=x,,y,a=2,") == {"a": "2", "b": "x,y"}
    assert parse_keyvalue("") == {}
    assert parse_keyvalue("a==,b=") == {"a": "=", "b": ""}


def test_the_first_word_may_be_a_value() -> None:
    assert parse_keyvalue("disk,a=1", "file") == {"file": "disk", "a": "1"}
    assert parse_keyvalue("a=1,disk", "file") == {"a": "1", "disk": "on"}


def test_switches_without_a_value_are_deprecated() -> None:
    said: list[str] = []
    assert parse_keyvalue("read-only,nocache", warn=said.append) == {
        "read-only": "on",
        "cache": "off",
    }
    assert said == [
        "warning: short-form boolean option 'read-only' deprecated\n"
        "Please use read-only=on instead",
        "warning: short-form boolean option 'nocache' deprecated\nPlease use cache=off instead",
    ]


@pytest.mark.parametrize(
    ("text", "asks"),
    [("help", True), ("a=1,?", True), ("help,a=1", True), ("a=help", False), ("a=1,,help", False)],
)
def test_help(text: str, asks: bool) -> None:
    assert has_help(text) is asks


@given(st.lists(st.tuples(st.text("abcx.?"), st.text("xyz,=.?"))))
def test_whatever_is_escaped_comes_back(pairs: list[tuple[str, str]]) -> None:
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in pairs)
    assert split_pairs(text) == pairs


def test_flatten_and_nest() -> None:
    tree: dict[str, Any] = {"a": {"b": [1, {"c": None}]}, "d": "x"}
    flat = {"a.b.0": 1, "a.b.1.c": None, "d": "x"}
    assert flatten(tree) == flat
    assert nest(flat) == tree
    assert subset(flat, "a.b.") == {"0": 1, "1.c": None}


def test_nested_wins_over_dotted_and_empty_ones_stay() -> None:
    assert flatten({"a": {"b": 1}, "a.b": 2, "e": {}, "l": []}) == {"a.b": 1, "e": {}, "l": []}


def test_depth_does_not_matter() -> None:
    tree: Any = 1
    for _ in range(5000):
        tree = {"a": tree}
    assert flatten(tree) == {".".join(["a"] * 5000): 1}
