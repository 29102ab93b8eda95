"""What ``info`` says about a VMDK."""

from __future__ import annotations

from lamina.block.filenames import full_backing_filename
from lamina.block.info import NodeInfo
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.formats.vmdk.extents import VmdkExtent
    from lamina.formats.vmdk.mapping import VmdkMapping


def describe(mapping: VmdkMapping) -> NodeInfo:
    disk, name = mapping.disk, mapping.backing_name
    descriptor = mapping.descriptor
    return NodeInfo(
        disk.filename,
        "vmdk",
        mapping.size,
        _actual_size(mapping),
        cluster_size=mapping.extents[0].grain or None,
        backing_filename=name,
        full_backing_filename=full_backing_filename(disk, name) if name else None,
        backing_format="vmdk" if name else None,
        specific={
            "cid": descriptor.cid,
            "parent-cid": descriptor.parent_cid,
            "create-type": descriptor.create_type,
            "extents": [_extent(mapping, number) for number in range(len(mapping.extents))],
        },
    )


def _extent(mapping: VmdkMapping, number: int) -> dict[str, Any]:
    extent = mapping.extents[number]
    about: dict[str, Any] = {}
    if extent.compressed:
        about["compressed"] = True
    about["virtual-size"] = extent.length
    about["filename"] = _name(mapping, number, extent)
    if extent.grain:
        about["cluster-size"] = extent.grain
    about["format"] = extent.format
    return about


def _name(mapping: VmdkMapping, number: int, extent: VmdkExtent) -> str:
    if extent.node is not None:
        return extent.node.filename
    # Not opened: as the descriptor has it.
    return mapping.descriptor.extents[number].name


def _actual_size(mapping: VmdkMapping) -> int | None:
    """What all files together spend."""
    nodes = {id(node): node for node in (mapping.file, *(one.node for one in mapping.extents))}
    total = 0
    for node in nodes.values():
        actual = None if node is None else node.info().actual_size
        if node is not None and actual is None:
            return None
        total += actual or 0
    return total
