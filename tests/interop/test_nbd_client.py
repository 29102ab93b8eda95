"""Our client and the servers of others: qemu-nbd and nbdkit, of every age that nbdkit can act."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.limits import WriteFlags
from lamina.block.session import Session
from lamina.errors import LaminaError, StorageError
from lamina.protocols.nbd.connecting import list_of_exports
from tests.interop.nbd_servers import (
    BIN,
    LIBNBD_PYTHON,
    SIZE,
    lamina_nbd,
    nbdkit,
    needs_nbdkit,
    needs_nbdsh,
    opened,
    qemu_nbd,
    run,
    url,
)
from tests.unit.nbd.serving import make_certificates, make_keys

pytestmark = pytest.mark.peer



def raw(path: Path, content: bytes | None = None) -> Path:
    disk = path / "disk.raw"
    with open(disk, "wb") as file:
        file.write(content or b"")
        file.truncate(SIZE)
    return disk


@contextmanager
def peer(kind: str, path: Path) -> Iterator[Path]:
    """A server of one empty raw disk; the disk."""
    socket, disk = path / "socket", raw(path)
    simple: tuple[object, ...] = ("file", disk)
    servers = {
        "qemu-nbd": lambda: qemu_nbd(socket, "-f", "raw", "--discard=unmap", disk),
        "nbdkit": lambda: nbdkit(socket, *simple),
        "nbdkit simple": lambda: nbdkit(socket, "--no-sr", *simple),
        "nbdkit newstyle": lambda: nbdkit(socket, "--mask-handshake=0", *simple),
        "nbdkit blocks": lambda: nbdkit(
            socket,
            "--filter=blocksize-policy",
            *simple,
            "blocksize-minimum=4096",
            "blocksize-preferred=4096",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ),
        "nbdkit poor": lambda: nbdkit(
            socket, "--filter=nozero", "--filter=fua", *simple, "fuamode=emulate"
        ),
    }
    with servers[kind]():
        yield disk


KINDS = [
    "qemu-nbd",
    pytest.param("nbdkit", marks=needs_nbdkit),
    pytest.param("nbdkit simple", marks=needs_nbdkit),
    pytest.param("nbdkit newstyle", marks=needs_nbdkit),
    pytest.param("nbdkit blocks", marks=needs_nbdkit),
    pytest.param("nbdkit poor", marks=needs_nbdkit),
]


@pytest.mark.parametrize("kind", KINDS)
def test_disk_is_what_was_written(kind: str, tmp_path: Path) -> None:
    dice = random.Random(kind)
    model = bytearray(SIZE)
    with peer(kind, tmp_path) as disk:
        with opened(tmp_path / "socket") as image:
            assert image.size == SIZE
            for _ in range(30):
                batch = []
                slot = SIZE // 16
                for start in range(0, SIZE, slot):
                    length = dice.choice((1, 512, 4096, 30_000, 130_000))
                    at = start + dice.randrange(slot - length)
                    if dice.random() < 0.5:
                        data = dice.randbytes(length)
                        batch.append((at, data))
                        model[at : at + length] = data
                flags = WriteFlags.FUA if dice.random() < 0.3 else WriteFlags.NONE
                image.writev(batch, flags)
                at, length = dice.randrange(SIZE // 2), dice.choice((1, 5000, 100_000))
                image.write_zeroes(at, length, dice.choice((WriteFlags.NONE, WriteFlags.MAY_UNMAP)))
                model[at : at + length] = bytes(length)
                at = dice.randrange(SIZE // 2)
                assert image.read(at, 200_000) == model[at : at + 200_000]
            image.flush()
            assert sum(extent.length for extent in image.extents(0, SIZE)) == SIZE
        with opened(tmp_path / "socket", writable=False) as image:
            assert image.read(0, SIZE) == model
        assert disk.read_bytes() == model


@needs_nbdkit
def test_oldstyle(tmp_path: Path) -> None:
    """For reading: nbdkit refuses what it advertises there, to QEMU as well."""
    content = random.Random(6).randbytes(SIZE)
    socket, disk = tmp_path / "socket", raw(tmp_path, content)
    with nbdkit(socket, "--oldstyle", "-r", "file", disk):
        with Backend.open(url(socket, ""), session=Session(), format="raw") as image:
            assert image.read(0, SIZE) == content
        with pytest.raises(LaminaError, match="does not support non-empty export names"):
            Backend.open(url(socket), session=Session(), format="raw")


@needs_nbdkit
def test_errors_of_a_server(tmp_path: Path) -> None:
    socket, disk = tmp_path / "socket", raw(tmp_path)
    filters = ("--filter=error", "file", disk, "error-pwrite=ENOSPC", "error-rate=100%")
    with nbdkit(socket, *filters), opened(tmp_path / "socket") as image:
        with pytest.raises(StorageError) as caught:
            image.write(0, b"x")
        assert str(caught.value) == "No space left on device"
        with pytest.raises(StorageError):
            image.read(0, 512)


def same(arguments: list[object], *, code: int = 0) -> str:
    """What our tool prints, which is what QEMU's prints."""
    found = []
    for tool in (BIN / "lamina-img", "qemu-img"):
        done = subprocess.run(
            [str(word) for word in (tool, *arguments)], capture_output=True, text=True
        )
        text = (done.stdout + done.stderr).replace("lamina-img", "qemu-img")
        found.append((done.returncode, text))
    assert found[0] == found[1]
    assert found[0][0] == code
    return found[0][1]


