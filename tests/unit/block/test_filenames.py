from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lamina.block import filenames
from lamina.errors import UsageError


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("disk", None),
        ("a/b:c", None),
        ("./a:b", None),
        ("a:b", "a"),
        (":x", ""),
        ("nbd://host/x", "nbd"),
        ("json:{}", "json"),
    ],
)
def test_prefixes(name: str, prefix: str | None) -> None:
    assert filenames.protocol_prefix(name) == prefix


def test_letters_are_drives_on_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert filenames.protocol_prefix("c:disk") == "c"
    monkeypatch.setattr(sys, "platform", "win32")
    assert filenames.protocol_prefix("c:disk") is None
    assert filenames.protocol_prefix("dir\\x:disk") is None
    assert filenames.directory_part("c:\\dir\\disk") == "c:\\dir\\"


def test_what_names_open(tmp_path: Path) -> None:
    assert filenames.protocol_options("file:a:b") == {"driver": "file", "filename": "./a:b"}
    assert filenames.protocol_options("file:a") == {"driver": "file", "filename": "a"}
    assert filenames.protocol_options("null-co://") == {"driver": "null-co"}
    with pytest.raises(UsageError, match="Unknown protocol 'a'"):
        filenames.protocol_options("a:b")


@pytest.mark.parametrize(
    ("base", "name", "combined"),
    [
        ("top.qcow2", "base", "base"),
        ("dir/top.qcow2", "base", "dir/base"),
        ("dir/top.qcow2", "../base", "dir/../base"),
        ("/a/top", "/b/base", "/b/base"),
        ("dir/top", "nbd://host/x", "nbd://host/x"),
        ("file:dir/top", "base", "file:dir/base"),
        ("http://host/dir/top", "base", "http://host/dir/base"),
        ("http://host", "base", "http://host/base"),
        ("ssh://host/top", "sub/base", "ssh://host/sub/base"),
        ("nbd:top", "base", "nbd:base"),
    ],
)
def test_relative_names(base: str, name: str, combined: str) -> None:
    assert filenames.combine(base, name) == combined


def test_json_names() -> None:
    assert filenames.parse_json("json:{'file': {'driver': 'x'}, 'file.a': 1}") == {
        "file.driver": "x",
        "file.a": 1,
    }
    with pytest.raises(UsageError, match="Could not parse the JSON options: JSON parse error, "):
        filenames.parse_json("json:{bad}")
    with pytest.raises(UsageError, match="Invalid JSON object given"):
        filenames.parse_json("json:[1]")
    assert filenames.json_filename({"driver": "raw", "file.driver": "x"}) == (
        'json:{"driver": "raw", "file": {"driver": "x"}}'
    )
