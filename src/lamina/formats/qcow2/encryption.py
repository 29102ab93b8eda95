"""Encrypted guest data: LUKS with its header in the image, and the older AES.

Tables are never encrypted, and compressed clusters cannot be. With LUKS a sector's tweak is its
number in the file, with AES its number on the guest's disk.
"""

from __future__ import annotations

from lamina.ciphers.luks.amend import DEFAULT_ITER_TIME
from lamina.ciphers.luks.create import first_key, new_header
from lamina.ciphers.luks.header import SIZE, parse
from lamina.ciphers.luks.header import Header as LuksHeader
from lamina.errors import ImageCorrupt, UsageError
from lamina.formats.qcow2.extensions import CryptoExtension
from lamina.formats.qcow2.layout import CRYPT_AES, CRYPT_LUKS, CRYPT_NONE
from lamina.hints import TYPE_CHECKING, Any
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext, OpenContext
    from lamina.block.extents import Cipher
    from lamina.block.node import Node
    from lamina.formats.qcow2.layout import Header
    from lamina.formats.qcow2.mapping import Qcow2Mapping
    from lamina.formats.qcow2.options import CreateOptions, Options

FORMATS = {CRYPT_AES: "aes", CRYPT_LUKS: "luks"}


class Encryption:
    """The cipher of an image's data, and what its sectors are numbered by."""

    def __init__(self, cipher: Cipher, *, by_host: bool, key: bytes = b"") -> None:
        self.cipher = cipher
        self._by_host = by_host
        self.key = key
        """LUKS: the master key."""

    def sector(self, guest_offset: int, host_offset: int) -> int:
        return (host_offset if self._by_host else guest_offset) // SECTOR


class LuksStorage:
    """Where the LUKS header of an image lives; offsets are relative to it (``ciphers.luks``)."""

    def __init__(self, file: Node, extension: CryptoExtension) -> None:
        self._file = file
        self._extension = extension

    def _place(self, offset: int, length: int) -> int:
        """Raises ImageCorrupt for what lies outside of the region that the image names."""
        if offset + length > self._extension.length:
            raise ImageCorrupt(
                f"Request for data outside of encryption header bounds at {offset}",
                path=self._file.filename,
                format="qcow2",
                structure="encryption header",
                offset=self._extension.offset + offset,
            )
        return self._extension.offset + offset

    def read(self, offset: int, length: int) -> bytes:
        place = self._place(offset, length)
        inside = max(min(length, self._file.size - place), 0)
        return self._file.read(place, inside).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        self._file.write(self._place(offset, len(data)), data)

    def flush(self) -> None:
        self._file.flush()


def luks_header(file: Node, header: Header) -> tuple[LuksHeader, LuksStorage]:
    """Raises ImageCorrupt or ImageUnsupported."""
    if header.crypto is None:
        raise ImageCorrupt(
            "Missing CRYPTO header for crypt method 2", format="qcow2", structure="header"
        )
    storage = LuksStorage(file, header.crypto)
    # The payload offset of the header is not used: data lies where the tables say.
    return parse(storage.read(0, SIZE)), storage


def describe_encryption(file: Node, header: Header) -> dict[str, Any]:
    """What ``info`` says, in QEMU's words."""
    if header.crypt_method == CRYPT_NONE:
        return {}
    about: dict[str, Any] = {"format": FORMATS[header.crypt_method]}
    if header.crypt_method == CRYPT_LUKS:
        from lamina.ciphers.luks.describe import describe

        told = describe(luks_header(file, header)[0], detached=False)
        # QEMU's order: the format stands before the cipher's mode.
        about = {}
        for key, value in told.items():
            if key == "cipher-mode":
                about["format"] = "luks"
            about[key] = value
    return {"encrypt": about}


def unlock_image(
    file: Node, header: Header, options: Options, context: OpenContext
) -> Encryption | None:
    """Raises UsageError or Refused without the right secret."""
    actual = FORMATS.get(header.crypt_method)
    if actual is None:
        if options.encrypt_format is not None:
            raise UsageError(
                "No encryption in image header, but options specified format "
                f"'{options.encrypt_format}'",
                field="encrypt.format",
            )
        return None
    if options.encrypt_format not in (None, actual):
        raise UsageError(
            f"Header reported '{actual}' encryption format but options specify "
            f"'{options.encrypt_format}'",
            field="encrypt.format",
        )
    passphrase = context.secrets.require(options.encrypt_key_secret, "encrypt.key-secret")
    if actual == "aes":
        from lamina.ciphers.modes import qcow_aes

        return Encryption(qcow_aes(passphrase), by_host=False)
    from lamina.ciphers.luks.volume import CipherSpec, unlock

    luks, storage = luks_header(file, header)
    key, _ = unlock(luks, passphrase, storage.read)
    return Encryption(CipherSpec.of(luks).sectors(key), by_host=True, key=key)


# -- creating --------------------------------------------------------------------------------------


class NewEncryption:
    """What is to become of a new image, settled before anything of it is written."""

    def __init__(self, options: CreateOptions, context: CreateContext) -> None:
        """Raises UsageError without the secret, ImageUnsupported for a cipher we lack."""
        assert options.encrypt_key_secret is not None
        self._passphrase = context.secrets.lookup(options.encrypt_key_secret)
        given = options.encrypt_iter_time
        self._iter_time = DEFAULT_ITER_TIME if given is None else given
        self._luks = new_luks_header(options) if options.encrypt_format == "luks" else None

    def apply(self, mapping: Qcow2Mapping) -> None:
        """Turn an image that holds nothing yet into an encrypted one."""
        from lamina.formats.qcow2.header import rewrite

        header = mapping.header
        if self._luks is None:
            header.crypt_method = CRYPT_AES
        else:
            self._add_luks_header(mapping, self._luks)
        rewrite(mapping)

    def _add_luks_header(self, mapping: Qcow2Mapping, luks: LuksHeader) -> None:
        header, file = mapping.header, mapping.file
        length = round_up(luks.payload_offset, header.cluster_size)
        offset = mapping.allocator.allocate_table(length >> header.cluster_bits, "LUKS header")
        header.crypt_method = CRYPT_LUKS
        header.crypto = CryptoExtension(offset, luks.payload_offset)
        storage = LuksStorage(file, header.crypto)
        _, material = first_key(luks, self._passphrase, self._iter_time)
        storage.write(luks.slots[0].offset, material)
        storage.write(0, luks.pack())
        if file.size < offset + length:
            file.truncate(offset + length)


def new_luks_header(options: CreateOptions) -> LuksHeader:
    """Raises ImageUnsupported for a cipher that the library lacks."""
    return new_header(
        cipher_alg=options.encrypt_cipher_alg or "aes-256",
        cipher_mode=options.encrypt_cipher_mode or "xts",
        ivgen_alg=options.encrypt_ivgen_alg or "plain64",
        ivgen_hash_alg=options.encrypt_ivgen_hash_alg,
        hash_alg=options.encrypt_hash_alg or "sha256",
    )


def luks_clusters(options: CreateOptions) -> int:
    """Clusters that the LUKS header and its key slots take."""
    return -(-new_luks_header(options).payload_offset // options.cluster_size)
