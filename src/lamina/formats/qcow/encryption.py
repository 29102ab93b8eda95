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
    if options.encrypt_key_secret is None:
        raise UsageError(
            "Parameter 'encrypt.key-secret' is required for cipher", field="encrypt.key-secret"
        )
    return qcow_aes(context.secrets.lookup(options.encrypt_key_secret))
