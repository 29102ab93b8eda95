"""XML from strangers: small trees, nothing that expands, nothing that is opened."""

from __future__ import annotations

import time

import pytest

from lamina.block.xmltext import parse_xml
from lamina.errors import ImageCorrupt


def test_trees():
    root = parse_xml(b"<a x='1'>one<b>two<c>&lt;3</c></b><b/>four</a>")
    assert (root.name, root.text) == ("a", "onefour")
    found = root.find("b", "c")
    assert found is not None
    assert found.text == "<3"
    assert root.find("b", "d") is None
    assert [child.text for child in root.all("b")] == ["two", ""]


def test_text_in_many_pieces():
    text = "\n".join(["line"] * 100_000)
    assert parse_xml(f"<a>{text}</a>".encode()).text == text


@pytest.mark.parametrize(
    "declaration",
    [
        b'<!ENTITY a "text">',
        b'<!ENTITY a SYSTEM "file:///etc/passwd">',
        b'<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;',
        b'<!ENTITY a PUBLIC "x" "http://localhost/x">',
    ],
)
def test_entities_are_refused(declaration):
    with pytest.raises(ImageCorrupt, match="The XML defines entities, which are not expanded"):
        parse_xml(b"<!DOCTYPE a [" + declaration + b"]><a>&a;</a>")


def test_a_document_type_that_is_only_named_is_not_fetched():
    root = parse_xml(b'<!DOCTYPE a PUBLIC "-//x" "http://localhost:1/x.dtd"><a>1</a>')
    assert root.text == "1"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<a>",
        b"<a></b>",
        b"\xff\xfe\0",
        b'<?xml version="1.0" encoding="none"?><a/>',
        b'<?xml version="1.0" encoding="utf-7"?><a/>',
        b"<a>&b;</a>",
        b"<a>\0</a>",
    ],
)
def test_malformed(document):
    with pytest.raises(ImageCorrupt, match="Malformed XML"):
        parse_xml(document)


@pytest.mark.parametrize(
    "document", [b"<a>" * 65, b"<a>" + b"<b></b>" * 100_000 + b"</a>", b"<a>" + b"<b>" * 100_000]
)
def test_bounds(document):
    start = time.process_time()
    with pytest.raises(ImageCorrupt):
        parse_xml(document)
    assert time.process_time() - start < 1
