"""qcow2, versions 2 and 3: growable images with backing files, compression and snapshots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from lamina.block.driver import CheckResult, Driver, Fix, Measurement, find_bitmap
from lamina.errors import ImageUnsupported
from lamina.formats.qcow2.options import AmendOptions as Qcow2AmendOptions
from lamina.formats.qcow2.options import CreateOptions as Qcow2CreateOptions
from lamina.formats.qcow2.options import Options as Qcow2Options
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.info import SnapshotInfo
    from lamina.block.node import Node
    from lamina.formats.qcow2.mapping import Qcow2Mapping


class Qcow2Driver(Driver):
    name = "qcow2"
    Options = Qcow2Options
    CreateOptions = Qcow2CreateOptions
    AmendOptions = Qcow2AmendOptions
    is_format = True
    supports_backing = True
    supports_compression = True
    strong_options = ("encrypt.format", "encrypt.key-secret")

    def open(self, options: Qcow2Options, context: OpenContext) -> Node:
        from lamina.formats.qcow2.opening import open_disk

        return open_disk(options, context)

    def reconfigure(self, node: Node, changes: Mapping[str, Any]) -> None:
        from lamina.formats.qcow2.reconfigure import reconfigure

        with _exclusive(node) as mapping:
            reconfigure(mapping, changes, unmap=node.options.unmap)
            # What the first change has to say in the header may be different now.
            assert mapping.disk is not None
            mapping.disk.writer.close_gate()

    def create(self, options: Qcow2CreateOptions, file: Node, context: CreateContext) -> None:
        from lamina.formats.qcow2.create import create

        create(options, file, context)

    def measure(
        self, options: Qcow2CreateOptions, source: Node | None, context: CreateContext
    ) -> Measurement:
        from lamina.formats.qcow2.measure import measure

        return measure(options, source)

    def check(self, node: Node, fix: Fix, report: Callable[[str], None]) -> CheckResult:
        from lamina.formats.qcow2.check import check

        with _exclusive(node) as mapping:
            result = check(mapping, fix, report)
            if mapping.has_bitmaps:
                mapping.bitmaps.attach()
            return result

    def change_backing_file(self, node: Node, filename: str | None, format: str | None) -> None:
        from lamina.formats.qcow2.header import change_backing_file

        with _exclusive(node) as mapping:
            change_backing_file(mapping, filename, format)

    def make_empty(self, node: Node) -> None:
        from lamina.formats.qcow2.empty import make_empty

        with _exclusive(node) as mapping:
            make_empty(mapping)

    def amend(
        self,
        node: Node,
        options: Qcow2AmendOptions,
        progress: Callable[[float], None],
        *,
        force: bool,
    ) -> None:
        from lamina.engine.disk import Disk
        from lamina.formats.qcow2.amend import amend

        assert isinstance(node, Disk)
        amend(node, options, progress, force=force)

    def create_snapshot(self, node: Node, snapshot: SnapshotInfo) -> None:
        from lamina.formats.qcow2.snapshotting import create

        with _exclusive(node) as mapping:
            create(mapping, snapshot)

    def apply_snapshot(self, node: Node, name: str) -> None:
        from lamina.formats.qcow2.snapshotting import apply

        if node.dirty_bitmaps:
            raise ImageUnsupported("Device has active dirty bitmaps")
        with _exclusive(node) as mapping:
            apply(mapping, name)

    def delete_snapshot(self, node: Node, name: str) -> None:
        from lamina.formats.qcow2.snapshotting import delete

        with _exclusive(node) as mapping:
            delete(mapping, name)

    def load_snapshot(self, node: Node, name: str) -> None:
        from lamina.formats.qcow2.snapshotting import load

        with _exclusive(node) as mapping:
            load(mapping, name)

    def keeps_bitmaps(self, node: Node) -> bool:
        from lamina.engine.disk import Disk
        from lamina.formats.qcow2.mapping import Qcow2Mapping

        assert isinstance(node, Disk)
        mapping = node.mapping
        return isinstance(mapping, Qcow2Mapping) and mapping.header.version >= 3

    def add_bitmap(self, node: Node, name: str, granularity: int | None) -> None:
        with _exclusive(node) as mapping:
            mapping.bitmaps.add(name, granularity)

    def remove_bitmap(self, node: Node, name: str) -> None:
        bitmap = find_bitmap(node, name)
        with _exclusive(node) as mapping:
            mapping.bitmaps.remove(bitmap)

    def clear_bitmap(self, node: Node, name: str) -> None:
        with _changing(node, name):
            super().clear_bitmap(node, name)

    def enable_bitmap(self, node: Node, name: str, enabled: bool) -> None:
        with _changing(node, name):
            super().enable_bitmap(node, name, enabled)

    def merge_bitmap(self, node: Node, name: str, source: Node, source_name: str) -> None:
        find_bitmap(source, source_name).check_usable()
        with _changing(node, name):
            super().merge_bitmap(node, name, source, source_name)

    def store_bitmaps(self, node: Node) -> None:
        with _exclusive(node) as mapping:
            mapping.bitmaps.store()
            assert mapping.disk is not None
            # Those that record have to be marked as in use again.
            mapping.disk.writer.close_gate()


@contextmanager
def _changing(node: Node, name: str) -> Iterator[None]:
    """A bitmap may change, and the file says so."""
    bitmap = find_bitmap(node, name)
    with _exclusive(node) as mapping:
        if bitmap.persistent:
            mapping.bitmaps.change(bitmap)
        yield


def _exclusive(node: Node) -> AbstractContextManager[Qcow2Mapping]:
    from lamina.engine.disk import exclusive
    from lamina.formats.qcow2.mapping import Qcow2Mapping

    return exclusive(node, Qcow2Mapping)


DRIVER = Qcow2Driver()
