"""What ``info`` says about a node, in the words of QEMU's schema."""

from __future__ import annotations

from lamina.hints import Any
from lamina.records import dataclass, field


@dataclass
class SnapshotInfo:
    id: str
    name: str
    vm_state_size: int
    """Bytes."""
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


@dataclass
class NodeInfo:
    """One node, without its children. Sizes in bytes."""

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    """Bytes that the storage really spends; None where nobody can tell."""
    cluster_size: int | None = None
    encrypted: bool = False
    compressed: bool = False
    dirty: bool | None = False
    """None: there is nothing that could be clean or dirty."""
    backing_filename: str | None = None
    """As stored in the image."""
    full_backing_filename: str | None = None
    """As it would be opened."""
    backing_format: str | None = None
    snapshots: list[SnapshotInfo] = field(default_factory=list)
    specific: dict[str, Any] | None = None
    """Format-specific part: keys and values as in QEMU's JSON, in the order of its human output."""
