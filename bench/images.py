"""Big qcow2 images in a second: only tables are written, the data clusters are holes.

    python bench/images.py contiguous 1T full.qcow2
    python bench/images.py shuffled 1T bad.qcow2

``contiguous`` places the clusters of the disk one behind the other; ``shuffled`` deals them out at
random, so that no two neighbours of the disk are neighbours in the file; ``recorded`` is contiguous
and has bitmaps. All are fully allocated and pass ``qemu-img check``.
"""

from __future__ import annotations

import argparse
import os
import struct

import numpy as np

from lamina.units import parse_size

_MAGIC = 0x514649FB
_COPIED = np.uint64(1 << 63)


def make(path: str, size: int, *, shuffled: bool, cluster_bits: int = 16, seed: int = 1) -> None:
    """Write a fully allocated version 3 image of ``size`` bytes (a multiple of the cluster).

    Raises OSError, for example where the file system cannot hold so large a sparse file.
    """
    cluster = 1 << cluster_bits
    per_table = cluster // 8
    per_block = cluster // 2
    data = size // cluster
    tables = -(-data // per_table)
    l1 = -(-tables * 8 // cluster)
    blocks = table = 0
    while True:
        total = 1 + table + blocks + l1 + tables + data
        need = -(-total // per_block)
        if need == blocks:
            break
        blocks, table = need, -(-need * 8 // cluster)
    table_at = 1
    block_at = table_at + table
    l1_at = block_at + blocks
    l2_at = l1_at + l1
    data_at = l2_at + tables

    def write(fd: int, cluster_index: int, entries: np.ndarray) -> None:
        os.pwrite(fd, entries.byteswap().tobytes(), cluster_index * cluster)

    def run(first: int, count: int) -> np.ndarray:
        return np.arange(first, first + count, dtype=np.uint64) << np.uint64(cluster_bits)

    header = struct.pack(
        ">IIQIIQIIQQIIQQQQII8x",
        *(_MAGIC, 3, 0, 0, cluster_bits, size, 0, tables, l1_at * cluster),
        *(table_at * cluster, table, 0, 0, 0, 0, 0, 4, 112),
    )
    places = np.arange(data_at, data_at + data, dtype=np.uint32)
    if shuffled:
        np.random.default_rng(seed).shuffle(places)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(fd, total * cluster)
        os.pwrite(fd, header, 0)
        write(fd, table_at, run(block_at, blocks))
        counts = np.zeros(blocks * per_block, dtype=np.uint16)
        counts[:total] = 1
        write(fd, block_at, counts)
        write(fd, l1_at, run(l2_at, tables) | _COPIED)
        step = per_table * 64
        for start in range(0, data, step):
            part = places[start : start + step].astype(np.uint64) << np.uint64(cluster_bits)
            write(fd, l2_at + start // per_table, part | _COPIED)
    finally:
        os.close(fd)


def record(path: str, seed: int = 1) -> None:
    """Give an image two bitmaps, ``a`` and ``b``, that have recorded writes all over the disk."""
    from lamina.block.backend import Backend
    from lamina.block.driver import find_bitmap
    from lamina.block.session import Session
    from lamina.formats.qcow2 import DRIVER

    rng = np.random.default_rng(seed)
    with Backend.open(path, session=Session(), format="qcow2", writable=True) as disk:
        for name in ("a", "b"):
            DRIVER.add_bitmap(disk.node, name, None)
            bitmap = find_bitmap(disk.node, name)
            granules = disk.size // bitmap.granularity
            for granule in rng.integers(granules, size=granules // 16).tolist():
                bitmap.set(granule * bitmap.granularity, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("contiguous", "shuffled", "recorded"))
    parser.add_argument("size", type=parse_size)
    parser.add_argument("path")
    parser.add_argument("--cluster-bits", type=int, default=16)
    arguments = parser.parse_args()
    make(
        arguments.path,
        arguments.size,
        shuffled=arguments.kind == "shuffled",
        cluster_bits=arguments.cluster_bits,
    )
    if arguments.kind == "recorded":
        record(arguments.path)


if __name__ == "__main__":
    main()