def test_tools_say_what_those_of_qemu_say(tmp_path: Path) -> None:
    disk, socket = tmp_path / "disk.qcow2", tmp_path / "socket"
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, SIZE)
    run("qemu-io", "-c", "write 0 1M", disk)
    run("qemu-img", "bitmap", "--add", disk, "b0")
    run("qemu-io", "-c", "write 2M 128k", "-c", "write -z 3M 64k", disk)
    with qemu_nbd(socket, "-f", "qcow2", "-A", "-B", "b0", "-D", "text", disk):
        name = url(socket)
        for arguments in (
            ["info", name],
            ["info", "--output=json", name],
            ["info", f"nbd:unix:{socket}:exportname=disk"],
            ["map", "--output=json", name],
            ["map", name],
            ["measure", "-O", "qcow2", name],
            ["snapshot", "-l", name],
        ):
            same(arguments)
        options = f"driver=nbd,server.type=unix,server.path={socket},export=disk"
        for context in ("dirty-bitmap:b0", "allocation-depth"):
            words = f"{options},x-dirty-bitmap=qemu:{context}"
            text = same(["map", "--output=json", "--image-opts", words])
            assert '"present": false' in text
        same(["compare", name, disk, "-U"])
        same(["info", url(socket, "nope")], code=1)
        same(["info", f"nbd+unix:///?socket={socket}.no"], code=1)
        same(["resize", "-f", "raw", name, "8M"], code=1)
        same(["create", "-f", "raw", name, "8M"], code=1)
        same(["info", "--image-opts", options + ",foo=bar"], code=1)
        same(["info", "--image-opts", options + ",tls-creds=x"], code=1)
    assert list_names(disk, socket) == ["disk"]


def list_names(disk: Path, socket: Path) -> list[str]:
    from lamina.block.sockets import SocketAddress

    with qemu_nbd(socket, "-f", "qcow2", "-r", disk):
        address = SocketAddress("unix", path=str(socket))
        _, exports = list_of_exports(address, None, None)
    return [export.name for export in exports]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_conversions_over_the_network(tmp_path: Path, format: str) -> None:
    content = bytearray(SIZE)
    content[1 << 20 : 2 << 20] = random.Random(1).randbytes(1 << 20)
    disk, socket = raw(tmp_path, bytes(content)), tmp_path / "socket"
    target = tmp_path / "target"
    with qemu_nbd(socket, "-f", "raw", disk):
        run(BIN / "lamina-img", "convert", "-f", "raw", "-O", format, url(socket), target)
        run("qemu-img", "compare", "-f", "raw", "-F", format, url(socket), target)
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "back", SIZE)
    with qemu_nbd(socket, "-f", "raw", tmp_path / "back"):
        run(BIN / "lamina-img", "convert", "-n", "-O", "raw", target, url(socket))
    assert (tmp_path / "back").read_bytes() == content


def test_qcow2_inside_of_an_export(tmp_path: Path) -> None:
    socket, disk = tmp_path / "socket", raw(tmp_path)
    with qemu_nbd(socket, "-f", "raw", disk):
        run(BIN / "lamina-img", "create", "-q", "-f", "qcow2", url(socket), "2M")
        run(BIN / "lamina-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", url(socket))
    run("qemu-img", "check", "-f", "qcow2", disk)
    found = run("qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 64k", disk)
    assert "failed" not in found


PREFETCHES = """
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
assert h.can_cache()
h.cache(65536, 1 << 20)
"""


