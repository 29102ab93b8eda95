"""What ``info`` says about a qcow2 image, from its header alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lamina.block.extents import Columns, Extent
from lamina.block.filenames import full_backing_filename
from lamina.block.info import NodeInfo, SnapshotInfo
from lamina.engine.mapping import Mapping, Reservation
from lamina.engine.metadata import Metadata
from lamina.errors import ImageUnsupported
from lamina.formats.qcow2.layout import (
    AUTOCLEAR_RAW_DATA_FILE,
    COMPAT_LAZY_REFCOUNTS,
    CRYPT_NONE,
    INCOMPAT_CORRUPT,
    INCOMPAT_DIRTY,
    Header,
)
from lamina.hints import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.engine.disk import Disk
    from lamina.formats.qcow2.bitmap_layout import BitmapEntry
    from lamina.formats.qcow2.snapshot_layout import Snapshot


def describe(
    node: Node, header: Header, snapshots: Sequence[Snapshot], bitmaps: Sequence[BitmapEntry]
) -> NodeInfo:
    """``node`` is the image itself."""
    name = header.backing_file
    encryption: dict[str, Any] = {}
    if header.crypt_method != CRYPT_NONE:
        from lamina.formats.qcow2.encryption import describe_encryption

        encryption = describe_encryption(node.file, header)
    return NodeInfo(
        node.filename,
        "qcow2",
        header.size,
        node.file.info().actual_size,
        cluster_size=header.cluster_size,
        encrypted=header.crypt_method != CRYPT_NONE,
        dirty=bool(header.incompatible_features & INCOMPAT_DIRTY),
        backing_filename=name,
        full_backing_filename=full_backing_filename(node, name) if name else None,
        backing_format=header.backing_format,
        snapshots=_snapshot_infos(snapshots),
        specific=_specific(header, bitmaps, encryption),
    )


def _snapshot_infos(snapshots: Sequence[Snapshot]) -> list[SnapshotInfo]:
    if not snapshots:
        return []
    from lamina.formats.qcow2.snapshots import snapshot_info

    return [snapshot_info(snapshot) for snapshot in snapshots]


def _specific(
    header: Header, bitmaps: Sequence[BitmapEntry], encryption: dict[str, Any]
) -> dict[str, Any]:
    if header.version < 3:
        return {
            "compat": "0.10",
            "compression-type": header.compression_name,
            "refcount-bits": header.refcount_bits,
            **encryption,
        }
    about: dict[str, Any] = {
        "compat": "1.1",
        "compression-type": header.compression_name,
        "lazy-refcounts": bool(header.compatible_features & COMPAT_LAZY_REFCOUNTS),
    }
    if bitmaps:
        about["bitmaps"] = [entry.describe() for entry in bitmaps]
    about["refcount-bits"] = header.refcount_bits
    if header.has_data_file:
        if header.data_file is not None:
            about["data-file"] = header.data_file
        about["data-file-raw"] = bool(header.autoclear_features & AUTOCLEAR_RAW_DATA_FILE)
    return {
        **about,
        **encryption,
        "corrupt": bool(header.incompatible_features & INCOMPAT_CORRUPT),
        "extended-l2": header.extended_l2,
    }


class Inspected(Mapping):
    """An image of which only the header is looked at: no table is read, no data reached."""

    driver = "qcow2"

    def __init__(
        self,
        disk: Disk,
        header: Header,
        snapshots: Sequence[Snapshot],
        bitmaps: Sequence[BitmapEntry],
    ) -> None:
        self.disk = disk
        self.header = header
        self.snapshots = snapshots
        self.bitmaps = bitmaps
        self.size = header.size
        self.unit = header.cluster_size
        self.metadata = Metadata(disk.file)

    def info(self) -> NodeInfo:
        return describe(self.disk, self.header, self.snapshots, self.bitmaps)

    def _refuse(self) -> NoReturn:
        raise ImageUnsupported("The image was opened for its metadata only")

    def resolve(self, offset: int, length: int) -> list[Extent]:
        self._refuse()

    def columns(self, offset: int, length: int) -> Iterator[Columns]:
        self._refuse()

    def reserve(self, ranges: Sequence[tuple[int, int]]) -> Reservation:
        self._refuse()
