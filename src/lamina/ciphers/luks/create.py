"""A new LUKS1 header with its first key slot, and the options that describe one."""

from __future__ import annotations

import os
import uuid

from lamina.ciphers.luks.header import Header
from lamina.ciphers.luks.keys import iterations_per_second
from lamina.ciphers.luks.volume import CipherSpec, fill_slot, set_master_key
from lamina.errors import UsageError

CIPHERS = (
    *("aes-128", "aes-192", "aes-256", "cast5-128"),
    *("serpent-128", "serpent-192", "serpent-256"),
    *("twofish-128", "twofish-192", "twofish-256", "sm4"),
)
"""What QEMU names; ``CipherSpec.of`` refuses those that the library lacks."""
IV_GENERATORS = ("plain", "plain64", "essiv")
DIGEST_SHARE = 8
"""The digest of the master key takes an eighth of the iterations of a key slot."""


def new_header(
    *,
    cipher_alg: str,
    cipher_mode: str,
    ivgen_alg: str,
    ivgen_hash_alg: str | None,
    hash_alg: str,
    detached: bool = False,
) -> Header:
    """An empty header with everything in its place; no key yet. Raises ImageUnsupported."""
    cipher, _, bits = cipher_alg.partition("-")
    key_bytes = int(bits or 128) // 8 * (2 if cipher_mode == "xts" else 1)
    mode = f"{cipher_mode}-{ivgen_alg}"
    if ivgen_alg == "essiv":
        mode += f":{ivgen_hash_alg or 'sha256'}"
    header = Header(cipher, mode, hash_alg, 0, key_bytes, uuid=str(uuid.uuid4()))
    CipherSpec.of(header)
    header.place_slots(detached=detached)
    return header


def slot_iterations(header: Header, iter_time: int) -> int:
    """So many that deriving a key takes ``iter_time`` milliseconds here. Raises UsageError."""
    if not 0 <= iter_time <= 0xFFFFFFFF:
        raise UsageError("iter-time must be between 0 and 4294967295", field="iter-time")
    iterations = iterations_per_second(header.hash, header.key_bytes) * iter_time // 1000
    if iterations > 0xFFFFFFFF:
        raise UsageError(f"PBKDF iterations {iterations} larger than 4294967295")
    return iterations


def first_key(header: Header, passphrase: bytes, iter_time: int) -> tuple[bytes, bytes]:
    """Make a master key and put it into slot 0 of ``header``.

    Returns the key, and the slot's material, which is to be stored before the header.
    """
    key = os.urandom(header.key_bytes)
    iterations = slot_iterations(header, iter_time)
    set_master_key(header, key, iterations // DIGEST_SHARE)
    return key, fill_slot(header, 0, key, passphrase, iterations)