@needs_nbdkit
@needs_nbdsh
def test_requests_to_prefetch_are_passed_on(tmp_path: Path) -> None:
    """From libnbd to a server of ours, whose disk is an export of another."""
    socket, ours, log = tmp_path / "socket", tmp_path / "ours", tmp_path / "log"
    disk = raw(tmp_path)
    with nbdkit(socket, "--filter=log", "--filter=cache", "file", disk, f"logfile={log}"):
        with lamina_nbd(ours, "-r", "-f", "raw", url(socket)):
            run(LIBNBD_PYTHON, "-c", PREFETCHES, url(ours))
        told = log.read_text()
    assert "Cache id=1 offset=0x100000 count=0x10000" in told
    assert "Read id=" not in told


@pytest.mark.parametrize("server", ["qemu-nbd", "lamina-nbd"])
def test_a_server_that_comes_back_with_a_larger_disk(tmp_path: Path, server: str) -> None:
    """Our client does what QEMU's does, and says so. (QEMU's dies of a smaller one.)"""
    socket, disk = tmp_path / "socket", raw(tmp_path)
    serve = qemu_nbd if server == "qemu-nbd" else lamina_nbd
    options = {
        "driver": "nbd",
        "server.type": "unix",
        "server.path": str(socket),
        "export": "disk",
        "reconnect-delay": "20",
    }
    warnings: list[str] = []
    session = Session(warn=warnings.append)
    qemu_io = [
        "qemu-io",
        "--image-opts",
        "driver=nbd,server.type=unix,export=disk,reconnect-delay=20,server.path=" + str(socket),
    ]
    with serve(socket, "-f", "raw", disk):
        image = Backend.open(options, session=session, writable=True)
        image.write(SIZE - 512, b"1" * 512)
        theirs = subprocess.Popen(
            qemu_io, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
        )
        assert theirs.stdin is not None
        theirs.stdin.write("read -P 0x31 4193792 512\n")
        theirs.stdin.flush()
        time.sleep(0.3)
    socket.unlink(missing_ok=True)
    os.truncate(disk, 2 * SIZE)
    with serve(socket, "-f", "raw", disk):
        assert image.read(SIZE - 512, 512) == b"1" * 512
        image.write(SIZE - 512, b"2" * 512)
        image.flush()
        assert image.size == SIZE
        with pytest.raises(LaminaError, match="Input/output error"):
            image.read(SIZE, 512)
        image.close()
        found, _ = theirs.communicate(
            "read -P 0x32 4193792 512\nlength\nread 4194304 512\n", timeout=60
        )
    assert found.count("read 512/512 bytes") == 2
    assert "verification failed" not in found
    assert "4 MiB\n" in found
    assert "read failed: Input/output error" in found
    assert warnings == [
        "NBD export 'disk' has 8388608 bytes instead of 4194304: the disk is as long as before "
        "until it is opened again"
    ]


@pytest.mark.parametrize("server", ["qemu-nbd", pytest.param("nbdkit", marks=needs_nbdkit)])
def test_tls(tmp_path: Path, server: str) -> None:
    pki = tmp_path / "pki"
    make_certificates(pki)
    socket, disk = tmp_path / "socket", raw(tmp_path)
    if server == "qemu-nbd":
        creds = f"tls-creds-x509,id=t,endpoint=server,dir={pki},verify-peer=on"
        running = qemu_nbd(socket, "-f", "raw", "--object", creds, "--tls-creds", "t", disk)
    else:
        running = nbdkit(
            socket,
            "--tls=require",
            f"--tls-certificates={pki}",
            "--tls-verify-peer",
            "file",
            disk,
        )
    data = random.Random(2).randbytes(1 << 20)
    name = f"nbds+unix:///disk?socket={socket}&tls-certificates={pki}"
    with running:
        with Backend.open(
            name + "&tls-hostname=localhost", session=Session(), format="raw", writable=True
        ) as image:
            image.writev([(at, data[at : at + 100_000]) for at in range(0, 1 << 20, 100_000)])
            image.flush()
            assert image.read(0, 1 << 20) == data
        with pytest.raises(LaminaError, match="Certificate does not match the hostname other"):
            Backend.open(name + "&tls-hostname=other", session=Session(), format="raw")
        with pytest.raises(LaminaError, match="TLS negotiation required"):
            Backend.open(url(socket), session=Session(), format="raw")
        done = subprocess.run(
            [
                BIN / "lamina-img",
                "info",
                "--object",
                f"tls-creds-x509,id=t,endpoint=client,dir={pki}",
                "--image-opts",
                f"driver=nbd,server.type=unix,server.path={socket},export=disk,"
                "tls-creds=t,tls-hostname=localhost",
            ],
            capture_output=True,
            text=True,
        )
        assert "virtual size: 4 MiB" in done.stdout, done.stderr
    assert disk.read_bytes()[: 1 << 20] == data


