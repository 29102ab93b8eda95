"""A new qcow image: the header, the name of its backing file, and an empty L1 table."""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.formats.qcow import layout
from lamina.hints import TYPE_CHECKING
from lamina.units import SECTOR, round_up

if TYPE_CHECKING:
    from lamina.block.context import CreateContext
    from lamina.block.node import Node
    from lamina.formats.qcow.options import QcowCreateOptions


def create(options: QcowCreateOptions, file: Node, context: CreateContext) -> None:
    """Clusters of 4 KiB; of 512 bytes above a backing file, so that no write has to copy."""
    size = round_up(options.size, SECTOR)
    if size == 0:
        raise UsageError("Image size is too small, cannot be zero length", field="size")
    name = (options.backing_file or "").encode()
    if len(name) > layout.MAX_BACKING_NAME:
        raise UsageError("Backing file name too long", field="backing_file")
    header = layout.Header(
        size=size,
        cluster_bits=9 if name else 12,
        l2_bits=12 if name else 9,
        l1_offset=round_up(layout.SIZE + len(name), 8),
        crypt_method=_crypt_method(options, context),
        backing_offset=layout.SIZE if name else 0,
        backing_length=len(name),
    )
    if header.l1_entries * 8 > layout.MAX_L1_BYTES:
        raise UsageError("Image too large", field="size")
    # The table first: a file without a header is no image yet.
    file.write_zeroes(0, header.l1_offset + 8 * header.l1_entries)
    file.write(layout.SIZE, name)
    file.write(0, header.pack())
    file.flush()


def _crypt_method(options: QcowCreateOptions, context: CreateContext) -> int:
    wanted = options.encrypt_format
    if options.encryption is not None:
        if wanted is not None:
            raise UsageError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time",
                field="encryption",
            )
        wanted = "aes" if options.encryption else None
    if wanted is None:
        if options.encrypt_key_secret is not None:
            raise UsageError("Parameter 'encrypt.format' is missing", field="encrypt.format")
        return layout.CRYPT_NONE
    if wanted not in ("aes", "luks"):
        raise UsageError(
            f"Parameter 'format' does not accept value '{wanted}'", field="encrypt.format"
        )
    if wanted == "luks":
        raise UsageError("Unsupported encryption format", field="encrypt.format")
    context.secrets.require(options.encrypt_key_secret, "encrypt.key-secret")
    return layout.CRYPT_AES
