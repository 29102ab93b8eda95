"""Names of NBD exports: URIs (doc/uri.md of the protocol's project) and QEMU's older forms."""

from __future__ import annotations

from urllib.parse import parse_qsl, quote, unquote, urlsplit

from lamina.errors import UsageError
from lamina.hints import Any
from lamina.wire.nbd.constants import PORT

_NO_URL = "No valid URL specified"
_TLS_PARAMETERS = {
    "tls-type": "tls-type",
    "tls-hostname": "tls-hostname",
    "tls-verify-peer": "tls-verify-peer",
    "tls-certificates": "tls-certificates",
    "tls-psk-file": "tls-psk-file",
}
"""Query parameters of the ``nbds`` schemes -> our options."""


def parse_name(filename: str) -> dict[str, Any]:
    """Options of the driver. Raises UsageError."""
    scheme, mark, _ = filename.partition("://")
    if mark:
        return _parse_uri(filename, scheme)
    if not filename.startswith("nbd:"):
        raise UsageError("File name string for NBD must start with 'nbd:'")
    return _parse_old(filename.removeprefix("nbd:"))


def _parse_uri(filename: str, scheme: str) -> dict[str, Any]:
    unix = scheme.endswith("+unix")
    secure = scheme.startswith("nbds")
    try:
        parts = urlsplit(filename)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UsageError(_NO_URL) from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"))
    options: dict[str, Any] = {}
    if unix:
        named = parts.netloc and not (secure and parts.netloc == f"{parts.username}@")
        if named or "socket" not in query:
            raise UsageError(_NO_URL)
        options.update({"server.type": "unix", "server.path": query.pop("socket")})
    else:
        if not host:
            raise UsageError(_NO_URL)
        if "[" not in parts.netloc:
            # urlsplit has made it lower case: what was written is shown again.
            host = unquote(parts.netloc.rpartition("@")[2].partition(":")[0])
        options.update(
            {"server.type": "inet", "server.host": host, "server.port": str(port or PORT)}
        )
    name = unquote(parts.path.removeprefix("/"), errors="surrogateescape")
    if name:
        options["export"] = name
    if secure:
        options["tls"] = True
        if parts.username:
            options["tls-username"] = unquote(parts.username)
        for parameter, option in _TLS_PARAMETERS.items():
            if parameter in query:
                options[option] = query.pop(parameter)
    if query:
        raise UsageError(_NO_URL)
    return options


def _parse_old(rest: str) -> dict[str, Any]:
    """``HOST:PORT[:exportname=NAME]`` or ``unix:PATH[:exportname=NAME]``."""
    address, mark, name = rest.partition(":exportname=")
    options: dict[str, Any] = {}
    if mark:
        if not name:
            raise UsageError("NBD server address missing")
        options["export"] = name
    if not address:
        raise UsageError("NBD server address missing")
    if address.startswith("unix:"):
        return {
            "server.type": "unix",
            "server.path": address.removeprefix("unix:"),
            **options,
        }
    if address.startswith("["):
        host, closing, port = address[1:].partition("]:")
        colon = closing
    else:
        host, colon, port = address.partition(":")
    if not colon or not port:
        raise UsageError(f"error parsing address '{address}'")
    return {"server.type": "inet", "server.host": host, "server.port": port, **options}


def uri(kind: str, host: str, port: str, path: str, export: str, *, secure: bool) -> str | None:
    """The URI of an export; None for what none describes."""
    scheme = "nbds" if secure else "nbd"
    name = _plain(export)
    if kind == "unix":
        slash = "/" if name else ""
        return f"{scheme}+unix://{slash}{name}?socket={_plain(path)}"
    if kind == "inet":
        place = f"[{host}]" if ":" in host else host
        return f"{scheme}://{place}:{port}" + (f"/{name}" if name else "")
    return None


def _plain(text: str) -> str:
    """As it is, as QEMU shows it, unless that would be read as something else."""
    if any(letter in "%?#&+;" or not letter.isprintable() for letter in text):
        return quote(text, safe="/ ", errors="surrogateescape")
    return text
