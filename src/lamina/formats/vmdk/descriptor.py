"""The descriptor: a text that says which extents a disk is made of, and what its parent is.

"Virtual Disk Format 5.0", section "The Descriptor File". It stands in a file of its own or inside
of the only extent. What is not understood is kept as it is.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence

from lamina.errors import ImageCorrupt, ImageUnsupported, StorageError
from lamina.hints import NamedTuple
from lamina.records import dataclass
from lamina.units import SECTOR

MAX_SIZE = 2 << 20
"""Bytes that are read of one."""
MAX_EXTENTS = 1 << 16
"""128 TiB, where they are split."""
MAX_NAME = 511
"""Bytes of the name of an extent."""
NO_PARENT = 0xFFFFFFFF

FLAT, VMFS, ZERO = "FLAT", "VMFS", "ZERO"
SPARSE, VMFS_SPARSE, SE_SPARSE = "SPARSE", "VMFSSPARSE", "SESPARSE"
_TYPES = (FLAT, VMFS, ZERO, SPARSE, VMFS_SPARSE, SE_SPARSE)

TEXT_TYPES = (
    "monolithicFlat",
    "vmfs",
    "vmfsSparse",
    "seSparse",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
)
"""Kinds of disks whose descriptor is a file of its own."""

_EXTENT = re.compile(
    r'\s*(?P<access>RW|RDONLY|NOACCESS)\s+(?P<sectors>\d+)\s+(?P<type>\w+)'
    r'(?:\s+"(?P<name>[^"]*)"(?:\s+(?P<offset>\S+))?)?(?:\s.*)?'
)
_EXTENT_LINE = re.compile(r"^[ \t]*(?:RW|RDONLY|NOACCESS)(?:[ \t].*)?$", re.MULTILINE)
_DIGITS = 18
"""Of a number of sectors: more cannot be one of a disk."""


class ExtentLine(NamedTuple):
    """One line of the extent description."""

    access: str
    """RW, RDONLY or NOACCESS."""
    length: int
    """Guest bytes."""
    type: str
    name: str = ""
    """Of the file; ZERO has none."""
    offset: int = 0
    """FLAT: bytes in the file before the first one of the extent."""

    def __str__(self) -> str:
        text = f"{self.access} {self.length // SECTOR} {self.type}"
        if self.type != ZERO:
            text += f' "{self.name}"'
        if self.type == FLAT:
            text += f" {self.offset // SECTOR}"
        return text


@dataclass(frozen=True)
class Descriptor:
    text: str
    cid: int
    """Changes with the content, so that children notice."""
    parent_cid: int
    create_type: str
    parent_name: str | None
    extents: tuple[ExtentLine, ...]

    @property
    def size(self) -> int:
        """Guest bytes of all extents."""
        return sum(line.length for line in self.extents)

    def encoded(self) -> bytes:
        return self.text.encode("utf-8", "surrogateescape")

    def with_cid(self, cid: int) -> Descriptor:
        return parse(_replaced(self.text, "CID", f"{cid:08x}"))

    def with_parent_cid(self, cid: int) -> Descriptor:
        return parse(_replaced(self.text, "parentCID", f"{cid:08x}"))

    def with_extents(self, extents: Sequence[ExtentLine]) -> Descriptor:
        """The same disk with other extents, and the geometry that goes with their size."""
        lines = self.text.split("\n")
        places = [number for number, line in enumerate(lines) if _EXTENT_LINE.match(line)]
        ending = "\r" if lines[places[0]].endswith("\r") else ""
        kept = [line for number, line in enumerate(lines) if number not in places]
        kept[places[0] : places[0]] = [f"{line}{ending}" for line in extents]
        text = "\n".join(kept)
        heads = _number(text, "ddb.geometry.heads")
        sectors = _number(text, "ddb.geometry.sectors")
        if heads and sectors:
            size = sum(line.length for line in extents)
            cylinders = size // SECTOR // (heads * sectors)
            text = _replaced(text, "ddb.geometry.cylinders", f'"{cylinders}"')
        return parse(text)


def new_cid() -> int:
    """Any number but the one that means "none"."""
    while True:
        cid = int.from_bytes(os.urandom(4), "little")
        if cid != NO_PARENT:
            return cid


def parse_bytes(data: bytes) -> Descriptor:
    """Of the bytes where a descriptor should be, those before the first NUL. Raises as ``parse``.
    """
    return parse(data.partition(b"\0")[0].decode("utf-8", "surrogateescape"))


def parse(text: str) -> Descriptor:
    """Raises ImageCorrupt, or StorageError (EFBIG) if the disk is larger than can be."""
    create_type = _value(text, "createType")
    cid = _cid(text, "CID")
    if create_type is None or cid is None:
        raise ImageCorrupt(
            "invalid VMDK image descriptor",
            format="vmdk",
            structure="descriptor",
            field="CID" if cid is None else "createType",
            errno=errno.EINVAL,
        )
    parent_cid = _cid(text, "parentCID")
    lines = [found[0].rstrip("\r") for found in _EXTENT_LINE.finditer(text)]
    if len(lines) > MAX_EXTENTS:
        raise ImageUnsupported(
            f"A disk of {len(lines)} extents",
            format="vmdk",
            structure="descriptor",
            field="extents",
        )
    extents = tuple(_extent(line) for line in lines)
    if sum(line.length for line in extents) >= 1 << 63:
        raise StorageError("File too large", errno=errno.EFBIG)
    return Descriptor(
        text,
        cid,
        NO_PARENT if parent_cid is None else parent_cid,
        create_type,
        _value(text, "parentFileNameHint") or None,
        extents,
    )


def check_stand_alone(descriptor: Descriptor) -> None:
    """Raises ImageUnsupported or ImageCorrupt unless a file may consist of this descriptor only."""
    if descriptor.create_type not in TEXT_TYPES:
        raise ImageUnsupported(
            f"Unsupported image type '{descriptor.create_type}'",
            format="vmdk",
            structure="descriptor",
            field="createType",
        )
    if not descriptor.extents:
        raise ImageCorrupt(
            "invalid VMDK image descriptor",
            format="vmdk",
            structure="descriptor",
            field="extents",
        )


def _extent(line: str) -> ExtentLine:
    found = _EXTENT.fullmatch(line)
    invalid = ImageCorrupt(
        f"Invalid extent line: {line.strip()[:MAX_NAME]}",
        format="vmdk",
        structure="descriptor",
        field="extents",
        errno=errno.EINVAL,
    )
    if found is None or found["type"] not in _TYPES or len(found["sectors"]) > _DIGITS:
        raise invalid
    access, type, name, offset = found["access"], found["type"], found["name"], found["offset"]
    length = int(found["sectors"]) * SECTOR
    if not length:
        raise invalid
    if type == ZERO:
        return ExtentLine(access, length, type)
    if not name or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME or "\0" in name:
        raise invalid
    if type != FLAT:
        if offset is not None:
            raise invalid
        return ExtentLine(access, length, type, name)
    if offset is None or not offset.isascii() or not offset.isdigit() or len(offset) > _DIGITS:
        raise invalid
    start = int(offset) * SECTOR
    if start + length >= 1 << 63:
        raise invalid
    return ExtentLine(access, length, type, name, start)


# -- keys and values ------------------------------------------------------------------------------


def _pattern(key: str) -> re.Pattern[str]:
    before = rf"^([ \t]*{re.escape(key)}[ \t]*=[ \t]*)"
    return re.compile(before + r'("[^"\r\n]*"|[^"\r\n]*)', re.MULTILINE)


def _value(text: str, key: str) -> str | None:
    """The first one, without quotes."""
    found = _pattern(key).search(text)
    return None if found is None else found[2].strip().strip('"')


def _number(text: str, key: str) -> int:
    """0 if there is none."""
    value = _value(text, key) or ""
    return int(value) if value.isascii() and value.isdigit() and len(value) < _DIGITS else 0


def _cid(text: str, key: str) -> int | None:
    value = _value(text, key)
    if value is None or not re.fullmatch(r"[0-9a-fA-F]{1,8}", value):
        return None
    return int(value, 16)


def _replaced(text: str, key: str, value: str) -> str:
    return _pattern(key).sub(lambda found: found[1] + value, text, count=1)


# -- a new one ------------------------------------------------------------------------------------


def compose(
    create_type: str,
    extents: Sequence[ExtentLine],
    *,
    parent: tuple[str, int] | None = None,
    adapter: str = "ide",
    hardware_version: str = "4",
    tools_version: str = "2147483647",
) -> Descriptor:
    """``parent``: its name and CID."""
    heads, sectors = (16, 63) if adapter == "ide" else (255, 63)
    size = sum(line.length for line in extents)
    hint = f'parentFileNameHint="{parent[0]}"\n' if parent else "\n"
    lines = "\n".join(str(line) for line in extents)
    return parse(
        f"""# Disk DescriptorFile
version=1
CID={new_cid():08x}
parentCID={parent[1] if parent else NO_PARENT:08x}
createType="{create_type}"
{hint}# Extent description
{lines}

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "{hardware_version}"
ddb.geometry.cylinders = "{size // SECTOR // (heads * sectors)}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "{sectors}"
ddb.adapterType = "{adapter}"
ddb.toolsVersion = "{tools_version}"
"""
    )
