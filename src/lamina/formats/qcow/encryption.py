"""The cipher of an encrypted image."""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.context import OpenContext
    from lamina.block.extents import Cipher
    from lamina.formats.qcow.options import QcowOptions


def aes_cipher(options: QcowOptions, context: OpenContext) -> Cipher:
    """Raises UsageError without the secret."""
    from lamina.ciphers.modes import qcow_aes

    if options.encrypt_format not in (None, "aes"):
        raise UsageError(
            f"Header reported 'aes' encryption format but options specify "
            f"'{options.encrypt_format}'",
            field="encrypt.format",
        )
    return qcow_aes(context.secrets.require(options.encrypt_key_secret, "encrypt.key-secret"))
