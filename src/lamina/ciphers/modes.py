"""XTS, CBC, ECB and CTR over batches of 512-byte sectors: one library call for all of them.

A call per sector spends its time in Python. Here tweaks and vectors of a whole batch are arrays,
and the cipher sees one long run of blocks.
"""

from __future__ import annotations

import threading

from lamina.ciphers.blocks import BlockCipher
from lamina.ciphers.ivs import plain64
from lamina.errors import ImageUnsupported
from lamina.hints import TYPE_CHECKING, Any
from lamina.units import SECTOR

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lamina.ciphers.ivs import Generator

BATCH = 1024
"""Sectors worked on at once: half a megabyte stays in the cache of one core."""


class SectorCipher:
    """``block.extents.Cipher``: in place, whole sectors, numbered from ``sector``."""

    def __init__(self, iv: Generator, block_size: int) -> None:
        self._iv = iv
        self._block_size = block_size
        self._scratch = threading.local()

    def scratch(self, name: str) -> Any:
        """Bytes for a batch, one array per thread and name: fresh pages cost more than AES."""
        import numpy as np

        array = getattr(self._scratch, name, None)
        if array is None:
            array = np.empty(BATCH * SECTOR + 16, dtype=np.uint8)
            setattr(self._scratch, name, array)
        return array

    def encrypt(self, buffer: memoryview, sector: int) -> None:
        self._each_batch(buffer, sector, encrypt=True)

    def decrypt(self, buffer: memoryview, sector: int) -> None:
        self._each_batch(buffer, sector, encrypt=False)

    def _each_batch(self, buffer: memoryview, sector: int, *, encrypt: bool) -> None:
        import numpy as np

        sectors = np.frombuffer(buffer, dtype=np.uint8).reshape(-1, SECTOR)
        for start in range(0, len(sectors), BATCH):
            part = sectors[start : start + BATCH]
            first = sector + start
            numbers = np.arange(first, first + len(part), dtype=np.uint64)
            self._crypt(part, self._iv(numbers, self._block_size), encrypt)

    def _crypt(
        self, sectors: npt.NDArray[np.uint8], ivs: npt.NDArray[np.uint8], encrypt: bool
    ) -> None:
        raise NotImplementedError


