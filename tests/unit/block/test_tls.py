"""TLS credentials: what they need, and what they are turned into."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import pytest

from lamina.block import tls
from lamina.block.tls import Authorization, TlsCredentials
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.tools.objects import add_object
from lamina.tools.tool import Tool
from tests.unit.nbd.serving import make_certificates


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


def test_pre_shared_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("# for tests\nalice:00ff\nbob:abcd\n")
    server = TlsCredentials("psk", "server", str(tmp_path))
    if sys.version_info < (3, 13):
        with pytest.raises(ImageUnsupported, match=r"need Python 3\.13"):
            server.check()
    else:
        server.check()
    assert server._psk_keys() == {"alice": b"\0\xff", "bob": b"\xab\xcd"}
    with pytest.raises(UsageError, match=r"Username qemu not found in PSK file .*keys.psk"):
        TlsCredentials("psk", "client", str(tmp_path))._psk_keys()
    (tmp_path / "keys.psk").write_text("alice:xyz\n")
    with pytest.raises(UsageError, match="Malformed key"):
        server._psk_keys()


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
        ("tls-creds-anon,id=a,priority=SECURE", "Parameter 'priority'"),
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
