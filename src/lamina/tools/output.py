"""What the tools print: JSON and trees of values for people, in QEMU's manner.

The standard library's ``json`` would do, but importing it costs a tenth of what ``info`` may take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lamina.hints import Any

_ESCAPES = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def to_json(value: Any, depth: int = 0) -> str:
    """Indented by 4; an empty object or list opens and closes on two lines."""
    if isinstance(value, str):
        return json_string(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        inside = [f"{json_string(key)}: {to_json(item, depth + 1)}" for key, item in value.items()]
        opening, closing = "{", "}"
    elif isinstance(value, list | tuple):
        inside = [to_json(item, depth + 1) for item in value]
        opening, closing = "[", "]"
    else:
        return str(value)
    if not inside:
        return f"{opening}\n{'    ' * depth}{closing}"
    indent = "\n" + "    " * (depth + 1)
    return f"{opening}{indent}{f',{indent}'.join(inside)}\n{'    ' * depth}{closing}"


def json_string(text: str) -> str:
    """Quoted and plain ASCII; what is no text (bytes of a file name) becomes U+FFFD."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    return f'"{"".join(_escaped(letter) for letter in text)}"'


def _escaped(letter: str) -> str:
    if letter in _ESCAPES:
        return _ESCAPES[letter]
    code = ord(letter)
    if 0x20 <= code < 0x7F:
        return letter
    if 0xD800 <= code < 0xE000:
        return "\\uFFFD"
    if code < 0x10000:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"


def tree_lines(value: Mapping[str, Any] | list[Any], indent: str) -> Iterator[str]:
    """``compression type: zlib`` for ``{"compression-type": "zlib"}``; what has parts of its own
    follows on lines indented by four more, the entries of a list as ``[0]:``, ``[1]:``."""
    entries: Iterator[tuple[str, Any]]
    if isinstance(value, Mapping):
        entries = ((key.replace("-", " "), item) for key, item in value.items())
    else:
        entries = ((f"[{number}]", item) for number, item in enumerate(value))
    for label, item in entries:
        if isinstance(item, Mapping | list):
            yield f"{indent}{label}:"
            yield from tree_lines(item, indent + "    ")
        elif isinstance(item, bool):
            yield f"{indent}{label}: {'true' if item else 'false'}"
        else:
            yield f"{indent}{label}: {item}"