class Xts(SectorCipher):
    """IEEE 1619: each half of the key is a key; the second one makes the tweaks."""

    def __init__(self, cipher: str, key: bytes, iv: Generator) -> None:
        half = len(key) // 2
        self._data = BlockCipher(cipher, key[:half])
        self._tweak = BlockCipher(cipher, key[half:])
        if self._data.block_size != 16:
            raise ImageUnsupported("Unsupported cipher mode xts", field="cipher-mode")
        super().__init__(iv, 16)

    def _crypt(
        self, sectors: npt.NDArray[np.uint8], ivs: npt.NDArray[np.uint8], encrypt: bool
    ) -> None:
        import numpy as np

        size = sectors.size
        words = sectors.view("<u8")
        work = self.scratch("work")
        masked = work[:size].view("<u8").reshape(words.shape)
        tweaks = self._tweaks(ivs)
        np.bitwise_xor(words, tweaks, out=masked)
        run = self._data.encrypt_into if encrypt else self._data.decrypt_into
        run(work[:size], work[: size + 16])
        np.bitwise_xor(masked, tweaks, out=words)

    def _tweaks(self, ivs: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
        """Tweaks of all blocks: that of block j is the encrypted vector times x^j in GF(2^128).

        The field's polynomial is x^128 + x^7 + x^2 + x + 1: what a shift by j < 64 pushes out at
        the top comes back at the bottom, times x^7 + x^2 + x + 1.
        """
        import numpy as np

        first = np.frombuffer(self._tweak.encrypt(np.ascontiguousarray(ivs)), dtype="<u8")
        low, high = first[0::2, np.newaxis], first[1::2, np.newaxis]
        count, blocks = len(ivs), SECTOR // 16
        left = np.arange(blocks, dtype=np.uint64)
        right = np.uint64(64) - left
        tweaks = self.scratch("tweaks")[: count * SECTOR].view("<u8").reshape(count, -1)
        shifted, out = self.scratch("work")[: count * SECTOR].view("<u8").reshape(2, count, blocks)
        bottom = self.scratch("bottom")[: count * SECTOR // 2].view("<u8").reshape(count, blocks)

        np.left_shift(high, left, out=shifted)
        np.right_shift(low, right, out=out)
        np.bitwise_or(shifted, out, out=tweaks[:, 1::2])

        np.left_shift(low, left, out=bottom)
        np.right_shift(high, right, out=out)
        bottom ^= out
        for power in (np.uint64(1), np.uint64(2)):
            np.left_shift(out, power, out=shifted)
            bottom ^= shifted
        np.left_shift(out, np.uint64(7), out=shifted)
        np.bitwise_xor(bottom, shifted, out=tweaks[:, 0::2])
        return tweaks  # type: ignore[no-any-return]


class OneKey(SectorCipher):
    """Modes that use the whole key for the data."""

    def __init__(self, cipher: str, key: bytes, iv: Generator) -> None:
        self._data = BlockCipher(cipher, key)
        super().__init__(iv, self._data.block_size)


class Cbc(OneKey):
    """Decrypting is parallel over all blocks; encrypting is, over sectors."""

    def _crypt(
        self, sectors: npt.NDArray[np.uint8], ivs: npt.NDArray[np.uint8], encrypt: bool
    ) -> None:
        import numpy as np

        size = self._block_size
        if not encrypt:
            chain = np.concatenate([ivs, sectors[:, :-size]], axis=1)
            clear = self.scratch("result")
            self._data.decrypt_into(sectors, clear[: sectors.size + 16])
            np.bitwise_xor(clear[: sectors.size].reshape(sectors.shape), chain, out=sectors)
            return
        before = ivs
        for start in range(0, SECTOR, size):
            block = sectors[:, start : start + size] ^ before
            before = np.frombuffer(self._data.encrypt(block), dtype=np.uint8).reshape(-1, size)
            sectors[:, start : start + size] = before


class Ctr(OneKey):
    """The vector of a sector counts up (big-endian) from block to block; both ways are the same."""

    def _crypt(
        self, sectors: npt.NDArray[np.uint8], ivs: npt.NDArray[np.uint8], encrypt: bool
    ) -> None:
        import numpy as np

        size = self._block_size
        blocks = SECTOR // size
        top = 1 << 8 * size
        counters = b"".join(
            ((int.from_bytes(iv.tobytes(), "big") + number) % top).to_bytes(size, "big")
            for iv in ivs
            for number in range(blocks)
        )
        stream = np.frombuffer(self._data.encrypt(counters), dtype=np.uint8)
        np.bitwise_xor(sectors, stream.reshape(sectors.shape), out=sectors)


class Ecb(OneKey):
    """Every block on its own; the vector is not used."""

    def _crypt(
        self, sectors: npt.NDArray[np.uint8], ivs: npt.NDArray[np.uint8], encrypt: bool
    ) -> None:
        import numpy as np

        run = self._data.encrypt if encrypt else self._data.decrypt
        sectors[:] = np.frombuffer(run(sectors), dtype=np.uint8).reshape(sectors.shape)


MODES = {"xts": Xts, "cbc": Cbc, "ctr": Ctr, "ecb": Ecb}

QCOW_AES_KEY_BYTES = 16


def qcow_aes(passphrase: bytes) -> Cbc:
    """What qcow and older qcow2 images are encrypted with: AES-128 in CBC mode, vectors of plain64;
    the key is the passphrase itself, cut or padded with zeroes."""
    key = passphrase[:QCOW_AES_KEY_BYTES].ljust(QCOW_AES_KEY_BYTES, b"\0")
    return Cbc("aes", key, plain64)
