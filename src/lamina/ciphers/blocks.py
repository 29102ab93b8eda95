"""Block ciphers without a mode: whole buffers of blocks in one call of the C library.

Modes are built on these with numpy (``xts``, ``cbc``), because a call per sector costs more than
the cipher itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from lamina.errors import ImageUnsupported
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm

KEY_SIZES = {"aes": (16, 24, 32), "cast5": (16,), "sm4": (16,)}
"""Bytes. The ciphers of LUKS that the ``cryptography`` library has."""


class BlockCipher:
    """Raw encryption and decryption of runs of blocks. Thread-safe."""

    def __init__(self, name: str, key: bytes) -> None:
        """Raises ImageUnsupported for a cipher or key size that the library lacks."""
        if name not in KEY_SIZES:
            raise ImageUnsupported(f"Algorithm '{name}' not supported")
        if len(key) not in KEY_SIZES[name]:
            raise ImageUnsupported(f"No {name.upper()} cipher with key size {len(key)} available")
        self.name = name
        algorithm = _algorithm(name)(key)
        self.block_size = algorithm.block_size // 8
        """Bytes."""
        self._cipher = _ecb(algorithm)

    def encrypt(self, blocks: Any) -> bytes:
        """``blocks`` is any contiguous buffer of whole blocks."""
        result: bytes = self._cipher.encryptor().update(blocks)
        return result

    def encrypt_into(self, blocks: Any, result: Any) -> None:
        """``result`` is a byte buffer with room for one block more than ``blocks`` has."""
        self._cipher.encryptor().update_into(blocks, result)

    def decrypt_into(self, blocks: Any, result: Any) -> None:
        self._cipher.decryptor().update_into(blocks, result)

    def decrypt(self, blocks: Any) -> bytes:
        result: bytes = self._cipher.decryptor().update(blocks)
        return result


@functools.cache
def _algorithm(name: str) -> Callable[[bytes], BlockCipherAlgorithm]:
    from cryptography.hazmat.primitives.ciphers import algorithms

    if name == "cast5":
        from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5

        return CAST5
    algorithm: Callable[[bytes], BlockCipherAlgorithm] = getattr(algorithms, name.upper())
    return algorithm


def _ecb(algorithm: BlockCipherAlgorithm) -> Any:
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

    return Cipher(algorithm, modes.ECB())