@pytest.mark.parametrize("server", ["qemu-nbd", pytest.param("nbdkit", marks=needs_nbdkit)])
def test_pre_shared_keys(tmp_path: Path, server: str) -> None:
    make_keys(tmp_path / "keys", "alice", "bob")
    make_keys(tmp_path / "others", "alice", "carol")
    socket, disk = tmp_path / "socket", raw(tmp_path)
    if server == "qemu-nbd":
        creds = f"tls-creds-psk,id=t,endpoint=server,dir={tmp_path}/keys"
        running = qemu_nbd(socket, "-f", "raw", "--object", creds, "--tls-creds", "t", disk)
    else:
        keys = tmp_path / "keys" / "keys.psk"
        running = nbdkit(socket, "--tls=require", f"--tls-psk={keys}", "file", disk)

    def connected(user: str, keys: str) -> Backend:
        file = tmp_path / keys / "keys.psk"
        name = f"nbds+unix://{user}@/disk?socket={socket}&tls-type=psk&tls-psk-file={file}"
        return Backend.open(name, session=Session(), format="raw", writable=True)

    data = random.Random(2).randbytes(1 << 20)
    with running:
        with connected("bob", "keys") as image:
            image.writev([(at, data[at : at + 100_000]) for at in range(0, 1 << 20, 100_000)])
            image.flush()
            assert image.read(0, 1 << 20) == data
        for user in ("alice", "carol"):
            with pytest.raises(LaminaError, match="TLS handshake failed"):
                connected(user, "others")
        done = run(
            BIN / "lamina-img",
            "info",
            "--object",
            f"tls-creds-psk,id=t,endpoint=client,dir={tmp_path}/keys,username=alice",
            "--image-opts",
            f"driver=nbd,server.type=unix,server.path={socket},export=disk,tls-creds=t",
        )
        assert "virtual size: 4 MiB" in done
    assert disk.read_bytes()[: 1 << 20] == data


@pytest.mark.parametrize(
    ("priority", "theirs", "trouble"),
    [
        ("NORMAL", "NORMAL:-CIPHER-ALL:+AES-128-GCM", None),
        ("SECURE256", "NORMAL", None),
        ("SECURE256", "NORMAL:-CIPHER-ALL:+AES-128-GCM", "TLS_AES_128_GCM_SHA256 is too weak"),
        ("SECURE256:-VERS-TLS1.3", "NORMAL:-CIPHER-ALL:+AES-128-GCM", "handshake failed"),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2", "NORMAL:-VERS-TLS1.2", "TLS handshake failed"),
        ("NORMAL:-VERS-TLS1.2", "NORMAL:-VERS-TLS1.3", "TLS handshake failed"),
        ("@SYSTEM", "NORMAL", None),
    ],
)
def test_tls_priorities(tmp_path: Path, priority: str, theirs: str, trouble: str | None) -> None:
    pki = tmp_path / "pki"
    make_certificates(pki)
    socket = tmp_path / "socket"
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={pki},priority={theirs}"
    command = [
        BIN / "lamina-img",
        "info",
        "--object",
        f"tls-creds-x509,id=t,endpoint=client,dir={pki},priority={priority}",
        "--image-opts",
        f"driver=nbd,server.type=unix,server.path={socket},export=disk,tls-creds=t,"
        "tls-hostname=localhost",
    ]
    with qemu_nbd(socket, "-f", "raw", "--object", creds, "--tls-creds=t", raw(tmp_path)):
        done = subprocess.run(command, capture_output=True, text=True)
    if trouble is None:
        assert "virtual size: 4 MiB" in done.stdout, done.stderr
    else:
        assert trouble in done.stderr
        assert done.returncode == 1


def test_tls_client_of_a_plain_server(tmp_path: Path) -> None:
    socket, disk = tmp_path / "socket", raw(tmp_path)
    with qemu_nbd(socket, "-f", "raw", disk):
        name = f"nbds+unix:///disk?socket={socket}&tls-verify-peer=0"
        with pytest.raises(LaminaError) as caught:
            Backend.open(name, session=Session(), format="raw")
        assert str(caught.value) == "Denied by server for option 5 (starttls)"
        assert caught.value.hint == "server reported: TLS not configured"
