"""TLS with pre-shared keys (RFC 4279, RFC 5489): users, their keys, and the context that asks.

Python's ``ssl`` can do it from 3.13 on; for older ones the package ``sslpsk3`` adds the same
methods. Both stop at TLS 1.2, which other implementations agree to.
"""

from __future__ import annotations

import errno
import os
import sys
import threading

from lamina.errors import ImageUnsupported, StorageError, UsageError
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl

_CIPHERS = "kECDHEPSK:kDHEPSK:kPSK:!eNULL"
"""Forward secrecy first; OpenSSL's word PSK alone has suites that do not encrypt in it."""


class _Handshake(threading.local):
    user: str | None = None


_last = _Handshake()
"""The library does not say which connection it asks for, but it asks in its thread."""


def read_keys(path: str) -> dict[str, bytes]:
    """User -> key, of a file with a line ``user:key in hexadecimal`` for each.

    Raises StorageError and UsageError.
    """
    keys = {}
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                user, colon, key = line.rstrip("\r\n").rpartition(":")
                if colon and not line.startswith("#"):
                    keys[user] = bytes.fromhex(key)
    except OSError as error:
        raise StorageError(
            f"Unable to access credentials {path}: {os.strerror(error.errno or errno.EIO)}",
            errno=error.errno,
        ) from None
    except ValueError:
        raise UsageError(f"Malformed key in PSK file {path}") from None
    return keys


def server_context(keys: dict[str, bytes]) -> ssl.SSLContext:
    """Raises ImageUnsupported where neither Python nor ``sslpsk3`` can do it."""

    def key_of(user: str | None) -> bytes:
        _last.user = user
        return keys.get(user or "", b"")  # no key: the library refuses

    context = _context(server=True)
    context.set_psk_server_callback(key_of)
    made: ssl.SSLContext = context
    return made


def client_context(user: str, key: bytes) -> ssl.SSLContext:
    """Raises ImageUnsupported where neither Python nor ``sslpsk3`` can do it."""
    context = _context(server=False)
    context.set_psk_client_callback(lambda hint: (user, key))
    made: ssl.SSLContext = context
    return made


def user_of(connection: ssl.SSLSocket) -> str | None:
    """Who connected, if it was with a key. Only in the thread of the handshake, right after it."""
    cipher = connection.cipher()
    return _last.user if cipher and "PSK" in cipher[0] else None


def _context(*, server: bool) -> Any:
    """An SSLContext with the methods that Python has from 3.13 on."""
    import ssl

    kind: Any = ssl.SSLContext
    if sys.version_info < (3, 13):
        try:
            from sslpsk3 import SSLPSKContext

            kind = SSLPSKContext
        except ImportError:
            raise ImageUnsupported(
                "Pre-shared keys (tls-creds-psk) need Python 3.13 or later, or the package sslpsk3"
                " (pip install 'lamina[psk]')"
            ) from None
    context = kind(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    return context
