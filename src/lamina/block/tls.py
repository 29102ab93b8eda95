"""TLS credentials (``--object tls-creds-x509`` and its like), and the contexts made of them.

The files in ``dir`` are those that QEMU looks for: ``ca-cert.pem``, ``ca-crl.pem``,
``server-cert.pem``, ``server-key.pem``, ``client-cert.pem``, ``client-key.pem`` and, for pre-shared
keys, ``keys.psk`` with a line ``user:key in hexadecimal`` for each user.
"""

from __future__ import annotations

import errno
import os

from lamina.errors import StorageError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass

if TYPE_CHECKING:
    import socket
    import ssl

PSK_KEYS = "keys.psk"
ENDED = "The TLS connection was non-properly terminated."
"""What QEMU says where a connection ends without saying so."""
_VERIFY_ERRORS = {
    10: "The certificate has expired",
    18: "The certificate hasn't got a known issuer",
    19: "The certificate hasn't got a known issuer",
    20: "The certificate hasn't got a known issuer",
    21: "The certificate hasn't got a known issuer",
    23: "The certificate has been revoked",
    62: "Certificate does not match the hostname {}",
    64: "Certificate does not match the hostname {}",
}
"""OpenSSL's numbers (X509_V_ERR_…), and QEMU's sentences."""
_NO_PEER = "@SECLEVEL=0:aNULL:!eNULL:!LOW:!MEDIUM"
"""OpenSSL's name for the suites that nobody authenticates, less those that hardly encrypt."""


@dataclass(frozen=True)
class TlsCredentials:
    """One ``tls-creds-…`` object. ``kind``: x509, psk or anon."""

    kind: str
    endpoint: str = "client"
    """client or server."""
    dir: str | None = None
    """None, x509 clients only: the certificate authorities of the system."""
    verify_peer: bool = True
    username: str = "qemu"
    """psk: of a client."""
    password: bytes | None = None
    """Of the private key."""
    keys_file: str | None = None
    """psk: elsewhere than in ``dir``."""
    priority: str = "NORMAL"
    """Versions and strength, as GnuTLS calls them."""

    def check(self) -> None:
        """Raises UsageError or StorageError where files are missing or nonsense."""
        self.context()

    def path(self, name: str, *, needed: bool = True) -> str | None:
        """Raises StorageError for a needed file that cannot be read."""
        path = os.path.join(self.dir or "", name)
        if os.access(path, os.R_OK):
            return path
        if needed:
            number = errno.EACCES if os.path.exists(path) else errno.ENOENT
            raise StorageError(
                f"Unable to access credentials {path}: {os.strerror(number)}", errno=number
            )
        return None

    def context(self) -> ssl.SSLContext:
        """For one or many connections."""
        import ssl

        from lamina.block import tls_priority

        priority = tls_priority.parse(self.priority, self.kind)
        server = self.endpoint == "server"
        if self.kind == "psk":
            context = self._psk_context()
        else:
            context = ssl.SSLContext(
                ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT
            )
        if self.kind == "anon":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers(_NO_PEER)
        elif self.kind == "x509":
            try:
                self._load_certificates(context)
            except ssl.SSLError as error:
                raise UsageError(
                    f"Unable to load the certificates in {self.dir}: {error}"
                ) from None
            if priority.of_system:
                context.set_ciphers("DEFAULT")
        tls_priority.apply(priority, context)
        return context

    def _load_certificates(self, context: ssl.SSLContext) -> None:
        import ssl

        server = self.endpoint == "server"
        if self.verify_peer:
            context.verify_mode = ssl.CERT_REQUIRED
            context.check_hostname = not server
        else:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.dir is None:
            context.load_default_certs()
            return
        # A client that believes anybody needs no authority.
        authority = self.path("ca-cert.pem", needed=server or self.verify_peer)
        if authority is not None:
            context.load_verify_locations(authority)
        revoked = self.path("ca-crl.pem", needed=False)
        if revoked is not None:
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        certificate = self.path(f"{self.endpoint}-cert.pem", needed=server)
        key = self.path(f"{self.endpoint}-key.pem", needed=server or certificate is not None)
        if certificate is not None:
            context.load_cert_chain(certificate, key, self.password)

    def _psk_context(self) -> ssl.SSLContext:
        from lamina.block import psk

        path = self.keys_file or self.path(PSK_KEYS)
        assert path is not None
        keys = psk.read_keys(path)
        if self.endpoint == "server":
            return psk.server_context(keys)
        if self.username not in keys:
            raise UsageError(f"Username {self.username} not found in PSK file {path}")
        return psk.client_context(self.username, keys[self.username])


@dataclass(frozen=True)
class Authorization:
    """``authz-simple``: the one identity that may use a server."""

    identity: str
    """A distinguished name (x509), as openssl and certtool print it, or the name of a user."""

    def allows(self, name: str | None) -> bool:
        return name == self.identity


def peer_name(connection: ssl.SSLSocket) -> str | None:
    """The distinguished name in the certificate of the other side, last part first (RFC 4514), or
    the user whose key it has. Right after the handshake, in its thread."""
    certificate = connection.getpeercert()
    if not certificate:
        from lamina.block.psk import user_of

        return user_of(connection)
    parts = []
    for group in certificate.get("subject", ()):
        pairs = [f"{_SHORT.get(str(one[0]), str(one[0]))}={_escaped(str(one[1]))}" for one in group]
        parts.append("+".join(pairs))
    return ",".join(reversed(parts))


_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}


def _escaped(value: str) -> str:
    text = "".join("\\" + letter if letter in ',+"\\<>;' else letter for letter in value)
    return "\\" + text if text[:1] in ("#", " ") else text


def secure(
    connection: socket.socket,
    context: ssl.SSLContext,
    *,
    server: bool,
    hostname: str | None = None,
) -> ssl.SSLSocket:
    """The same connection under TLS, after the handshake. Raises StorageError.

    ``hostname`` is what the certificate of the server must be for.
    """
    import ssl

    if context.check_hostname and not hostname:
        raise UsageError("No hostname for certificate validation")
    try:
        secured = context.wrap_socket(
            connection, server_side=server, server_hostname=None if server else hostname
        )
    except ssl.SSLCertVerificationError as error:
        text = _VERIFY_ERRORS.get(error.verify_code) or f"Verify failed: {error.verify_message}"
        raise StorageError(text.format(hostname), errno=errno.EINVAL) from None
    except ssl.SSLError as error:
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            raise StorageError("Verify failed: No certificate was found.") from None
        text = ENDED if error.reason in (None, "UNEXPECTED_EOF_WHILE_READING") else error.reason
        raise StorageError(f"TLS handshake failed: {text}", errno=errno.EINVAL) from None
    except TimeoutError:
        raise StorageError("TLS handshake failed: it takes too long") from None
    except OSError as error:
        text = error.strerror or ENDED
        raise StorageError(f"TLS handshake failed: {text}", errno=error.errno) from None
    from lamina.block.tls_priority import too_weak

    weak = too_weak(secured)
    if weak is not None:
        secured.close()
        raise StorageError(f"TLS handshake failed: the cipher {weak} is too weak")
    return secured
