"""Damaged LUKS volumes as nodes: refused in QEMU's words, before any key is asked for."""

from __future__ import annotations

import os
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import lamina
from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.secrets import Secrets
from lamina.block.session import Session
from lamina.ciphers.luks.header import SIZE as HEADER_SIZE
from lamina.errors import ImageCorrupt, LaminaError

SIZE = 1 << 20
KEY = {"key-secret": "key"}


@pytest.fixture(scope="module")
def session() -> Session:
    secrets = Secrets()
    secrets.add("key", b"open sesame")
    return Session(secrets=secrets)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, session: Session) -> Path:
    path = tmp_path_factory.mktemp("luks") / "volume"
    options = {"key-secret": "key", "iter-time": "0"}
    create_image(str(path), "luks", session=session, options=options, size=SIZE)
    return path


@pytest.fixture
def volume(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path))


def change(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def refused(action: Callable[[], object]) -> LaminaError:
    """The error, which took little time and memory."""
    tracemalloc.start()
    before = time.process_time()
    try:
        with pytest.raises(LaminaError) as caught:
            action()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - before < 2
    assert peak < 16 << 20
    return caught.value


def word(number: int) -> bytes:
    return struct.pack(">I", number)


HEADERS = [
    (0, b"X", "Volume is not in LUKS format", 0),
    (7, b"\2", "LUKS version 2 is not supported", 6),
    (8, b"a" * 32, "LUKS header cipher name is not NUL terminated", 8),
    (40, b"a" * 32, "LUKS header cipher mode is not NUL terminated", 40),
    (72, b"a" * 32, "LUKS header hash spec is not NUL terminated", 72),
    (8, b"foo\0", "Algorithm 'foo' with key size 32 bytes not supported", 8),
    (40, b"xtsplain64\0", "Unexpected cipher mode string format 'xtsplain64'", 40),
    (40, b"foo-plain64\0", "Cipher mode 'foo' not supported", 40),
    (40, b"xts-foo\0", "IV generator 'foo' not supported", 40),
    (40, b"cbc-essiv\0", "Algorithm 'aes' with key size 64 bytes not supported", 8),
    (72, b"foo\0", "Hash algorithm 'foo' not supported", 72),
    (104, word(0), "LUKS payload is overlapping with the header", 104),
    (104, word(1), "LUKS payload is overlapping with the header", 104),
    (104, word(100), "Keyslot 0 is overlapping with the encrypted payload", 248),
    (
        104,
        word(0xFFFFFFFF),
        "Could not refresh total sector count: Input/output error",
        104,
    ),
    (108, word(63), "Algorithm 'aes' with key size 31 bytes not supported", 8),
    (108, word(0xFFFFFFFF), "Keyslot 0 is overlapping with the encrypted payload", 248),
    (164, word(0), "LUKS key iteration count is zero", 164),
    (208, word(1), "Keyslot 0 state (active/disable) is corrupted", 208),
    (212, word(0), "Keyslot 0 iteration count is zero", 212),
    (248, word(0), "Keyslot 0 is overlapping with the LUKS header", 248),
    (248, word(0x7FFFFFFF), "Keyslot 0 is overlapping with the encrypted payload", 248),
    (296, word(8), "Keyslots 0 and 1 are overlapping in the header", 296),
    (252, word(1), "Keyslot 0 is corrupted (stripes 1 != 4000)", 252),
    (300, word(1), "Keyslot 1 is corrupted (stripes 1 != 4000)", 300),
]


@pytest.mark.parametrize(("offset", "data", "message", "place"), HEADERS)
@pytest.mark.parametrize("inspect", [True, False], ids=["inspect", "open"])
def test_headers(
    offset: int,
    data: bytes,
    message: str,
    place: int,
    inspect: bool,
    volume: Path,
    session: Session,
) -> None:
    change(volume, offset, data)
    given = {} if inspect else KEY
    error = refused(
        lambda: Backend.open(
            str(volume), session=session, format="luks", inspect=inspect, options=given
        )
    )
    assert str(error).endswith(message)
    assert error.offset == place


def test_every_truncation(volume: Path, session: Session) -> None:
    """A volume whose payload is gone is refused; one whose payload is short is shorter."""
    payload = volume.stat().st_size - SIZE
    for length in (payload + 512, payload):
        os.truncate(volume, length)
        with Backend.open(str(volume), session=session, format="luks", inspect=True) as disk:
            assert disk.size == length - payload
    for length in (payload - 512, 4096, 1024, 512, 6, 0):
        os.truncate(volume, length)
        error = refused(
            lambda: Backend.open(str(volume), session=session, format="luks", inspect=True)
        )
        assert isinstance(error, ImageCorrupt)
        assert error.field == ("magic" if length < HEADER_SIZE else "payload-offset")


def test_damaged_key_material_opens_with_no_passphrase(volume: Path, session: Session) -> None:
    change(volume, 4096 + 100, b"damaged")
    error = refused(lambda: Backend.open(str(volume), session=session, format="luks", options=KEY))
    assert str(error).endswith("Invalid password, cannot unlock any keyslot")


def test_iterations_cost_nothing_until_a_key_is_asked_for(volume: Path) -> None:
    """Deriving a key may take hours, as the header wants it; looking at it does not."""
    change(volume, 164, b"\xff" * 4)
    change(volume, 212, b"\xff" * 4)
    before = time.process_time()
    info = lamina.inspect(str(volume))
    assert time.process_time() - before < 1
    assert info.encrypted


def test_a_header_elsewhere_is_not_found_by_the_volume(tmp_path: Path, session: Session) -> None:
    """Nothing in a payload names its header: only the caller does."""
    header, payload = tmp_path / "header", tmp_path / "payload"
    options = {"key-secret": "key", "iter-time": "0", "detached-header": "on"}
    create_image(str(header), "luks", session=session, options=options, size=SIZE)
    payload.write_bytes(bytes(SIZE))
    error = refused(
        lambda: Backend.open(str(payload), session=session, format="luks", options=KEY)
    )
    assert str(error).endswith("Volume is not in LUKS format")
    # Nor does a detached header with a payload of its own place, behind the end of the file.
    change(header, 104, word(0xFFFFFFFF))
    given = {**KEY, "header.driver": "file", "header.filename": str(header)}
    error = refused(
        lambda: Backend.open(str(payload), session=session, format="luks", options=given)
    )
    assert error.offset == 104


@pytest.mark.parametrize("detached", ["off", "on"])
def test_metadata_is_always_there(detached: str, tmp_path: Path, session: Session) -> None:
    """``preallocation=metadata`` is accepted, and is no different from none."""
    sizes = set()
    for mode in ("off", "metadata"):
        path = tmp_path / mode
        options = {
            "key-secret": "key",
            "iter-time": "0",
            "preallocation": mode,
            "detached-header": detached,
        }
        create_image(str(path), "luks", session=session, options=options, size=SIZE)
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1
