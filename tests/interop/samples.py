"""The sample images that come with QEMU's own tests, which are fetched and never kept here."""

from __future__ import annotations

import bz2

import pytest

from tests.iotests.__main__ import RUNNER, SOURCE, fetch


def sample(name: str) -> bytes:
    """The content of ``name``, without the ``.bz2``. Skips where QEMU's tests cannot be had."""
    path = SOURCE / "tests" / "qemu-iotests" / "sample_images" / f"{name}.bz2"
    if not path.exists():
        if not RUNNER.exists():
            pytest.skip("QEMU's own tests are not at hand")
        fetch()
    return bz2.decompress(path.read_bytes())
