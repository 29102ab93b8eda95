"""Guessing the format of an image from its first bytes.

One table of small tests for every format that QEMU knows, so that guessing imports no driver. Each
test gives a score; the best wins, the first in the table at a tie. ``raw`` fits everything and wins
only when nothing else fits, which is why it must not be trusted for writing (``guessed_raw``).
"""

from __future__ import annotations

from collections.abc import Callable

PROBE_SIZE = 512
"""Bytes from the start of the image that are looked at."""

_CLOOP = (
    b"#!/bin/sh\n#V2.0 Format\n"
    b"modprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
)
_QCOW_MAGIC = b"QFI\xfb"
_VDI_MAGIC = b"\x7f\x10\xda\xbe"
_VMDK_VERSIONS = (b"version=1", b"version=2", b"version=3")


def _u32le(head: bytes, offset: int) -> int:
    return int.from_bytes(head[offset : offset + 4], "little")


def _u32be(head: bytes, offset: int) -> int:
    return int.from_bytes(head[offset : offset + 4], "big")


def _vpc(head: bytes, filename: str) -> int:
    return 100 if head.startswith(b"conectix") else 0


def _bochs(head: bytes, filename: str) -> int:
    if _u32le(head, 0) == 0x02468ACE and _u32le(head, 4) == 2 and not any(head[24:256]):
        return 100  # a sparse image, which QEMU takes for raw
    known = (
        head.startswith(b"Bochs Virtual HD Image\0")
        and head[32:].startswith(b"Redolog\0")
        and head[48:].startswith(b"Growing\0")
        and _u32le(head, 64) in (0x10000, 0x20000)
    )
    return 100 if known else 0


def _cloop(head: bytes, filename: str) -> int:
    return 2 if head.startswith(_CLOOP) else 0


def _dmg(head: bytes, filename: str) -> int:
    # The signature of a UDIF image is at its end: its name must do.
    return 2 if filename.endswith(".dmg") else 0


def _luks(head: bytes, filename: str) -> int:
    return 100 if head.startswith(b"LUKS\xba\xbe\0\x01") else 0


def _parallels(head: bytes, filename: str) -> int:
    if filename.rpartition("/")[2] == "DiskDescriptor.xml" and b"<Parallels_disk_image" in head:
        # It names other files. A guest can write such a text onto its disk, but not choose the
        # name of the file that this is kept in.
        return 100
    known = head.startswith((b"WithoutFreeSpace", b"WithouFreSpacExt"))
    return 100 if known and _u32le(head, 16) == 2 else 0


def _qcow(head: bytes, filename: str) -> int:
    return 100 if head.startswith(_QCOW_MAGIC) and _u32be(head, 4) == 1 else 0


def _qcow2(head: bytes, filename: str) -> int:
    return 100 if head.startswith(_QCOW_MAGIC) and _u32be(head, 4) >= 2 else 0


def _qed(head: bytes, filename: str) -> int:
    return 100 if head.startswith(b"QED\0") else 0


def _vdi(head: bytes, filename: str) -> int:
    return 100 if head[64:68] == _VDI_MAGIC else 0


def _vhdx(head: bytes, filename: str) -> int:
    return 100 if head.startswith(b"vhdxfile") else 0


def _vmdk(head: bytes, filename: str) -> int:
    if head.startswith((b"KDMV", b"COWD")):
        return 100
    lines = head.split(b"\n")
    for number, line in enumerate(lines[:-1]):
        if line.startswith(b"#") or (line and not line.strip(b" ")):
            continue
        # The last piece is not a line: its end was not seen.
        return 100 if lines[number].removesuffix(b"\r") in _VMDK_VERSIONS else 0
    return 0


_TESTS: dict[str, Callable[[bytes, str], int]] = {
    "vpc": _vpc,
    "vmdk": _vmdk,
    "vhdx": _vhdx,
    "vdi": _vdi,
    "qed": _qed,
    "qcow2": _qcow2,
    "qcow": _qcow,
    "parallels": _parallels,
    "luks": _luks,
    "dmg": _dmg,
    "cloop": _cloop,
    "bochs": _bochs,
}


def probe(head: bytes, filename: str = "") -> str:
    """The name of the format that an image with these first bytes most likely has.

    ``head`` holds up to PROBE_SIZE bytes, as many as there are.
    """
    best, best_score = "raw", 1 if head else 1000
    for name, test in _TESTS.items():
        score = test(head, filename)
        if score > best_score:
            best, best_score = name, score
    return best
