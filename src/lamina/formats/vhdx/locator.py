"""Where a differencing image says that its parent is [2.6.2.6].

A list of keys and values in UTF-16: ``parent_linkage`` is the DataWriteGuid that the parent had,
``relative_path``, ``volume_path`` and ``absolute_win32_path`` are ways to find it, tried in this
order. Windows writes backslashes and ``.\\`` in front of relative names.
"""

from __future__ import annotations

import struct

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.vhdx.layout import guid, guid_text

VHDX_LOCATOR = guid("b04aefb7-d19e-4a81-b789-25b8e9445913")
_HEADER = struct.Struct("<16sHH")
_ENTRY = struct.Struct("<IIHH")
LINKAGE, LINKAGE_2 = "parent_linkage", "parent_linkage2"
RELATIVE, VOLUME, ABSOLUTE = "relative_path", "volume_path", "absolute_win32_path"


def parse(data: bytes) -> dict[str, str]:
    """Raises ImageCorrupt, and ImageUnsupported for locators of other kinds."""
    if len(data) < _HEADER.size:
        raise _corrupt("The VHDX parent locator is too short")
    kind, _, count = _HEADER.unpack_from(data)
    if kind != VHDX_LOCATOR:
        raise ImageUnsupported(
            f"VHDX parent locators of type {guid_text(kind)} are not supported",
            format="vhdx",
            structure="parent locator",
            field="LocatorType",
        )
    if _HEADER.size + count * _ENTRY.size > len(data):
        raise _corrupt(f"The VHDX parent locator has no room for its {count} entries")
    found: dict[str, str] = {}
    for number in range(count):
        entry = _ENTRY.unpack_from(data, _HEADER.size + number * _ENTRY.size)
        key_offset, value_offset, key_length, value_length = entry
        key = _text(data, key_offset, key_length)
        if key in found:
            raise _corrupt(f"The VHDX parent locator has two values for '{key}'")
        found[key] = _text(data, value_offset, value_length)
    return found


def pack(entries: dict[str, str]) -> bytes:
    table, texts = b"", b""
    start = _HEADER.size + len(entries) * _ENTRY.size
    for key, value in entries.items():
        name, text = key.encode("utf-16-le"), value.encode("utf-16-le", "surrogatepass")
        key_at = start + len(texts)
        table += _ENTRY.pack(key_at, key_at + len(name), len(name), len(text))
        texts += name + text
    return _HEADER.pack(VHDX_LOCATOR, 0, len(entries)) + table + texts


def for_parent(filename: str, data_write_guid: bytes) -> dict[str, str]:
    """The entries for a parent that is called ``filename``, as seen from the image."""
    entries = {LINKAGE: f"{{{guid_text(data_write_guid)}}}"}
    if filename.startswith("/") or ":" in filename:
        entries[ABSOLUTE] = filename
    else:
        entries[RELATIVE] = ".\\" + filename.removeprefix("./").replace("/", "\\")
    return entries


def linkages(entries: dict[str, str]) -> list[bytes]:
    """The DataWriteGuids that the parent may have. Raises ImageCorrupt."""
    found = []
    for key in (LINKAGE, LINKAGE_2):
        if key in entries:
            try:
                found.append(guid(entries[key]))
            except ValueError:
                raise _corrupt(f"'{entries[key]}' in the VHDX parent locator is no GUID") from None
    if not found:
        raise _corrupt("The VHDX parent locator has no parent_linkage")
    return found


def filenames(entries: dict[str, str]) -> list[str]:
    """Names of the parent, the first one to be tried first. Raises ImageCorrupt."""
    names = []
    if RELATIVE in entries:
        plain = entries[RELATIVE].replace("\\", "/")
        while plain.startswith("./"):
            plain = plain[2:]
        # A path, whatever it looks like.
        names.append(f"./{plain}" if ":" in plain else plain)
    for key in (VOLUME, ABSOLUTE):
        name = entries.get(key, "")
        # Paths of Windows, on Windows and elsewhere: their colon names no protocol.
        names.append(f"file:{name}" if "\\" in name else name)
    names = [name for name in names if name]
    if not names:
        raise _corrupt("The VHDX parent locator has no path")
    return names


def _text(data: bytes, offset: int, length: int) -> str:
    if not offset or not length or offset + length > len(data):
        raise _corrupt("An entry of the VHDX parent locator lies outside of it")
    try:
        return data[offset : offset + length].decode("utf-16-le", "surrogatepass")
    except UnicodeDecodeError:
        raise _corrupt("A text in the VHDX parent locator is no UTF-16") from None


def _corrupt(message: str) -> ImageCorrupt:
    return ImageCorrupt(message, format="vhdx", structure="parent locator")
