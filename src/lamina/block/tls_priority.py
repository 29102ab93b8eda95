"""GnuTLS priority strings (``priority=`` of credentials objects), said to OpenSSL.

What is understood is what people write: a keyword, then protocol versions taken away or added
(``SECURE256:-VERS-ALL:+VERS-TLS1.3``). Single ciphers, groups, signatures and ``%`` options have no
counterpart that would mean the same; whoever asks for them is told so, as a wish for security
that is passed over in silence is worse than none.
"""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING
from lamina.records import dataclass

if TYPE_CHECKING:
    import ssl

_KEYWORDS = {"NORMAL": 0, "PERFORMANCE": 0, "SECURE128": 128, "SECURE192": 192, "SECURE256": 256}
"""The bits that a cipher must have at least; 0: whatever is thought secure."""
_SYSTEM = "@SYSTEM"
"""The policy of the host: that of OpenSSL, where it is OpenSSL that is used."""
_VERSIONS = {"VERS-TLS1.2": "TLSv1_2", "VERS-TLS1.3": "TLSv1_3"}
_OLD = ("VERS-TLS1.0", "VERS-TLS1.1", "VERS-SSL3.0")
"""Never used."""
_ALL = ("VERS-ALL", "VERS-TLS-ALL")
_DATAGRAMS = "VERS-DTLS"
_IMPLIED = {
    "psk": ("PSK", "DHE-PSK", "ECDHE-PSK"),
    "anon": ("ANON-DH", "ANON-ECDH"),
    "x509": (),
}
"""Ways to exchange keys that a kind of credentials has anyway."""


@dataclass(frozen=True)
class Priority:
    versions: tuple[str, ...]
    """Names in ``ssl.TLSVersion``, ascending."""
    least_bits: int
    of_system: bool


def parse(text: str, kind: str) -> Priority:
    """``kind`` of credentials: x509, psk or anon. Raises UsageError."""

    def refuse(why: str) -> UsageError:
        return UsageError(f"Unable to set TLS session priority {text}: {why}")

    first, *words = text.split(":")
    if first != _SYSTEM and first not in _KEYWORDS:
        known = ", ".join((*_KEYWORDS, _SYSTEM))
        raise refuse(f"'{first}' is none of {known}")
    versions = set(_VERSIONS.values())
    for word in words:
        sign, name = word[:1], word[1:]
        if sign not in ("+", "-", "!"):
            raise refuse(f"'{word}' is not supported")
        adds = sign == "+"
        if name in _VERSIONS or name in _ALL:
            meant = {_VERSIONS[name]} if name in _VERSIONS else set(_VERSIONS.values())
            versions = versions | meant if adds else versions - meant
        elif adds and name in _OLD:
            raise refuse(f"{name.removeprefix('VERS-')} is not secure any more")
        elif name not in _OLD and not name.startswith(_DATAGRAMS) and not (
            adds and name in _IMPLIED[kind]
        ):
            raise refuse(f"'{word}' is not supported")
    if kind != "x509" and "TLSv1_2" not in versions:
        raise refuse(f"{kind} credentials need TLS 1.2")
    if not versions:
        raise refuse("no version of TLS is left")
    return Priority(tuple(sorted(versions)), _KEYWORDS.get(first, 0), first == _SYSTEM)


def apply(priority: Priority, context: ssl.SSLContext) -> None:
    """To a context that has the ciphers of its kind. Raises UsageError."""
    import ssl

    if not priority.of_system or len(priority.versions) < len(_VERSIONS):
        context.minimum_version = ssl.TLSVersion[priority.versions[0]]
    highest = ssl.TLSVersion[priority.versions[-1]]
    if context.maximum_version < 0 or highest < context.maximum_version:
        context.maximum_version = highest
    if priority.least_bits:
        strong = [name for name, bits in _below_13(context) if bits >= priority.least_bits]
        context.set_ciphers(":".join(strong))


def too_weak(connection: ssl.SSLSocket) -> str | None:
    """The name of a TLS 1.3 cipher that is weaker than all that the context has for TLS 1.2: there
    is no way to choose those of TLS 1.3 beforehand."""
    agreed = connection.cipher()
    if agreed is None:
        return None
    others = [bits for _, bits in _below_13(connection.context)]
    return agreed[0] if others and agreed[2] < min(others) else None


def _below_13(context: ssl.SSLContext) -> list[tuple[str, int]]:
    """Names of ciphers, and their bits."""
    return [
        (cipher["name"], cipher["strength_bits"])
        for cipher in context.get_ciphers()
        if cipher["protocol"] != "TLSv1.3"
    ]
