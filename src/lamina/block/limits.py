"""What a node can take in one request. All figures in bytes; 0 means "no limit known"."""

from __future__ import annotations

import enum

from lamina.records import dataclass


@dataclass(frozen=True)
class Limits:
    request_alignment: int = 1
    """Offsets and lengths of reads and writes must be multiples of this power of two."""
    memory_alignment: int = 1
    """Buffers must start at a multiple of this (O_DIRECT); 1 for everybody else."""
    max_transfer: int = 0
    write_zeroes_alignment: int = 1
    """Zeroing whole units of this size is what the node does quickly."""
    write_unit: int = 0
    """Writes of whole units of this size have nothing copied around them; 0: as zeroes."""
    in_order: bool = False
    """Writes are to come in the order of their offsets: readers want to find them like that."""
    max_write_zeroes: int = 0
    discard_alignment: int = 1
    max_discard: int = 0
    optimal_transfer: int = 0


class Preallocation(enum.Enum):
    """How much of a new or grown image is allocated at once."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class WriteFlags(enum.IntFlag):
    NONE = 0
    FUA = 1
    """Durable when the call returns."""
    MAY_UNMAP = 2
    """write_zeroes: space may be given back."""
    NO_FALLBACK = 4
    """write_zeroes: fail with ENOTSUP rather than write zeroes the slow way."""
    UNCHANGED = 8
    """The write does not change what the guest sees (copy-on-read, preallocation)."""
