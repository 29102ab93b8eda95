"""JSON as QEMU reads it: strings may stand in single quotes as well, and its words for mistakes.

The standard library's parser takes no single quotes, and people write ``json:{'driver':'qcow2'}``
because shells make the other ones hard to type.
"""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.hints import Any

MAX_DEPTH = 1024

_BLANKS = " \t\r\n"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")
_ESCAPES = {
    '"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"
}
_KEYWORDS = {"true": True, "false": False, "null": None}
_END = ("end", None)

_Token = tuple[str, Any]
"""Kind (``value``, ``string``, ``word``, one of ``{}[],:``, ``end``) and value."""


def parse(text: str) -> Any:
    """The one value in ``text``. Raises UsageError."""
    reader = _Reader(text)
    first = reader.next()
    if first == _END:
        raise UsageError("Expecting a JSON value")
    value = _value(reader, first)
    if reader.rest().strip(_BLANKS):
        raise UsageError("Expecting at most one JSON value")
    return value


def _value(reader: _Reader, token: _Token) -> Any:
    """The value that begins with ``token``. Open objects and lists are kept on a stack of our own:
    text from strangers must not be able to exhaust Python's."""
    # Each level: the container, and for objects the key whose value comes next.
    levels: list[tuple[Any, str]] = []
    while True:
        kind, value = token
        if kind in "{[" and kind:
            if len(levels) >= MAX_DEPTH:
                raise UsageError("JSON nesting depth limit exceeded")
            container: Any = {} if kind == "{" else []
            token = reader.next()
            if token[0] == ("}" if kind == "{" else "]"):
                value = container
            else:
                key = ""
                if kind == "{":
                    key = _key(reader, token, container)
                    token = reader.next()
                levels.append((container, key))
                continue
        elif kind == "word":
            if value not in _KEYWORDS:
                raise _error(f"invalid keyword '{value}'")
            value = _KEYWORDS[value]
        elif kind not in ("value", "string"):
            raise _mistake(token, "expecting value")
        # A value is complete: put it where it belongs, and close what it completes.
        while levels:
            container, key = levels.pop()
            is_object = isinstance(container, dict)
            if is_object:
                container[key] = value
            else:
                container.append(value)
            token = reader.next()
            if token[0] == ",":
                token = reader.next()
                if is_object:
                    key = _key(reader, token, container)
                    token = reader.next()
                levels.append((container, key))
                break
            if token[0] != ("}" if is_object else "]"):
                raise _mistake(token, f"expected separator in {'dict' if is_object else 'list'}")
            value = container
        else:
            return value


def _key(reader: _Reader, token: _Token, container: dict[str, Any]) -> str:
    kind, key = token
    if kind == "word":
        raise _error(f"invalid keyword '{key}'")
    if kind != "string":
        is_value = kind in ("value", "{", "[")
        raise _mistake(token, "key is not a string in object" if is_value else "expecting value")
    colon = reader.next()
    if colon[0] != ":":
        raise _mistake(colon, "missing : in object pair")
    if key in container:
        raise _error("duplicate key")
    return str(key)


def _mistake(token: _Token, text: str) -> UsageError:
    return _error("premature EOI" if token == _END else text)


def _error(text: str) -> UsageError:
    return UsageError(f"JSON parse error, {text}")


class _Reader:
    """Cuts a text into tokens."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def rest(self) -> str:
        return self._text[self._position :]

    def next(self) -> _Token:
        text, position = self._text, self._position
        while position < len(text) and text[position] in _BLANKS:
            position += 1
        self._position = position
        if position == len(text):
            return _END
        letter = text[position]
        if letter in "{}[],:":
            self._position += 1
            return (letter, None)
        if letter in "\"'":
            return ("string", self._string(letter))
        if letter in _LETTERS:
            return ("word", self._run(_LETTERS))
        if letter in _DIGITS or letter == "-":
            return ("value", self._number())
        raise _error(f"stray '{letter}'")

    def _run(self, letters: str) -> str:
        start = self._position
        while self._position < len(self._text) and self._text[self._position] in letters:
            self._position += 1
        return self._text[start : self._position]

    def _number(self) -> int | float:
        start = self._position
        if self._text[start] == "-":
            self._position += 1
        whole = self._run(_DIGITS)
        if not whole or (whole[0] == "0" and len(whole) > 1):
            self._stray(start, self._position - len(whole) + 2 if whole else self._position + 1)
        exact = True
        if self._text[self._position : self._position + 1] == ".":
            self._position += 1
            exact = False
            if not self._run(_DIGITS):
                self._stray(start)
        if self._text[self._position : self._position + 1] in ("e", "E"):
            self._position += 1
            exact = False
            if self._text[self._position : self._position + 1] in ("+", "-"):
                self._position += 1
            if not self._run(_DIGITS):
                self._stray(start)
        number = self._text[start : self._position]
        # Integers of more digits than this are none that anything could mean.
        return int(number) if exact and len(number) < 40 else float(number)

    def _stray(self, start: int, end: int | None = None) -> None:
        raise _error(f"stray '{self._text[start : end or self._position + 1]}'")

    def _string(self, quote: str) -> str:
        """The end is looked for first: an unfinished string is that before anything else."""
        start = end = self._position
        while True:
            end += 2 if self._text[end] == "\\" else 1
            if end >= len(self._text):
                raise _error(f"stray '{self._text[start:]}'")
            letter = self._text[end]
            if letter == quote:
                break
            if letter < " " or "\udc80" <= letter <= "\udcff":
                raise _error(f"stray '{self._text[start : end + 1]}'")
        self._position = end + 1
        raw = self._text[start + 1 : end]
        return _unescape(raw) if "\\" in raw else raw


def _unescape(raw: str) -> str:
    parts: list[str] = []
    position = 0
    while position < len(raw):
        letter = raw[position]
        position += 1
        if letter != "\\":
            parts.append(letter)
            continue
        letter = raw[position]
        position += 1
        if letter in _ESCAPES:
            parts.append(_ESCAPES[letter])
        elif letter == "u":
            letter, position = _unicode(raw, position)
            parts.append(letter)
        else:
            raise _error("invalid escape sequence in string")
    return "".join(parts)


def _unicode(raw: str, start: int) -> tuple[str, int]:
    """The character of ``\\uXXXX`` (or of a surrogate pair of them) at ``start``; what follows."""
    unit = _unit(raw, start)
    end = start + 4
    if 0xD800 <= unit < 0xDC00 and raw[end : end + 2] == "\\u":
        second = _unit(raw, end + 2)
        if 0xDC00 <= second < 0xE000:
            return chr(0x10000 + ((unit - 0xD800) << 10) + second - 0xDC00), end + 6
    if 0xD800 <= unit < 0xE000:
        raise _error(f"\\u{raw[start:end]} is not a valid Unicode character")
    return chr(unit), end


def _unit(raw: str, start: int) -> int:
    for end in range(start, start + 4):
        if raw[end : end + 1] not in _HEXADECIMAL:
            shown = raw[start : end + 1] if end < len(raw) else raw[start:] + '"'
            raise _error(f"\\u{shown} is not a valid Unicode character")
    return int(raw[start : start + 4], 16)
