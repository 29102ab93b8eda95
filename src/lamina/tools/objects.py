"""``--object TYPE,id=ID,KEY=VALUE,…`` (or JSON): what images and servers need beside their files.

Secrets are passphrases and keys: given on the command line or in a file, plain or in base64, and
maybe themselves encrypted (AES-256-CBC, PKCS#7) with the key that another secret holds.
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Mapping

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.tools.tool import EXIT_OK, Exit

if TYPE_CHECKING:
    from lamina.block.tls import Authorization, TlsCredentials
    from lamina.tools.tool import Tool

_SECRET_KEYS = {"qom-type", "id", "data", "file", "format", "keyid", "iv"}
_TLS_KEYS = {
    "x509": {"dir", "endpoint", "verify-peer", "passwordid", "priority", "sanity-check"},
    "psk": {"dir", "endpoint", "username", "priority", "verify-peer"},
    "anon": {"dir", "endpoint", "priority", "verify-peer"},
}
_SWITCHES = ("verify-peer", "sanity-check")
_TLS = "tls-creds-"
_AUTHZ = "authz-simple"
_TYPES = {"secret": _SECRET_KEYS, _AUTHZ: {"identity"}} | {
    _TLS + kind: keys for kind, keys in _TLS_KEYS.items()
}
_HELP = """List of user creatable objects:
  authz-simple (identity=…)
  secret (data=… or file=…, format=raw|base64, keyid=…, iv=…)
  tls-creds-anon (endpoint=client|server, priority=…)
  tls-creds-psk (dir=…, endpoint=client|server, username=…, priority=…)
  tls-creds-x509 (dir=…, endpoint=client|server, verify-peer=on|off, passwordid=…,
    priority=…)"""
_KEY_LENGTH = 32
_IV_LENGTH = 16


def add_object(tool: Tool, text: str) -> None:
    """Create the object that ``text`` describes. Raises UsageError, and Exit after help."""
    if text in ("help", "?") or text.endswith((",help", ",?")):
        print(_HELP)
        raise Exit(EXIT_OK)
    given = _json(text) if text.startswith("{") else _key_values(text)
    for needed in ("qom-type", "id"):
        if needed not in given:
            raise UsageError(f"Parameter '{needed}' is missing")
        if needed == "qom-type" and given["qom-type"] not in _TYPES:
            raise UsageError(f"Parameter 'qom-type' does not accept value '{given['qom-type']}'")
    name = given["id"]
    if not _is_identifier(name):
        raise UsageError(
            "Parameter 'id' expects an identifier",
            hint="Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
        )
    kind = given["qom-type"]
    for key in given:
        if key not in _TYPES[kind] | {"qom-type", "id"}:
            raise UsageError(f"Parameter '{key}' is unexpected")
    session = tool.session
    if name in session.secrets or name in session.objects:
        raise UsageError(
            f"attempt to add duplicate property '{name}' to object (type 'container')"
        )
    if kind == "secret":
        session.secrets.add(name, _secret(tool, given))
    elif kind == _AUTHZ:
        session.objects[name] = _authorization(given)
    else:
        session.objects[name] = _tls_credentials(tool, kind.removeprefix(_TLS), given)


def _key_values(text: str) -> dict[str, Any]:
    """Commas separate, doubled ones are meant; the first word may be the type."""
    given: dict[str, Any] = {}
    words = text.replace(",,", "\0").split(",")
    if len(words) > 1 and not words[-1]:
        words.pop()
    for number, word in enumerate(words if text else []):
        key, equals, value = word.replace("\0", ",").partition("=")
        if not key:
            raise UsageError(f"Invalid parameter '{key}'")
        if not equals and number > 0:
            raise UsageError(f"Expected '=' after parameter '{key}'")
        if equals:
            given[key] = value
        else:
            given["qom-type"] = key
    return given


def _json(text: str) -> dict[str, Any]:
    import json

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        at_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        trouble = "premature EOI" if at_end else "invalid syntax"
        raise UsageError(f"JSON parse error, {trouble}") from None
    for key, item in value.items():
        if isinstance(item, bool) and key in _SWITCHES:
            value[key] = "on" if item else "off"
        elif not isinstance(item, str):
            raise UsageError(f"Invalid parameter type for '{key}', expected: string")
    return dict(value)


def _is_identifier(name: str) -> bool:
    return name[:1].isalpha() and name.isascii() and not name.strip(_IDENTIFIER)


_IDENTIFIER = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"


# TLS ---------------------------------------------------------------------------------------------


def _tls_credentials(tool: Tool, kind: str, given: Mapping[str, Any]) -> TlsCredentials:
    from lamina.block.options import Spec, Type, convert
    from lamina.block.tls import TlsCredentials

    endpoint = given.get("endpoint", "client")
    if endpoint not in ("client", "server"):
        raise UsageError(f"Parameter 'endpoint' does not accept value '{endpoint}'")
    if "dir" not in given and kind != "anon":
        raise UsageError("Missing 'dir' property value")
    password = None
    if "passwordid" in given:
        password = tool.session.secrets.lookup(given["passwordid"])
    verify = convert(Spec("verify-peer", Type.BOOL, ""), given.get("verify-peer", "on"))
    credentials = TlsCredentials(
        kind,
        endpoint,
        given.get("dir"),
        verify_peer=verify,
        username=given.get("username", "qemu"),
        password=password,
        priority=given.get("priority", "NORMAL"),
    )
    credentials.check()
    return credentials


def _authorization(given: Mapping[str, str]) -> Authorization:
    from lamina.block.tls import Authorization

    if "identity" not in given:
        raise UsageError("Parameter 'identity' is missing")
    return Authorization(given["identity"])


# Secrets -----------------------------------------------------------------------------------------


def _secret(tool: Tool, given: Mapping[str, str]) -> bytes:
    encoding = given.get("format", "raw")
    if encoding not in ("raw", "base64"):
        raise UsageError(f"Parameter 'format' does not accept value '{encoding}'")
    if "file" in given and "data" in given:
        raise UsageError("'file' and 'data' are mutually exclusive")
    if "file" in given:
        value = _read_file(given["file"])
    elif "data" in given:
        value = os.fsencode(given["data"])
    else:
        raise UsageError("Either 'file' or 'data' must be provided")
    if "keyid" not in given:
        return _from_base64(value) if encoding == "base64" else value
    key = tool.session.secrets.lookup(given["keyid"])
    return _decrypt(value, encoding, key, given.get("iv"))


def _read_file(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        trouble = f"Failed to open file “{name}”: {error.strerror}"
        raise UsageError(f"Unable to read {name}: {trouble}") from None


def _from_base64(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text.strip(), strict_mode=True)
    except binascii.Error:
        raise UsageError("Base64 data contains invalid characters") from None


def _decrypt(value: bytes, encoding: str, key: bytes, iv_text: str | None) -> bytes:
    if len(key) != _KEY_LENGTH:
        raise UsageError(f"Key should be {_KEY_LENGTH} bytes in length")
    if iv_text is None:
        raise UsageError("IV is required to decrypt secret")
    iv = _from_base64(iv_text.encode())
    if len(iv) != _IV_LENGTH:
        raise UsageError(f"IV should be {_IV_LENGTH} bytes in length not {len(iv)}")
    if encoding == "base64":
        value = _from_base64(value)
    if not value:
        return b""
    if len(value) % _IV_LENGTH:
        raise UsageError(f"Length {len(value)} must be a multiple of block size {_IV_LENGTH}")

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    padded = decryptor.update(value) + decryptor.finalize()
    padding = padded[-1]
    if not 1 <= padding <= _IV_LENGTH:
        raise UsageError(
            f"Incorrect number of padding bytes ({padding}) found on decrypted data"
        )
    return padded[:-padding]
