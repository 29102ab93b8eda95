"""TLS credentials: what they need, and what they are turned into."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import pytest

from lamina.block import psk, tls
from lamina.block.tls import Authorization, TlsCredentials
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.tools.objects import add_object
from lamina.tools.tool import Tool
from tests.unit.nbd.serving import make_certificates, make_keys


def test_x509(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    server = TlsCredentials("x509", "server", str(tmp_path)).context()
    assert server.verify_mode is ssl.CERT_REQUIRED
    client = TlsCredentials("x509", "client", str(tmp_path)).context()
    assert client.verify_mode is ssl.CERT_REQUIRED
    assert client.check_hostname
    assert client.minimum_version == ssl.TLSVersion.TLSv1_2
    trusting = TlsCredentials("x509", "client", str(tmp_path), verify_peer=False).context()
    assert trusting.verify_mode is ssl.CERT_NONE
    (tmp_path / "server-key.pem").unlink()
    with pytest.raises(StorageError, match=r"Unable to access credentials .*server-key.pem: No"):
        TlsCredentials("x509", "server", str(tmp_path)).check()
    (tmp_path / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(UsageError, match="Unable to load the certificates"):
        TlsCredentials("x509", "client", str(tmp_path)).check()


def test_pre_shared_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("# for tests\nalice:00ff\nbob:abcd\n")
    server = TlsCredentials("psk", "server", str(tmp_path))
    server.check()
    assert psk.read_keys(str(keys)) == {"alice": b"\0\xff", "bob": b"\xab\xcd"}
    client = TlsCredentials("psk", "client", str(tmp_path), username="bob").context()
    for context in (client, server.context()):
        assert context.maximum_version == ssl.TLSVersion.TLSv1_2
        assert min(bits for _, bits in ciphers(context)) >= 128
    with pytest.raises(UsageError, match=r"Username qemu not found in PSK file .*keys.psk"):
        TlsCredentials("psk", "client", str(tmp_path)).check()
    if sys.version_info < (3, 13):
        monkeypatch.setitem(sys.modules, "sslpsk3", None)
        with pytest.raises(ImageUnsupported, match=r"need Python 3\.13 or later, or .* sslpsk3"):
            server.check()
    keys.write_text("alice:xyz\n")
    with pytest.raises(UsageError, match="Malformed key"):
        server.check()
    keys.unlink()
    with pytest.raises(StorageError, match=r"Unable to access credentials .*: No such file"):
        server.check()


def ciphers(context: ssl.SSLContext) -> list[tuple[str, int]]:
    """Of TLS 1.2, with their bits."""
    found = context.get_ciphers()
    return [(one["name"], one["strength_bits"]) for one in found if "1.3" not in one["protocol"]]


@pytest.mark.parametrize("kind", ["x509", "psk", "anon"])
def test_strength(tmp_path: Path, kind: str) -> None:
    make_certificates(tmp_path)
    make_keys(tmp_path, "qemu")
    expected = {"NORMAL": 128, "SECURE128": 128, "SECURE192": 256, "SECURE256": 256}
    for word, least in expected.items():
        for endpoint in ("server", "client"):
            credentials = TlsCredentials(kind, endpoint, str(tmp_path), priority=word)
            assert min(bits for _, bits in ciphers(credentials.context())) == least
    names = [name for name, _ in ciphers(TlsCredentials(kind, dir=str(tmp_path)).context())]
    assert any("AES128" in name for name in names)
    assert not any("NULL" in name for name in names)


@pytest.mark.parametrize(
    ("words", "lowest", "highest"),
    [
        ("NORMAL", "TLSv1_2", "TLSv1_3"),
        ("SECURE128:-VERS-TLS1.0:-VERS-TLS1.1:-VERS-DTLS-ALL", "TLSv1_2", "TLSv1_3"),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3", "TLSv1_3", "TLSv1_3"),
        ("NORMAL:!VERS-TLS1.2", "TLSv1_3", "TLSv1_3"),
        ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2", "TLSv1_2", "TLSv1_2"),
        ("@SYSTEM:-VERS-TLS1.3", "TLSv1_2", "TLSv1_2"),
    ],
)
def test_versions(tmp_path: Path, words: str, lowest: str, highest: str) -> None:
    make_certificates(tmp_path)
    context = TlsCredentials("x509", "server", str(tmp_path), priority=words).context()
    assert context.minimum_version == ssl.TLSVersion[lowest]
    assert context.maximum_version in (
        ssl.TLSVersion[highest],
        *([ssl.TLSVersion.MAXIMUM_SUPPORTED] if highest == "TLSv1_3" else []),
    )


def test_the_policy_of_the_host_is_left_alone(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    context = TlsCredentials("x509", "server", str(tmp_path), priority="@SYSTEM").context()
    plain = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    plain.set_ciphers("DEFAULT")
    assert context.minimum_version == plain.minimum_version
    assert ciphers(context) == ciphers(plain)


def test_objects(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    tool = Tool("lamina-img")
    add_object(tool, f"tls-creds-x509,id=a,dir={tmp_path},endpoint=server")
    add_object(tool, f'{{"qom-type": "tls-creds-x509", "id": "b", "dir": "{tmp_path}", '
                     '"verify-peer": false}')
    add_object(tool, "authz-simple,id=c,identity=CN=x,,O=y")
    objects = tool.session.objects
    assert objects["a"] == TlsCredentials("x509", "server", str(tmp_path))
    assert objects["b"] == TlsCredentials("x509", "client", str(tmp_path), verify_peer=False)
    assert objects["c"] == Authorization("CN=x,O=y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tls-creds-x509,id=a", "Missing 'dir' property value"),
        ("tls-creds-x509,id=a,dir=/no,endpoint=x", "Parameter 'endpoint' does not accept value"),
        ("tls-creds-x509,id=a,dir=/nosuch", "Unable to access credentials /nosuch/ca-cert.pem"),
        ("tls-creds-anon,id=a,username=x", "Parameter 'username' is unexpected"),
        ("tls-creds-anon,id=a,priority=SECURE", "session priority SECURE: 'SECURE' is none of"),
        ("tls-creds-anon,id=a,priority=", "session priority : '' is none of"),
        ("tls-creds-anon,id=a,priority=NORMAL:+AES-128-CBC", r"'\+AES-128-CBC' is not supported"),
        ("tls-creds-anon,id=a,priority=NORMAL:%COMPAT", "'%COMPAT' is not supported"),
        ("tls-creds-anon,id=a,priority=NORMAL:+PSK", r"'\+PSK' is not supported"),
        ("tls-creds-anon,id=a,priority=NORMAL:+VERS-TLS1.0", "TLS1.0 is not secure any more"),
        ("tls-creds-anon,id=a,priority=NORMAL:-VERS-TLS1.2", "anon credentials need TLS 1.2"),
        ("tls-creds-x509,id=a,dir=/,priority=NORMAL:-VERS-ALL", "no version of TLS is left"),
        ("tls-creds-anon,id=s", "attempt to add duplicate property 's'"),
        ("authz-simple,id=a", "Parameter 'identity' is missing"),
    ],
)
def test_objects_that_make_no_sense(text: str, message: str) -> None:
    tool = Tool("lamina-img")
    add_object(tool, "secret,id=s,data=x")
    with pytest.raises(LaminaError, match=message):
        add_object(tool, text)


def test_names_of_peers() -> None:
    class Connection:
        def getpeercert(self) -> object:
            return {
                "subject": (
                    (("countryName", "GB"),),
                    (("organizationName", 'A, "B"'),),
                    (("commonName", "#1"), ("userId", "u")),
                )
            }

    name = tls.peer_name(Connection())  # type: ignore[arg-type]
    assert name == 'CN=\\#1+UID=u,O=A\\, \\"B\\",C=GB'
