"""LUKS1 headers and key slots, against images that QEMU makes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from lamina.ciphers.luks import header as layout
from lamina.ciphers.luks import volume
from lamina.errors import LaminaError, Refused

COMBINATIONS = [
    [],
    ["cipher-alg=aes-128", "cipher-mode=cbc", "ivgen-alg=essiv", "ivgen-hash-alg=sha256"],
    ["cipher-alg=aes-256", "cipher-mode=cbc", "ivgen-alg=plain", "hash-alg=sha1"],
    ["cipher-alg=aes-256", "cipher-mode=ctr", "hash-alg=sha512"],
    ["cipher-alg=cast5-128", "cipher-mode=cbc", "hash-alg=ripemd160"],
]


@pytest.mark.peer
@pytest.mark.parametrize("options", COMBINATIONS, ids=",".join)
def test_unlock_what_qemu_made(tmp_path, options):
    if not shutil.which("qemu-img"):
        pytest.fail("qemu-img is missing: install qemu-utils")
    image, clear = tmp_path / "x.luks", tmp_path / "clear"
    content = bytes(range(256)) * 512
    clear.write_bytes(content)
    secret = ["--object", "secret,id=s,data=correct horse"]
    settings = ",".join(["key-secret=s", "iter-time=10", *options])
    subprocess.run(
        ["qemu-img", "convert", *secret, "-f", "raw", "-O", "luks", "-o", settings, clear, image],
        check=True,
        capture_output=True,
    )
    data = image.read_bytes()
    header = layout.parse(data[: layout.SIZE])
    assert header.pack() == data[: layout.SIZE]

    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    key, slot = volume.unlock(header, b"correct horse", read)
    assert slot == 0
    payload = bytearray(data[header.payload_offset :])
    volume.CipherSpec.of(header).sectors(key).decrypt(memoryview(payload), 0)
    assert payload == content
    with pytest.raises(Refused, match="Invalid password"):
        volume.unlock(header, b"wrong", read)


def make_header() -> layout.Header:
    header = layout.Header("aes", "xts-plain64", "sha256", 0, 64, digest_iterations=1)
    header.place_slots()
    return header


def test_own_slots_open():
    header = make_header()
    assert header.payload_offset == 2068480
    key = bytes(range(64))
    volume.set_master_key(header, key, 1000)
    areas = {}
    for number in (0, 7):
        material = volume.fill_slot(header, number, key, b"pass%d" % number, 1000)
        areas[header.slots[number].offset] = material
    again = layout.parse(header.pack())
    assert again == header
    found = volume.unlock(again, b"pass7", lambda offset, length: areas[offset][:length])
    assert found == (key, 7)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "Volume is not in LUKS format"),
        (7, b"\2", "LUKS version 2 is not supported"),
        (8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
        (40, b"a" * 32, "LUKS header cipher mode is not NUL terminated"),
        (72, b"a" * 32, "LUKS header hash spec is not NUL terminated"),
        (8, b"foo\0", "Algorithm 'foo' with key size 32 bytes not supported"),
        (40, b"xtsplain64\0", "Unexpected cipher mode string format 'xtsplain64'"),
        (40, b"foo-plain64\0", "Cipher mode 'foo' not supported"),
        (40, b"xts-foo\0", "IV generator 'foo' not supported"),
        (40, b"cbc-essiv\0", "Algorithm 'aes' with key size 64 bytes not supported"),
        (72, b"foo\0", "Hash algorithm 'foo' not supported"),
        (104, bytes(4), "LUKS payload is overlapping with the header"),
        (104, b"\0\0\0\1", "LUKS payload is overlapping with the header"),
        (104, b"\0\0\0\144", "Keyslot 0 is overlapping with the encrypted payload"),
        (108, b"\0\0\0\77", "Algorithm 'aes' with key size 31 bytes not supported"),
        (108, b"\xff" * 4, "Keyslot 0 is overlapping with the encrypted payload"),
        (164, bytes(4), "LUKS key iteration count is zero"),
        (208, b"\0\0\0\1", "Keyslot 0 state (active/disable) is corrupted"),
        (212, bytes(4), "Keyslot 0 iteration count is zero"),
        (248, bytes(4), "Keyslot 0 is overlapping with the LUKS header"),
        (248, b"\x7f\xff\xff\xff", "Keyslot 0 is overlapping with the encrypted payload"),
        (252, b"\0\0\0\1", "Keyslot 0 is corrupted (stripes 1 != 4000)"),
        (300, b"\0\0\0\1", "Keyslot 1 is corrupted (stripes 1 != 4000)"),
    ],
)
def test_damaged_headers(offset, data, message):
    header = make_header()
    header.slots[0].active, header.slots[0].iterations = True, 1000
    raw = bytearray(header.pack())
    raw[offset : offset + len(data)] = data
    with pytest.raises(LaminaError) as caught:
        volume.CipherSpec.of(layout.parse(bytes(raw)))
    assert str(caught.value) == message


def test_slots_may_not_overlap():
    header = make_header()
    header.slots[1].offset = header.slots[0].offset
    with pytest.raises(LaminaError, match="Keyslots 0 and 1 are overlapping in the header"):
        layout.parse(header.pack())
