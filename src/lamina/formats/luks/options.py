"""Options of the luks driver, as QEMU documents them."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.ciphers.luks.create import CIPHERS, IV_GENERATORS
from lamina.ciphers.luks.volume import HASHES
from lamina.ciphers.modes import MODES
from lamina.records import dataclass


@dataclass(frozen=True)
class LuksOptions:
    key_secret: str | None = option(
        "key-secret", help="ID of the secret that provides the keyslot passphrase"
    )


@dataclass(frozen=True)
class LuksCreateOptions:
    size: int = option("size", Type.SIZE, None, help="Virtual disk size")
    key_secret: str | None = option(
        "key-secret", help="ID of the secret that provides the keyslot passphrase"
    )
    cipher_alg: str = option(
        "cipher-alg", default="aes-256", choices=CIPHERS, help="Name of encryption cipher algorithm"
    )
    cipher_mode: str = option(
        "cipher-mode", default="xts", choices=MODES, help="Name of encryption cipher mode"
    )
    ivgen_alg: str = option(
        "ivgen-alg", default="plain64", choices=IV_GENERATORS, help="Name of IV generator algorithm"
    )
    ivgen_hash_alg: str | None = option(
        "ivgen-hash-alg", choices=HASHES, help="Name of IV generator hash algorithm"
    )
    hash_alg: str = option(
        "hash-alg", default="sha256", choices=HASHES, help="Name of encryption hash algorithm"
    )
    iter_time: int = option(
        "iter-time", Type.NUMBER, 2000, help="Time to spend in PBKDF in milliseconds"
    )
    detached_header: bool = option(
        "detached-header", Type.BOOL, False, help="Create a detached LUKS header"
    )


@dataclass(frozen=True)
class LuksAmendOptions:
    state: str | None = option(
        "state", help="Select new state of affected keyslots (active/inactive)"
    )
    new_secret: str | None = option(
        "new-secret", help="New secret to set in the matching keyslots. Empty string to erase"
    )
    old_secret: str | None = option(
        "old-secret", help="Select all keyslots that match this password"
    )
    keyslot: int | None = option(
        "keyslot", Type.NUMBER, None, help="Select a single keyslot to modify explicitly"
    )
    iter_time: int | None = option(
        "iter-time", Type.NUMBER, None, help="Time to spend in PBKDF in milliseconds"
    )
