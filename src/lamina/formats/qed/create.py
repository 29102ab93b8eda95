"""A new QED image: the header, the name of its backing file, an empty L1 table."""

from __future__ import annotations

import errno

from lamina.errors import UsageError
from lamina.formats.qed import layout
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.node import Node
    from lamina.formats.qed.options import QedCreateOptions


def create(options: QedCreateOptions, file: Node) -> None:
    """Raises UsageError for sizes that the format cannot have."""
    header, name = new_header(options)
    end = header.l1_table_offset + header.table_bytes
    # The table first: a file without a header is no image yet.
    file.truncate(0, exact=False)
    file.truncate(end, exact=False)
    file.write_zeroes(0, end)
    file.flush()
    file.write(0, (header.pack() + name).ljust(round_up(layout.SIZE + len(name), SECTOR), b"\0"))


def new_header(options: QedCreateOptions) -> tuple[layout.Header, bytes]:
    """The header of such an image, and the name that follows it. Raises UsageError."""
    cluster, table = options.cluster_size, options.table_size
    if not layout.is_power(cluster, layout.MIN_CLUSTER, layout.MAX_CLUSTER):
        raise UsageError(
            f"QED cluster size must be within range [{layout.MIN_CLUSTER}, {layout.MAX_CLUSTER}] "
            "and power of 2",
            field="cluster_size",
        )
    if not layout.is_power(table, 1, layout.MAX_TABLE):
        raise UsageError(
            f"QED table size must be within range [1, {layout.MAX_TABLE}] and power of 2",
            field="table_size",
        )
    size = round_up(options.size, SECTOR)
    check_size(size, cluster, table)
    name, features = backing_name(options.backing_file, options.backing_fmt)
    return (
        layout.Header(
            size,
            cluster,
            table,
            features=features,
            l1_table_offset=cluster,
            backing_offset=layout.SIZE if name else 0,
            backing_size=len(name),
        ),
        name,
    )


def check_size(size: int, cluster_size: int, table_size: int) -> None:
    """Raises UsageError for more than tables of this shape can address."""
    largest = layout.max_image_size(cluster_size, table_size)
    if size > largest:
        raise UsageError(
            "QED image size must be a non-zero multiple of cluster size and less than "
            f"{largest} bytes",
            field="size",
            errno=errno.EFBIG,
        )


def backing_name(filename: str | None, format: str | None) -> tuple[bytes, int]:
    """The name as it is stored, and the features that tell of it. Raises UsageError."""
    if not filename:
        return b"", 0
    name = filename.encode("utf-8", "surrogateescape")
    if len(name) > layout.MAX_BACKING_NAME:
        raise UsageError("Backing file name too long", field="backing_file")
    raw = layout.NO_PROBE if format == "raw" else 0
    return name, layout.BACKING_FILE | raw
