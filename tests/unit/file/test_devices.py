"""Devices: what they cannot do, and drives without a medium. (``tests/contract`` does the rest.)"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lamina.block.filenames import local_driver
from lamina.block.limits import Preallocation
from lamina.block.node import NodeOptions
from lamina.errors import LaminaError, StorageError, UsageError
from lamina.protocols.file import device
from lamina.protocols.file.host_device import CDROM_DRIVER, DRIVER, DeviceCreateOptions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="devices of Linux")
MIB = 1 << 20


def open_node(driver: Any, name: str, **generic: Any) -> Any:
    options = NodeOptions(filename=name, **generic)
    return driver.open(driver.Options(filename=name), SimpleNamespace(node_options=options))


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    image = tmp_path / "image"
    image.write_bytes(b"old" * (MIB // 3))
    command = ["losetup", "--find", "--show", str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(done.stderr)
    yield done.stdout.strip()
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


@pytest.mark.parametrize("driver", [DRIVER, CDROM_DRIVER], ids=lambda driver: driver.name)
def test_only_devices(disk: Path, driver: Any) -> None:
    with pytest.raises(UsageError) as caught:
        open_node(driver, str(disk))
    assert str(caught.value) == (
        f"'{driver.name}' driver requires '{disk}' to be either a character or block device"
    )


def test_character_devices_have_no_size() -> None:
    with open_node(DRIVER, "/dev/null", read_only=False) as node:
        assert node.size == 0
        assert node.info().format == "host_device"
    assert local_driver("/dev/null") == "host_device"


def test_sizes_stay(loop: str) -> None:
    with open_node(DRIVER, loop, read_only=False) as node:
        size = node.size
        node.truncate(size)
        node.truncate(size - 512, exact=False)
        assert node.size == size
        for wanted, exact, message in (
            (size - 512, True, "Cannot resize device files"),
            (size + 512, True, "Cannot resize device files"),
            (size + 512, False, "Cannot grow device files"),
        ):
            with pytest.raises(UsageError, match=message):
                node.truncate(wanted, exact=exact)
        with pytest.raises(UsageError, match="'falloc' unsupported for this non-regular file"):
            node.truncate(size, Preallocation.FALLOC)
        with pytest.raises(StorageError, match="No space left on device"):
            node.write(size, bytes(512))


def test_creating_forgets_the_first_sector(loop: str) -> None:
    DRIVER.create_file(f"host_device:{loop}", DeviceCreateOptions(size=4096), SimpleNamespace())
    with open_node(DRIVER, loop) as node:
        assert node.read(0, 518) == bytes(512) + node.read(512, 6)
        assert b"old" in node.read(512, 6)
    for options in (
        DeviceCreateOptions(size=2 * MIB),
        DeviceCreateOptions(size=512, preallocation="full"),
    ):
        with pytest.raises(LaminaError):
            DRIVER.create_file(loop, options, SimpleNamespace())


def test_devices_that_refuse_writes(loop: str) -> None:
    subprocess.run(["blockdev", "--setro", loop], check=True)
    try:
        with pytest.raises(StorageError) as caught:
            open_node(DRIVER, loop, read_only=False)
        assert str(caught.value) == "The device is not writable: Permission denied"
        with open_node(DRIVER, loop) as node:
            assert node.read(0, 3) == b"old"
    finally:
        subprocess.run(["blockdev", "--setrw", loop], check=True)  # else the next user inherits it


def test_drives_without_a_medium(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status = 1  # CDS_NO_DISC
    really = fcntl.ioctl

    def ioctl(fd: int, request: int, argument: Any = 0) -> Any:
        return status if request == 0x5326 else really(fd, request, argument)

    assert local_driver(loop) == "host_device"
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert local_driver(loop) == "host_cdrom"
    with open_node(CDROM_DRIVER, loop) as node:
        assert isinstance(node, device.CdromNode)
        with pytest.raises(StorageError, match="No medium found"):
            node.read(0, 512)
        status = 4  # CDS_DISC_OK
        assert node.read(0, 3) == b"old"
