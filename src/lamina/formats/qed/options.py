"""Options of the qed driver, as QEMU documents them."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.formats.qed.layout import DEFAULT_CLUSTER, DEFAULT_TABLE
from lamina.records import dataclass


@dataclass(frozen=True)
class QedCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size")
    backing_file: str | None = option("backing_file", help="File name of a base image")
    backing_fmt: str | None = option("backing_fmt", help="Image format of the base image")
    cluster_size: int = option(
        "cluster_size", Type.SIZE, DEFAULT_CLUSTER, "Cluster size (in bytes)", listed=True
    )
    table_size: int = option(
        "table_size", Type.SIZE, DEFAULT_TABLE, "L1/L2 table size (in clusters)"
    )
