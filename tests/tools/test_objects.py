"""``--object``: secrets from the command line and from files, plain, in base64, encrypted."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from lamina.errors import UsageError
from lamina.tools.objects import add_object
from lamina.tools.tool import Exit, Tool

KEY = "0123456789abcdef0123456789abcdef"
IV = bytes(range(16))


def secret(*objects: str, name: str = "a") -> bytes:
    tool = Tool("lamina-img")
    for text in objects:
        add_object(tool, text)
    return tool.session.secrets.lookup(name)


def encrypted(text: bytes) -> bytes:
    from cryptography.hazmat.primitives import padding
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    padder = padding.PKCS7(128).padder()
    encryptor = Cipher(algorithms.AES(KEY.encode()), modes.CBC(IV)).encryptor()
    return encryptor.update(padder.update(text) + padder.finalize()) + encryptor.finalize()


def test_given_on_the_command_line() -> None:
    assert secret("secret,id=a,data=x,,y") == b"x,y"
    assert secret("id=a,data=x,data=y,qom-type=secret") == b"y"
    assert secret('{"qom-type": "secret", "id": "a", "data": "é"}') == "é".encode()
    assert secret("secret,id=a,data=cHc=,format=base64") == b"pw"


def test_given_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"cHc=\n")
    assert secret(f"secret,id=a,file={file}") == b"cHc=\n"
    assert secret(f"secret,id=a,file={file},format=base64") == b"pw"


def test_encrypted_with_another_secret(tmp_path: Path) -> None:
    master = f"secret,id=m,data={KEY}"
    iv = base64.b64encode(IV).decode()
    content = encrypted(b"a passphrase of more than a block")
    text = base64.b64encode(content).decode()
    given = f"secret,id=a,data={text},format=base64,keyid=m,iv={iv}"
    assert secret(master, given) == b"a passphrase of more than a block"
    (tmp_path / "raw").write_bytes(content)
    given = f"secret,id=a,file={tmp_path / 'raw'},keyid=m,iv={iv}"
    assert secret(master, given) == b"a passphrase of more than a block"


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("data=x,keyid=nope", "No secret with id 'nope'"),
        ("data=x,keyid=short", "Key should be 32 bytes in length"),
        ("data=x,keyid=m", "IV is required to decrypt secret"),
        ("data=x,keyid=m,iv=AAAA", "IV should be 16 bytes in length not 3"),
        ("data=x,keyid=m,iv={iv}", "Length 1 must be a multiple of block size 16"),
    ],
)
def test_what_cannot_be_decrypted(tail: str, message: str) -> None:
    tail = tail.format(iv=base64.b64encode(IV).decode())
    with pytest.raises(UsageError) as caught:
        secret(f"secret,id=m,data={KEY}", "secret,id=short,data=x", f"secret,id=a,{tail}")
    assert str(caught.value) == message


def test_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exit):
        secret("help")
    assert "secret" in capsys.readouterr().out
