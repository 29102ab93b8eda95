"""What a driver offers beside its nodes: the registry's entries are instances of ``Driver``.

A driver module defines one subclass and an instance of it, ``DRIVER``, that the registry names as
``"lamina.formats.qcow2:DRIVER"``. Methods import what they need when they are called, so that
opening an image does not load the code that checks or creates one. Every default refuses with the
sentence that QEMU prints.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping

from lamina.errors import ImageUnsupported, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.dirty import DirtyBitmap
    from lamina.block.info import SnapshotInfo
    from lamina.block.node import Node


@dataclass(frozen=True)
class NoOptions:
    """For drivers without options of their own."""


@dataclass(frozen=True)
class Fix:
    """What ``check`` may repair."""

    leaks: bool = False
    errors: bool = False


@dataclass
class CheckResult:
    """What ``check`` found. ``…_fixed`` counts what was repaired: not in the other figures."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    """Bytes; 0: not known."""
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0


@dataclass(frozen=True)
class Measurement:
    """Bytes that a new image needs: with the data it has to hold, and when fully allocated."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None


class Driver:
    name: str
    Options: type = NoOptions
    """Runtime options (``block.options``)."""
    CreateOptions: type | None = None
    """Options of ``create``; None: this driver creates nothing. A field ``size`` is customary."""
    AmendOptions: type | None = None
    """Options of ``amend``; None: nothing can be changed in an existing image."""
    is_format = False
    supports_backing = False
    supports_compression = False
    """New images can be filled by compressed writes."""
    metadata_is_whole = False
    """New images have all their metadata, so that ``preallocation=metadata`` asks the file for
    nothing."""
    creates_zeroes = False
    """Protocols: what ``create_file`` makes reads as zeroes."""
    strong_options: tuple[str, ...] = ()
    """Keys of ``Options`` that change what the disk holds: ``json:{…}`` names repeat them."""

    def open(self, options: Any, context: OpenContext) -> Node:
        raise NotImplementedError

    def reconfigure(self, node: Node, changes: Mapping[str, Any]) -> None:
        """Change some of ``Options`` of an open node, all of them or, raising UsageError, none.

        ``node.options``, the generic ones, have changed already.
        """
        for key in changes:
            raise UsageError(f"Cannot change the option '{key}'", field=key)

    def parse_filename(self, filename: str) -> dict[str, Any]:
        """Options out of ``prefix:rest`` or a URI; only for protocols. Raises UsageError."""
        return {"filename": filename}

    def plain_filename(self, given: Mapping[str, Any]) -> str | None:
        """Protocols: the file name that stands for exactly these strong options, if any does."""
        return None

    # -- creating --------------------------------------------------------------------------------

    def create_file(self, filename: str, options: Any, context: CreateContext) -> None:
        """Protocols: make what will then be opened, ``options.size`` bytes long."""
        raise ImageUnsupported(f"Protocol driver '{self.name}' does not support image creation")

    def new_file_size(self, options: Any) -> int:
        """Formats: bytes of the file that ``create`` wants to be handed. Those that know nothing
        better let it grow."""
        return 0

    def create(self, options: Any, file: Node, context: CreateContext) -> None:
        """Formats: turn the writable, empty node ``file`` into an image."""
        raise ImageUnsupported(f"Format driver '{self.name}' does not support image creation")

    def measure(self, options: Any, source: Node | None, context: CreateContext) -> Measurement:
        """Size of a new image with these creation options that holds ``source``."""
        raise ImageUnsupported(f"Block driver '{self.name}' does not support size measurement")

    # -- the whole image -------------------------------------------------------------------------

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        """``report`` receives each finding as a line for people."""
        raise ImageUnsupported("This image format does not support checks")

    def change_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        """Rewrite what the image names as its backing file. Formats that know it by more than its
        name look into that file, which they open by way of the node's context; others open nothing.
        """
        raise ImageUnsupported("Operation not supported")

    def check_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        """Raises what ``change_backing_file`` would raise for images of another kind, so that it is
        known before anything is copied for the sake of the change. Opens and changes nothing."""
        if type(self).change_backing_file is Driver.change_backing_file:
            raise ImageUnsupported("Operation not supported")

    def make_empty(self, node: Node) -> None:
        """Drop all guest data, so that everything comes from the backing file."""
        raise ImageUnsupported("Operation not supported")

    def amend(
        self, node: Node, options: Any, progress: Callable[[float], None], *, force: bool
    ) -> None:
        """``options`` is an instance of ``AmendOptions``; None in a field: leave it as it is."""
        raise ImageUnsupported(f"Format driver '{self.name}' does not support option amendment")

    # -- internal snapshots, named by id or tag ----------------------------------------------------

    def create_snapshot(self, node: Node, snapshot: SnapshotInfo) -> None:
        """Keep the state of the disk as ``snapshot``, whose id the format chooses."""
        raise ImageUnsupported("Operation not supported")

    def apply_snapshot(self, node: Node, name: str) -> None:
        """Make the disk what it was."""
        raise ImageUnsupported("Block driver does not support snapshots")

    def delete_snapshot(self, node: Node, name: str) -> None:
        _find_snapshot(node, name, "snapshot not found")
        raise ImageUnsupported("Operation not supported")

    def load_snapshot(self, node: Node, name: str) -> None:
        """Show what a snapshot holds in place of the disk, from now on and for reading only."""
        _find_snapshot(node, name, "Can't find snapshot")
        raise ImageUnsupported("Operation not supported")

    # -- dirty bitmaps kept in the image -----------------------------------------------------------

    def keeps_bitmaps(self, node: Node) -> bool:
        """Whether this image can."""
        return False

    def add_bitmap(self, node: Node, name: str, granularity: int | None) -> None:
        """A new bitmap that records; ``granularity`` in bytes, None: what suits the image."""
        from lamina.block.dirty import MIN_GRANULARITY, check_new

        check_new(name, MIN_GRANULARITY if granularity is None else granularity)
        raise ImageUnsupported(
            f"Can't store persistent bitmaps to {node.name}: Operation not supported"
        )

    def remove_bitmap(self, node: Node, name: str) -> None:
        find_bitmap(node, name)
        raise ImageUnsupported("Operation not supported")

    def clear_bitmap(self, node: Node, name: str) -> None:
        _usable_bitmap(node, name).clear()

    def enable_bitmap(self, node: Node, name: str, enabled: bool) -> None:
        """Start or stop recording."""
        _usable_bitmap(node, name).enabled = enabled

    def merge_bitmap(self, node: Node, name: str, source: Node, source_name: str) -> None:
        """Add to a bitmap what another one, maybe of another image, says."""
        bitmap = find_bitmap(node, name)
        other = find_bitmap(source, source_name)
        bitmap.check_usable()
        other.check_usable()
        bitmap.merge(other)

    def store_bitmaps(self, node: Node) -> None:
        """Bring the bitmaps to the image, as closing it does, and raise what goes wrong."""


def _find_snapshot(node: Node, name: str, message: str) -> SnapshotInfo:
    for one in node.info().snapshots:
        if name in (one.id, one.name):
            return one
    raise ImageUnsupported(message, errno=errno.ENOENT)


def find_bitmap(node: Node, name: str) -> DirtyBitmap:
    """Of those that the node has. Raises ImageUnsupported (ENOENT)."""
    for bitmap in node.dirty_bitmaps:
        if bitmap.name == name:
            return bitmap
    raise ImageUnsupported(f"Dirty bitmap '{name}' not found", errno=errno.ENOENT)


def _usable_bitmap(node: Node, name: str) -> DirtyBitmap:
    bitmap = find_bitmap(node, name)
    bitmap.check_usable()
    return bitmap
