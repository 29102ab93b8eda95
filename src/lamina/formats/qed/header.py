"""Rewriting what the header of an open image says: another backing file, or no data at all."""

from __future__ import annotations

import errno

from lamina.errors import StorageError
from lamina.formats.qed import layout
from lamina.formats.qed.create import backing_name
from lamina.hints import TYPE_CHECKING
from lamina.records import replace
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.formats.qed.mapping import QedMapping


def change_backing_file(mapping: QedMapping, filename: str | None, format: str | None) -> None:
    """Raises UsageError or StorageError (ENOSPC), with nothing changed, if it does not fit."""
    name, features = backing_name(filename, format)
    header = mapping.header
    if layout.SIZE + len(name) > header.header_bytes:
        raise StorageError.from_errno(errno.ENOSPC)
    changed = replace(
        header,
        features=header.features & ~(layout.BACKING_FILE | layout.NO_PROBE) | features,
        backing_offset=layout.SIZE if name else 0,
        backing_size=len(name),
    )
    mapping.metadata.commit()
    mapping.metadata.barrier()
    # The name and what tells of it in one write, and zeroes over what was there before.
    length = round_up(layout.SIZE + max(len(name), header.backing_size), SECTOR)
    mapping.file.write(0, (changed.pack() + name).ljust(length, b"\0"))
    mapping.file.flush()
    mapping.header = changed
    mapping.backing_name = filename or None
    mapping.backing_format = "raw" if features & layout.NO_PROBE else None


def make_empty(mapping: QedMapping) -> None:
    """Forget all data: the L1 table first, then what it named."""
    header, file = mapping.header, mapping.file
    mapping.metadata.commit()
    mapping.metadata.barrier()
    file.write_zeroes(header.l1_table_offset, header.table_bytes)
    file.flush()
    mapping.tables.forget()
    mapping.appender.end = round_up(header.l1_table_offset + header.table_bytes, mapping.unit)
    mapping.appender.trim()
