"""A new LUKS volume: key material first, then the header that names it."""

from __future__ import annotations

from lamina.ciphers.luks.create import first_key, new_header
from lamina.ciphers.luks.header import Header
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import CreateContext
    from lamina.block.node import Node
    from lamina.formats.luks.options import LuksCreateOptions


def header_for(options: LuksCreateOptions) -> Header:
    """Raises ImageUnsupported for a cipher that the library lacks."""
    return new_header(
        cipher_alg=options.cipher_alg,
        cipher_mode=options.cipher_mode,
        ivgen_alg=options.ivgen_alg,
        ivgen_hash_alg=options.ivgen_hash_alg,
        hash_alg=options.hash_alg,
        detached=options.detached_header,
    )


def file_size(options: LuksCreateOptions) -> int:
    """Bytes of the file: a detached header has no payload behind it."""
    header = header_for(options)
    return header.slots_end + (0 if options.detached_header else options.size)


def create(options: LuksCreateOptions, file: Node, context: CreateContext) -> None:
    """The header and a key; the payload of an attached one is there already, or grows."""
    passphrase = context.secrets.require(options.key_secret, "key-secret")
    header = header_for(options)
    _, material = first_key(header, passphrase, options.iter_time)
    file.write(header.slots[0].offset, material)
    file.flush()
    file.write(0, header.pack())
    file.flush()
