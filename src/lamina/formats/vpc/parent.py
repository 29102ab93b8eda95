"""The parent of a differencing image: how it is named, and that it is the right one.

Section "Differencing Hard Disk Images". Names are paths of Windows; the relative one is preferred,
for images travel. An absolute one that begins with a drive stands for a file beside the image where
there are no drives.
"""

from __future__ import annotations

import ntpath
import os
import sys
from urllib.parse import unquote, urlsplit

from lamina.block.filenames import (
    combine,
    full_backing_filename,
    local_file,
    protocol_prefix,
)
from lamina.block.node import NodeOptions
from lamina.engine.disk import Disk
from lamina.errors import ImageCorrupt, ImageUnsupported, UsageError
from lamina.formats.vpc.footer import find_footer
from lamina.formats.vpc.layout import EPOCH, Header, Locator
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass, replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node

RELATIVE, ABSOLUTE, URL = b"W2ru", b"W2ku", b"MacX"
MAX_NAME = 4096
"""Bytes of a locator's data that are looked at."""


def parent_filename(file: Node, header: Header) -> str | None:
    """The name of the parent as a file name here, None if there is none that can be read."""
    names: dict[bytes, str] = {}
    for locator in header.locators:
        inside = 0 < locator.length <= MAX_NAME
        if locator.code in names or not inside or locator.offset + locator.length > file.size:
            continue
        data = file.read(locator.offset, locator.length)
        encoding = "utf-8" if locator.code == URL else "utf-16-le"
        names[locator.code] = data.decode(encoding, "replace").split("\0")[0]
    if names.get(RELATIVE):
        name = _relative(names[RELATIVE])
    elif names.get(ABSOLUTE):
        name = _absolute(names[ABSOLUTE])
    elif names.get(URL):
        name = unquote(urlsplit(names[URL]).path)
    else:
        name = _absolute(header.parent_name)
    # All of these are paths: none of them asks for a protocol.
    return f"./{name}" if protocol_prefix(name) is not None else name or None


def _relative(name: str) -> str:
    if sys.platform != "win32":
        name = name.replace("\\", "/")
    return name.removeprefix("./").removeprefix(".\\")


def _absolute(name: str) -> str:
    if sys.platform == "win32" or name.startswith("/"):
        return name
    return ntpath.basename(name)


def locator_names(filename: str, image: str) -> list[tuple[bytes, bytes]]:
    """Platform codes and data of the locators for a parent named ``filename`` by ``image``.

    Raises UsageError for a name that is not that of a local file.
    """
    path = local_file(combine(image, filename))
    if path is None:
        raise UsageError(
            f"The parent '{filename}' of a VHD image must be a local file", field="backing_file"
        )
    names: list[tuple[bytes, bytes]] = []
    if not os.path.isabs(filename):
        relative = filename.replace("/", "\\")
        if not relative.startswith(("..\\", ".\\")):
            relative = ".\\" + relative
        names.append((RELATIVE, relative.encode("utf-16-le", "surrogatepass")))
    names.append((ABSOLUTE, os.path.abspath(path).encode("utf-16-le", "surrogatepass")))
    if any(len(data) > MAX_NAME for _, data in names):
        raise UsageError("Backing file name too long", field="backing_file")
    return names


@dataclass(frozen=True)
class Linkage:
    """What tells a parent from other images."""

    unique_id: bytes
    changed_at: int
    """When its file was last written to, as VHD counts time; 0: nobody knows."""


def linkage(parent: Node) -> Linkage:
    """Of an image that is open. Raises UsageError for other formats."""
    identity = parent_id(parent)
    if identity is None:
        raise UsageError(
            f"The parent of a VHD image must be a VHD image, not {parent.unfiltered.driver}",
            field="backing_fmt",
        )
    return Linkage(identity, _changed_at(parent.unfiltered.file))


def describe(
    header: Header, parent: Linkage, filename: str, image: str, offset: int
) -> tuple[Header, bytes]:
    """The header of ``image`` with the parent named ``filename``, and the data of its locators, to
    be written at ``offset``: whole sectors. Raises UsageError."""
    locators: list[Locator] = []
    content = b""
    for code, data in locator_names(filename, image):
        space = round_up(len(data), SECTOR)
        locators.append(Locator(code, space // SECTOR, len(data), offset + len(content)))
        content += data.ljust(space, b"\0")
    return (
        replace(
            header,
            parent_id=parent.unique_id,
            parent_timestamp=parent.changed_at,
            parent_name=os.path.basename(filename)[:255],
            locators=tuple(locators),
        ),
        content,
    )


def _changed_at(file: Node) -> int:
    path = local_file(file.filename)
    try:
        return 0 if path is None else max(int(os.stat(path).st_mtime) - EPOCH, 0)
    except OSError:
        return 0


def parent_id(parent: Node) -> bytes | None:
    """The unique id of a VHD image; None for other images."""
    from lamina.formats.vpc.mapping import VpcMapping

    layer = parent.unfiltered
    if isinstance(layer, Disk) and isinstance(layer.mapping, VpcMapping):
        return layer.mapping.footer.unique_id
    return None


def linkage_by_name(disk: Disk, filename: str) -> Linkage:
    """Of an image that is opened for no more than this. Raises ImageUnsupported for other formats,
    and what opening raises."""
    file = disk.context.open_child(
        "parent",
        node_options=NodeOptions(read_only=True, force_share=True),
        filename=full_backing_filename(disk, filename),
    )
    try:
        return Linkage(find_footer(file)[0].unique_id, _changed_at(file))
    except ImageCorrupt:
        raise ImageUnsupported("The backing file of a vpc image must be one as well") from None
    finally:
        file.close_unused()


def check_parent(header: Header, parent: Node) -> None:
    """Raises ImageCorrupt if ``parent`` is another VHD image than the one that was the parent."""
    found = parent_id(parent)
    if found is not None and found != header.parent_id:
        raise ImageCorrupt(
            "The backing file is not the parent of this VHD image (its unique id differs)",
            path=parent.filename,
            format="vpc",
            structure="dynamic header",
            field="parent_unique_id",
            offset=40,
        )
