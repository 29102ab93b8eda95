"""Key slots of LUKS1: passphrase -> slot key -> split key material -> master key.

LUKS On-Disk Format 1.x: PBKDF2 (2.3), anti-forensic splitting (2.4).
"""

from __future__ import annotations

import hashlib
import os
import time

STRIPES = 4000


def pbkdf2(hash_name: str, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

    algorithm = getattr(hashes, hash_name.upper(), None)
    if algorithm is None:
        return hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, length)
    derived: bytes = PBKDF2HMAC(algorithm(), length, salt, iterations).derive(passphrase)
    return derived


def iterations_per_second(hash_name: str, length: int) -> int:
    """PBKDF2 iterations that this machine does in a second of CPU time, for ``length`` bytes."""
    iterations = 1 << 15
    while True:
        start = time.process_time()
        pbkdf2(hash_name, b"benchmark", b"0" * 32, iterations, length)
        elapsed = time.process_time() - start
        if elapsed > 0.1:
            return int(iterations / elapsed)
        iterations *= 4


def diffuse(data: bytes, hash_name: str) -> bytes:
    """H_diffuse: each digest-sized piece is replaced by its hash, numbered big-endian."""
    size = hashlib.new(hash_name).digest_size
    pieces = []
    for number, start in enumerate(range(0, len(data), size)):
        piece = data[start : start + size]
        digest = hashlib.new(hash_name, number.to_bytes(4, "big") + piece).digest()
        pieces.append(digest[: len(piece)])
    return b"".join(pieces)


def merge(material: bytes, length: int, hash_name: str) -> bytes:
    """The key of ``length`` bytes that ``split`` took apart."""
    return _xor(_diffused_chain(material, length, hash_name), material[-length:])


def split(key: bytes, hash_name: str, stripes: int = STRIPES) -> bytes:
    """``stripes`` times as many bytes, every one of which is needed to get the key back."""
    material = os.urandom(len(key) * (stripes - 1))
    chain = _diffused_chain(material + bytes(len(key)), len(key), hash_name)
    return material + _xor(chain, key)


def _diffused_chain(material: bytes, length: int, hash_name: str) -> bytes:
    """Over all stripes but the last."""
    chain = bytes(length)
    for start in range(0, len(material) - length, length):
        chain = diffuse(_xor(chain, material[start : start + length]), hash_name)
    return chain


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")
