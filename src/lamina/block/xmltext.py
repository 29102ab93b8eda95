"""XML out of images, read with care: small trees of elements, and nothing that expands.

Entities are the danger of XML: a few lines that define some in terms of others grow to gigabytes,
and external ones make the reader open files. Documents that define any are refused; so are those
that are nested too deep or have too many elements.
"""

from __future__ import annotations

from xml.parsers import expat

from lamina.errors import ImageCorrupt
from lamina.hints import NoReturn

MAX_DEPTH = 64
MAX_ELEMENTS = 100_000
_BUFFER = 1 << 20
"""Bytes of text that are collected before we are told: fewer, larger pieces."""


class Element:
    """One element. Attributes are not kept: nobody here needs any."""

    __slots__ = ("children", "name", "text")

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = ""
        """All of its own text, without that of its children."""
        self.children: list[Element] = []

    def find(self, *path: str) -> Element | None:
        """The first child of that name, its first child of the next name, …"""
        here = self
        for name in path:
            for child in here.children:
                if child.name == name:
                    here = child
                    break
            else:
                return None
        return here

    def all(self, name: str) -> list[Element]:
        return [child for child in self.children if child.name == name]


def parse_xml(data: bytes) -> Element:
    """The root element. Raises ImageCorrupt."""
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.buffer_size = _BUFFER
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.EntityDeclHandler = reader.entity
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ImageCorrupt(f"Malformed XML: {error}") from None
    assert reader.root is not None
    return reader.root


class _Reader:
    def __init__(self) -> None:
        self.root: Element | None = None
        self._open: list[Element] = []
        self._texts: list[list[str]] = []
        self._count = 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._count += 1
        if self._count > MAX_ELEMENTS:
            raise ImageCorrupt(f"The XML has more than {MAX_ELEMENTS} elements")
        if len(self._open) == MAX_DEPTH:
            raise ImageCorrupt(f"The XML is nested deeper than {MAX_DEPTH} levels")
        element = Element(name)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)
        self._texts.append([])

    def end(self, name: str) -> None:
        self._open.pop().text = "".join(self._texts.pop())

    def characters(self, text: str) -> None:
        self._texts[-1].append(text)

    def entity(self, name: str, *_: object) -> NoReturn:
        raise ImageCorrupt("The XML defines entities, which are not expanded")
