"""Reports; the figures are taken from qemu-io 10.0.2."""

from __future__ import annotations

import pytest

from lamina.tools.io.report import amount, elapsed, hexdump, report


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1318, "1.287 KiB"),
        (65536, "64 KiB"),
        (1319000000, "1.228 GiB"),
        ((1 << 40) - 0x4E9F0000, "1022.772 GiB"),
        ((2 << 30) + (64 << 10), "2 GiB"),
        (1 << 40, "1 TiB"),
        ((8 << 60) - 1, "8 EiB"),
        (0.967491, "0.967491 bytes"),
        (96.820505, "96.820505 bytes"),
        (990.953138, "990.953138 bytes"),
        (0.000734, "0 bytes"),
        (12.000543, "12 bytes"),
        (9.455 * 1024, "9.455 KiB"),
    ],
)
def test_amounts(value: float, text: str) -> None:
    assert amount(value) == text


@pytest.mark.parametrize(
    ("seconds", "text", "terse"),
    [
        (0.00001, "00.00 sec", "0:00:00.00"),
        (0.02614, "00.03 sec", "0:00:00.03"),
        (59.99, "59.99 sec", "0:00:59.99"),
        (60, "0:01:00.00", "0:01:00.00"),
        (1319.09, "0:21:59.09", "0:21:59.09"),
        (36000, "10:00:00.00", "10:00:00.00"),
    ],
)
def test_times(seconds: float, text: str, terse: str) -> None:
    assert (elapsed(seconds), elapsed(seconds, terse=True)) == (text, terse)


def test_reports_for_people_and_for_programs() -> None:
    assert report("wrote", 0, 131900, 131900, 1362.316) == (
        "wrote 131900/131900 bytes at offset 0\n"
        "128.809 KiB, 1 ops; 0:22:42.32 (96.820415 bytes/sec and 0.0007 ops/sec)\n"
    )
    assert report("read", 512, 65536, 65536, 1 / 64) == (
        "read 65536/65536 bytes at offset 512\n"
        "64 KiB, 1 ops; 00.02 sec (4 MiB/sec and 64.0000 ops/sec)\n"
    )
    terse = report("read", 0, 4096, 4096, 1 / 64, for_programs=True)
    assert terse == "4096,1,0:00:00.02,262144.000,64.000\n"


def test_no_time_at_all() -> None:
    assert "ops/sec" in report("read", 0, 512, 512, 0.0)


def test_hexdump() -> None:
    data = bytes(range(0x2C, 0x4E))
    assert "".join(hexdump(data, 0x1FC)) == (
        "000001fc:  2c 2d 2e 2f 30 31 32 33 34 35 36 37 38 39 3a 3b  ....0123456789..\n"
        "0000020c:  3c 3d 3e 3f 40 41 42 43 44 45 46 47 48 49 4a 4b  .....ABCDEFGHIJK\n"
        "0000021c:  4c 4d  LM\n"
    )
    assert list(hexdump(b"\xe4\xb5", 1 << 40)) == ["10000000000:  e4 b5  ..\n"]
