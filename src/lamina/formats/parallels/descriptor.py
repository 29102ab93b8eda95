"""``DiskDescriptor.xml``: the images that a bundle consists of (``docs/interop/prl-xml.rst``).

A bundle (``disk.hdd``) is a directory with this file and images: a root, and overlays, which hold
what changed since the snapshot that is their parent. The guest writes to the one on top.
"""

from __future__ import annotations

import re

from lamina.errors import ImageCorrupt, ImageUnsupported
from lamina.formats.parallels.layout import DESCRIPTOR_ROOT, MAX_SECTORS
from lamina.hints import TYPE_CHECKING, NoReturn
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.xmltext import Element

MAX_SIZE = 4 << 20
"""Bytes of a descriptor: usual are a few thousand."""
MAX_IMAGES = 256
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
"""The image on top, where the descriptor does not say otherwise."""
NOBODY = "{00000000-0000-0000-0000-000000000000}"
_GUID = re.compile(r"\{[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\}")


@dataclass(frozen=True)
class Image:
    guid: str
    filename: str
    plain: bool
    """Raw; only a root may be."""


@dataclass(frozen=True)
class Descriptor:
    sectors: int
    """Of the disk."""
    cluster_sectors: int
    images: dict[str, Image]
    """By GUID."""
    parents: dict[str, str]
    """GUID of an image -> that of its parent; in the order of the descriptor."""
    top: str

    def chain(self, guid: str) -> list[Image]:
        """The images that a state of the disk consists of, topmost first. Raises ImageCorrupt."""
        found: list[Image] = []
        while guid != NOBODY:
            image = self.images.get(guid)
            if image is None:
                _bad(f"There is no image {guid}", "Shot")
            if len(found) == len(self.images):
                _bad("The snapshots lead back to themselves", "ParentGUID")
            found.append(image)
            guid = self.parents.get(guid, NOBODY)
        if any(image.plain for image in found[:-1]):
            _bad("An overlay is a plain image", "Type")
        return found


def parse_descriptor(data: bytes) -> Descriptor:
    """Raises ImageCorrupt or ImageUnsupported."""
    from lamina.block.xmltext import parse_xml

    root = parse_xml(data)
    if root.name != DESCRIPTOR_ROOT:
        _bad(f"The root element is not {DESCRIPTOR_ROOT}", "root element")
    disk = root.find("Disk_Parameters")
    if disk is None:
        _bad("Disk_Parameters are missing", "Disk_Parameters")
    sectors = _number(disk, "Disk_size", MAX_SECTORS)
    if disk.find("Padding") is not None and _number(disk, "Padding", 1) != 0:
        raise ImageUnsupported("Padded disks are not supported", format="parallels")
    storages = root.find("StorageData")
    found = storages.all("Storage") if storages is not None else []
    if not found:
        _bad("There is no Storage", "StorageData")
    if len(found) > 1:
        raise ImageUnsupported("Split images are not supported", format="parallels")
    storage = found[0]
    start, end = (_number(storage, name, MAX_SECTORS) for name in ("Start", "End"))
    if (start, end) != (0, sectors):
        raise ImageUnsupported("The storage is not the whole disk", format="parallels")
    images = [_image(one) for one in storage.all("Image")]
    if len(images) > MAX_IMAGES:
        _bad(f"There are more than {MAX_IMAGES} images", "Image")
    parents, top = _snapshots(root)
    return Descriptor(
        sectors,
        _number(storage, "Blocksize", MAX_SECTORS),
        {image.guid: image for image in images},
        parents,
        top,
    )


def _image(element: Element) -> Image:
    kind = _text(element, "Type")
    if kind not in ("Plain", "Compressed"):
        raise ImageUnsupported(f"Image type '{kind[:40]}' is not supported", format="parallels")
    name = _text(element, "File")
    if ":" in name.partition("/")[0]:
        _bad("File names no local file", "File")
    return Image(_guid(element, "GUID"), name, kind == "Plain")


def _snapshots(root: Element) -> tuple[dict[str, str], str]:
    snapshots = root.find("Snapshots")
    if snapshots is None:
        return {}, TOP
    shots = snapshots.all("Shot")
    if len(shots) > MAX_IMAGES:
        _bad(f"There are more than {MAX_IMAGES} snapshots", "Shot")
    parents = {_guid(shot, "GUID"): _guid(shot, "ParentGUID") for shot in shots}
    return parents, _guid(snapshots, "TopGUID") if snapshots.find("TopGUID") else TOP


def _text(parent: Element, name: str) -> str:
    element = parent.find(name)
    text = element.text.strip() if element is not None else ""
    if not text:
        _bad(f"{parent.name} has no {name}", name)
    return text


def _number(parent: Element, name: str, most: int) -> int:
    text = _text(parent, name)
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > most:
        _bad(f"{name} is no sensible number", name)
    return int(text)


def _guid(parent: Element, name: str) -> str:
    text = _text(parent, name).lower()
    if not _GUID.fullmatch(text):
        _bad(f"{name} of {parent.name} is no GUID", name)
    return text


def _bad(message: str, field: str) -> NoReturn:
    raise ImageCorrupt(message, format="parallels", structure="disk descriptor", field=field)
