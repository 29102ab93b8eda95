"""A new expandable image: the header and an empty BAT, padded to whole clusters."""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.formats.parallels.layout import MAX_CLUSTER_SECTORS, MAX_ENTRIES, SIZE, Header
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.parallels.options import ParallelsCreateOptions


def header_for(options: ParallelsCreateOptions) -> Header:
    """Raises UsageError for what no image can have; QEMU makes some that it cannot open."""
    cluster_size = round_up(options.cluster_size, SECTOR)
    size = round_up(options.size, SECTOR)
    if cluster_size > MAX_CLUSTER_SECTORS * SECTOR:
        raise UsageError("Cluster size is too large", field="cluster_size")
    entries = -(-size // cluster_size) if cluster_size else MAX_ENTRIES + 1
    if entries > MAX_ENTRIES:
        raise UsageError("Image size is too large for this cluster size", field="size")
    data_offset = round_up(SIZE + 4 * entries, cluster_size)
    return Header(
        cluster_size // SECTOR, entries, size // SECTOR, data_start=data_offset // SECTOR
    )


def create(options: ParallelsCreateOptions, file: Node) -> None:
    header = header_for(options)
    # The table first: a file without a header is no image yet.
    file.write_zeroes(0, header.data_start * SECTOR)
    file.write(0, header.pack())
    file.flush()
