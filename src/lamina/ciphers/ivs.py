"""Initialisation vectors of sectors, for a whole batch in one go (dm-crypt's names)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from lamina.ciphers.blocks import KEY_SIZES, BlockCipher
from lamina.errors import ImageUnsupported
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    IVs = npt.NDArray[np.uint8]

Generator = Callable[["npt.NDArray[np.uint64]", int], "IVs"]
"""Sector numbers and the block size in bytes -> an array (sectors, block size) of bytes."""


def generator(name: str, hash_name: str | None, cipher: str, key: bytes) -> Generator:
    """``plain``, ``plain64`` or ``essiv``. ``key`` is the volume's, for essiv.

    Raises ImageUnsupported for another name and for a hash whose digest fits no key of the cipher.
    """
    if name == "plain":
        return plain
    if name == "plain64":
        return plain64
    if name == "essiv":
        if hash_name is None:
            raise ImageUnsupported("Missing IV generator hash specification")
        salt = hashlib.new(hash_name, key).digest()
        if len(salt) not in KEY_SIZES.get(cipher, ()):
            if cipher == "aes":
                message = f"No AES cipher with key size {len(salt)} available"
            else:
                # CAST5, whose keys are all of one length.
                message = f"Cipher {cipher}-128 not supported with essiv"
            raise ImageUnsupported(message)
        encrypt = BlockCipher(cipher, salt).encrypt
        return lambda sectors, size: _from_bytes(encrypt(plain64(sectors, size)), size)
    raise ImageUnsupported(f"Algorithm '{name}' not supported")


def plain64(sectors: npt.NDArray[np.uint64], block_size: int) -> IVs:
    """The sector number as 64 bits, little-endian, padded with zeroes."""
    import numpy as np

    ivs = np.zeros((len(sectors), block_size), dtype=np.uint8)
    ivs[:, :8] = sectors.astype("<u8").view(np.uint8).reshape(-1, 8)
    return ivs


def plain(sectors: npt.NDArray[np.uint64], block_size: int) -> IVs:
    """The low 32 bits of the sector number: repeats every 2 TiB."""
    import numpy as np

    return plain64(sectors & np.uint64(0xFFFFFFFF), block_size)


def _from_bytes(data: bytes, block_size: int) -> IVs:
    import numpy as np

    return np.frombuffer(data, dtype=np.uint8).reshape(-1, block_size)
