"""Key slots of LUKS1: passphrase -> slot key -> split key material -> master key.

LUKS On-Disk Format 1.x: PBKDF2 (2.3), anti-forensic splitting (2.4).
"""

from __future__ import annotations

import hashlib
import os
import time
from functools import partial

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


def merge(material: bytes, length: int, hash_name: str) -> bytes:
    """The key of ``length`` bytes that ``split`` took apart."""
    return _xor(_diffused_chain(material, length, hash_name), material[-length:])


def split(key: bytes, hash_name: str, stripes: int = STRIPES) -> bytes:
    """``stripes`` times as many bytes, every one of which is needed to get the key back."""
    material = os.urandom(len(key) * (stripes - 1))
    chain = _diffused_chain(material + bytes(len(key)), len(key), hash_name)
    return material + _xor(chain, key)


def _diffused_chain(material: bytes, length: int, hash_name: str) -> bytes:
    """Over all stripes but the last: each is XORed to what there is, and that is diffused.

    H_diffuse replaces each digest-sized piece by its hash, numbered big-endian; the last one is cut
    to the length of its piece.
    """
    new = getattr(hashlib, hash_name, None) or partial(hashlib.new, hash_name)
    size = new().digest_size
    # Hashes that have seen the number of their piece, and where that piece begins.
    pieces = [
        (new(number.to_bytes(4, "big")), start)
        for number, start in enumerate(range(0, length, size))
    ]
    number = int.from_bytes
    chain = 0
    for start in range(0, len(material) - length, length):
        block = (chain ^ number(material[start : start + length], "big")).to_bytes(length, "big")
        digests = b""
        for seen, at in pieces:
            piece = seen.copy()
            piece.update(block[at : at + size])
            digests += piece.digest()
        chain = number(digests[:length], "big")
    return chain.to_bytes(length, "big")


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")
