"""Options of the qcow driver, as QEMU documents them."""

from __future__ import annotations

from lamina.block.options import Type, option
from lamina.records import dataclass


@dataclass(frozen=True)
class QcowOptions:
    encrypt_format: str | None = option("encrypt.format", help="Encryption format: aes")
    encrypt_key_secret: str | None = option(
        "encrypt.key-secret",
        help="ID of the secret that provides the AES encryption key",
        aliases=("key-secret",),
    )


@dataclass(frozen=True)
class QcowCreateOptions:
    size: int = option("size", Type.SIZE, None, "Virtual disk size")
    backing_file: str | None = option("backing_file", help="File name of a base image")
    backing_fmt: str | None = option("backing_fmt", help="Format of the backing image")
    encryption: bool | None = option(
        "encryption",
        Type.BOOL,
        None,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    )
    encrypt_format: str | None = option(
        "encrypt.format", help="Encrypt the image, format choices: 'aes'"
    )
    encrypt_key_secret: str | None = option(
        "encrypt.key-secret", help="ID of the secret that provides the AES encryption key"
    )
