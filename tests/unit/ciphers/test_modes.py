"""Batches of sectors against the library's own modes, a sector at a time."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from lamina.ciphers import ivs
from lamina.ciphers.luks import keys as luks
from lamina.ciphers.modes import BATCH, MODES
from lamina.errors import ImageUnsupported

SECTORS = BATCH + 7


def library(algorithm, mode, data):
    encryptor = Cipher(algorithm, mode).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def vector(name, key, sector, size):
    if name == "essiv":
        digest = hashlib.sha256(key).digest()
        return library(algorithms.AES(digest), modes.ECB(), sector.to_bytes(16, "little"))
    bits = 32 if name == "plain" else 64
    return (sector % (1 << bits)).to_bytes(size, "little")


def check(mode, cipher, key, iv_name, sector, expected):
    hash_name = "sha256" if iv_name == "essiv" else None
    generate = ivs.generator(iv_name, hash_name, cipher, key)
    cipher = MODES[mode](cipher, key, generate)
    clear = os.urandom(SECTORS * 512)
    buffer = bytearray(clear)
    cipher.encrypt(memoryview(buffer), sector)
    for number in (0, 1, BATCH - 1, BATCH, SECTORS - 1):
        at = slice(number * 512, number * 512 + 512)
        assert buffer[at] == expected(sector + number, clear[at])
    cipher.decrypt(memoryview(buffer), sector)
    assert buffer == clear


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("iv_name", ["plain", "plain64"])
def test_xts(size, iv_name):
    key = os.urandom(2 * size)

    def expected(sector, data):
        tweak = vector(iv_name, key, sector, 16)
        return library(algorithms.AES(key), modes.XTS(tweak), data)

    check("xts", "aes", key, iv_name, (1 << 32) - 5, expected)


@pytest.mark.parametrize("iv_name", ["plain", "plain64", "essiv"])
@pytest.mark.parametrize("mode", ["cbc", "ctr"])
def test_chained(mode, iv_name):
    key = os.urandom(32)
    kind = {"cbc": modes.CBC, "ctr": modes.CTR}[mode]

    def expected(sector, data):
        iv = vector(iv_name, key, sector, 16)
        return library(algorithms.AES(key), kind(iv), data)

    check(mode, "aes", key, iv_name, 12345, expected)


def test_small_blocks():
    key = os.urandom(16)

    def expected(sector, data):
        iv = vector("plain64", key, sector, 8)
        return library(CAST5(key), modes.CBC(iv), data)

    check("cbc", "cast5", key, "plain64", 99, expected)


def test_ecb():
    key = os.urandom(24)
    check("ecb", "aes", key, "plain", 0, lambda _, d: library(algorithms.AES(key), modes.ECB(), d))


def test_unknown_ciphers_are_refused():
    with pytest.raises(ImageUnsupported, match="'serpent' not supported"):
        MODES["cbc"]("serpent", bytes(32), ivs.plain64)
    with pytest.raises(ImageUnsupported, match="key size 20"):
        ivs.generator("essiv", "sha1", "aes", bytes(32))
    with pytest.raises(ImageUnsupported, match="Unsupported cipher mode xts"):
        MODES["xts"]("cast5", bytes(32), ivs.plain64)


def test_plain_repeats_after_two_tebibytes():
    sectors = np.array([7, (1 << 32) + 7], dtype=np.uint64)
    assert ivs.plain(sectors, 16)[0].tobytes() == ivs.plain(sectors, 16)[1].tobytes()
    assert ivs.plain64(sectors, 16)[0].tobytes() != ivs.plain64(sectors, 16)[1].tobytes()


@pytest.mark.parametrize("hash_name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 33, 64])
def test_split_keys_come_back_whole(hash_name, length):
    key = os.urandom(length)
    material = luks.split(key, hash_name, stripes=50)
    assert len(material) == 50 * length
    assert luks.merge(material, length, hash_name) == key
    damaged = bytes([material[0] ^ 1]) + material[1:]
    assert luks.merge(damaged, length, hash_name) != key


def test_pbkdf2_is_hashlibs():
    for name in ("sha1", "sha256"):
        expected = hashlib.pbkdf2_hmac(name, b"secret", b"salt", 100, 40)
        assert luks.pbkdf2(name, b"secret", b"salt", 100, 40) == expected
