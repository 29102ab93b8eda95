"""Our server and the clients of others, and our tool beside qemu-nbd."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.interop.nbd_servers import (
    BIN,
    LIBNBD_PYTHON,
    SERVERS,
    SIZE,
    Server,
    image,
    lamina_nbd,
    nbdkit,
    needs_libnbd,
    needs_nbdsh,
    process,
    qemu_nbd,
    run,
    url,
)
from tests.unit.nbd.serving import make_certificates, make_keys

pytestmark = pytest.mark.peer


def some_content() -> bytes:
    dice = random.Random(1)
    content = bytearray(SIZE)
    for start in range(0, SIZE, 1 << 20):
        content[start : start + 300_000] = dice.randbytes(300_000)
    return bytes(content)


@needs_libnbd
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_nbdinfo_and_nbdcopy(tmp_path: Path, format: str) -> None:
    content = some_content()
    disk, socket = image(tmp_path, format, content), tmp_path / "socket"
    with lamina_nbd(socket, "-f", format, "-D", "a description", "-A", disk):
        told = json.loads(run("nbdinfo", "--json", url(socket)))["exports"][0]
        assert told["export-name"] == "disk"
        assert told["description"] == "a description"
        assert told["export-size"] == SIZE
        assert told["contexts"] == ["base:allocation", "qemu:allocation-depth"]
        assert told["can_multi_conn"] is True
        spans = json.loads(run("nbdinfo", "--map", "--json", url(socket)))
        assert sum(span["length"] for span in spans) == SIZE
        assert {span["type"] for span in spans} >= {0, 3}
        run("nbdcopy", url(socket), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
        other = random.Random(2).randbytes(1 << 20) + bytes(SIZE - (1 << 20))
        (tmp_path / "other").write_bytes(other)
        run("nbdcopy", "--flush", tmp_path / "other", url(socket))
    run("qemu-img", "compare", "-f", "raw", "-F", format, tmp_path / "other", disk)
    if format == "qcow2":
        run("qemu-img", "check", "-f", "qcow2", disk)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_tools_of_qemu(tmp_path: Path, format: str) -> None:
    disk, socket = image(tmp_path, format, some_content()), tmp_path / "socket"
    with lamina_nbd(socket, "-f", format, "--discard=unmap", disk):
        commands = [
            "write -P 1 100k 300k",
            "write -f -P 2 1M 64k",
            "write -z 2M 128k",
            "write -zu 3M 128k",
            "discard 3M 64k",
            "aio_write -P 3 500k 1k",
            "aio_flush",
            "flush",
            "read -P 1 100k 300k",
            "read -P 2 1M 64k",
            "read -P 0 2M 128k",
            "read -P 3 500k 1k",
        ]
        words = [word for command in commands for word in ("-c", command)]
        found = run("qemu-io", "-f", "raw", *words, url(socket))
        assert "failed" not in found
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", url(socket), tmp_path / "copy")
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", url(socket), tmp_path / "copy")
        run("qemu-img", "convert", "-n", "-O", "raw", tmp_path / "copy", url(socket))
    run("qemu-img", "compare", "-f", format, "-F", "qcow2", disk, tmp_path / "copy")
    if format == "qcow2":
        run("qemu-img", "check", "-f", "qcow2", disk)


def test_server_inside_of_images(tmp_path: Path) -> None:
    """A qcow2 image in an export of ours, with everything that QEMU does to it."""
    socket = tmp_path / "socket"
    with lamina_nbd(socket, "-f", "raw", image(tmp_path, "raw")):
        run("qemu-img", "create", "-q", "-f", "qcow2", url(socket), "2M")
        run("qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 64k", url(socket))
        run("qemu-img", "check", "-f", "qcow2", url(socket))
        found = run("qemu-io", "-f", "qcow2", "-c", "read -P 5 1M 64k", url(socket))
        assert "failed" not in found


@needs_nbdsh
def test_libnbd_with_and_without_structured_replies(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    script = f"""
import nbd, random
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.add_meta_context("base:allocation")
    h.set_export_name("disk")
    h.connect_unix({str(socket)!r})
    assert h.get_structured_replies_negotiated() == structured
    assert h.can_meta_context("base:allocation") == structured
    data = random.randbytes(1000000)
    h.pwrite(data, 12345, nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), 12345) == data
    pending = [h.aio_pread(nbd.Buffer(70000), n * 70000) for n in range(40)]
    while pending:
        h.poll(-1)
        pending = [one for one in pending if not h.aio_command_completed(one)]
    h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
    h.trim(65536, 0)
    h.cache(65536, 0)
    h.flush()
    for bad, number in (
        (lambda: h.pread(512, {SIZE}), "EINVAL"),
        (lambda: h.pwrite(b"x" * 512, {SIZE}), "ENOSPC"),
        (lambda: h.pread(512, 0, 1 << 9), "EINVAL"),
    ):
        h.set_strict_mode(0)
        try:
            bad()
            raise AssertionError("no error")
        except nbd.Error as error:
            assert error.errno == number, error
    h.shutdown()
"""
    with lamina_nbd(socket, "-f", "raw", image(tmp_path, "raw")):
        run(LIBNBD_PYTHON, "-c", script)


@needs_libnbd
def test_dirty_bitmap(tmp_path: Path) -> None:
    disk, socket = image(tmp_path, "qcow2"), tmp_path / "socket"
    run("qemu-img", "bitmap", "--add", disk, "b0")
    run("qemu-io", "-c", "write 1M 64k", disk)
    maps = []
    for server in (lamina_nbd, qemu_nbd):
        with server(socket, "-f", "qcow2", "-B", "b0", disk):
            context = "--map=qemu:dirty-bitmap:b0"
            maps.append(json.loads(run("nbdinfo", context, "--json", url(socket))))
        socket.unlink(missing_ok=True)
    assert maps[0] == maps[1]
    assert any(span["type"] == 1 for span in maps[0])


@needs_libnbd
def test_tls(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    make_certificates(pki)
    disk, socket = image(tmp_path, "raw", some_content()), tmp_path / "socket"
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={pki}"
    authz = "authz-simple,id=a,identity=CN=client,,O=Tests\\,, Inc."
    arguments = ["--object", creds, "--object", authz, "--tls-creds=t", "--tls-authz=a"]
    with lamina_nbd(socket, "-f", "raw", *arguments, disk):
        options = f"driver=nbd,server.type=unix,server.path={socket},export=disk"
        client = f"tls-creds-x509,id=t,endpoint=client,dir={pki}"
        found = run(
            "qemu-img",
            "compare",
            "--object",
            client,
            "--image-opts",
            f"{options},tls-creds=t,tls-hostname=localhost",
            f"driver=raw,file.filename={disk}",
        )
        assert found == "Images are identical.\n"
        plain = subprocess.run(
            ["qemu-img", "info", url(socket)], capture_output=True, text=True
        )
        assert "TLS negotiation required before option 7 (go)" in plain.stderr
        name = f"nbds+unix:///disk?socket={socket}&tls-certificates={pki}&tls-verify-peer=0"
        run("nbdcopy", name, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == some_content()


@needs_libnbd
def test_pre_shared_keys(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", "alice", "bob")
    make_keys(tmp_path / "others", "alice", "carol")
    disk, socket = image(tmp_path, "raw", some_content()), tmp_path / "socket"
    creds = f"tls-creds-psk,id=t,endpoint=server,dir={tmp_path}/keys"
    authz = "authz-simple,id=a,identity=alice"
    arguments = ["--object", creds, "--object", authz, "--tls-creds=t", "--tls-authz=a"]

    def comparing(user: str, keys: str, priority: str = "NORMAL") -> str:
        done = subprocess.run(
            [
                "qemu-img",
                "compare",
                "--object",
                f"tls-creds-psk,id=t,endpoint=client,dir={tmp_path}/{keys},username={user},"
                f"priority={priority}",
                "--image-opts",
                f"driver=nbd,server.type=unix,server.path={socket},export=disk,tls-creds=t",
                f"driver=raw,file.filename={disk}",
            ],
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    def uri(user: str, keys: str) -> str:
        file = tmp_path / keys / "keys.psk"
        return f"nbds+unix://{user}@/disk?socket={socket}&tls-type=psk&tls-psk-file={file}"

    with lamina_nbd(socket, "-f", "raw", *arguments, disk):
        assert comparing("alice", "keys") == "Images are identical.\n"
        assert "TLS handshake failed" in comparing("alice", "others")
        assert "TLS handshake failed" in comparing("carol", "others")
        assert "TLS handshake failed" in comparing("alice", "keys", "NORMAL:-VERS-TLS1.2")
        assert "identical" not in comparing("bob", "keys")  # a good key, but not allowed
        assert "protocol: newstyle-fixed with TLS" in run("nbdinfo", uri("alice", "keys"))
        run("nbdcopy", uri("alice", "keys"), tmp_path / "copy")
        for user, keys in (("alice", "others"), ("carol", "others"), ("bob", "keys")):
            failed = subprocess.run(["nbdinfo", uri(user, keys)], capture_output=True)
            assert failed.returncode == 1
    assert (tmp_path / "copy").read_bytes() == some_content()


@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("server", SERVERS)
def test_nobody_resizes_what_is_served(
    tmp_path: Path, server: Server, read_only: bool, format: str
) -> None:
    disk, socket = image(tmp_path, format), tmp_path / "socket"
    with server(socket, "-f", format, *(["-r"] if read_only else []), disk):
        run("qemu-nbd", "-L", "-k", socket)  # now it serves
        for tool in ("qemu-img", BIN / "lamina-img"):
            done = subprocess.run(
                [tool, "resize", "-f", format, disk, "8M"], capture_output=True, text=True
            )
            assert done.returncode == 1
            kind = "resize" if format == "raw" else "write"
            assert f'Failed to get "{kind}" lock' in done.stderr
    run(BIN / "lamina-img", "resize", "-f", format, disk, "8M")


# -- the tool --------------------------------------------------------------------------------------

CASES = """

a b
nofile
-k rel disk.raw
-k /nodir/s disk.raw
-e -1 disk.raw
-e x disk.raw
--cache=bad disk.raw
-L disk.raw
--detect-zeroes=unmap disk.raw
--detect-zeroes=foo disk.raw
-n --cache=none disk.raw
--tls-authz x disk.raw
--tls-hostname x disk.raw
--tls-creds x disk.raw
-p x disk.raw
-o 512k disk.raw
-o -1 -p 0 disk.raw
-o 100000000 -p 0 disk.raw
--aio=foo disk.raw
--aio=threads --aio=native disk.raw
--aio=native -p 0 -f raw disk.raw
--discard=foo disk.raw
--discard=on --discard=off disk.raw
-f foo -p 0 disk.raw
--handshake-limit x disk.raw
-B b0 -f raw -p 0 disk.raw
-B nope -p 0 disk.qcow2
--image-opts -f raw driver=raw
-c /nosuch/nbd0 -f raw disk.raw
-d /nosuch/nbd0
-d /nosuch/nbd0 disk.raw
-L -k /nosuch
-L -p 1
-L -c /dev/x
-Z
--foo
--object secret disk.raw
-p 0 -b 1.2.3.4 -f raw disk.raw
--fork --pid-file /nodir/x -p 0 -f raw disk.raw
--pid-file . -p 0 -f raw disk.raw
-l foo -p 0 disk.qcow2
-l snapshot.foo=1 -p 0 disk.qcow2
--tls-creds=x --object tls-creds-anon,id=x,endpoint=client -p 0 -f raw disk.raw
--tls-creds=x --object tls-creds-x509,id=x,endpoint=server,dir=/nodir -p 0 -f raw disk.raw
--tls-creds=x --tls-hostname=x --object tls-creds-anon,id=x,endpoint=server -f raw disk.raw
"""


def test_says_what_qemu_nbd_says(tmp_path: Path) -> None:
    image(tmp_path, "raw")
    image(tmp_path, "qcow2")
    for case in CASES.split("\n")[1:-1]:
        found = []
        for tool in (BIN / "lamina-nbd", "qemu-nbd"):
            done = subprocess.run(
                [tool, *case.split()], capture_output=True, text=True, cwd=tmp_path, timeout=60
            )
            text = done.stdout + done.stderr.replace("lamina-nbd", "qemu-nbd")
            found.append((done.returncode, text))
        assert found[0] == found[1], case


@pytest.mark.parametrize(
    "options",
    [
        "-f raw disk.raw",
        "-f raw -r disk.raw",
        "-f raw -e 3 disk.raw",
        "disk.raw",
        "-f raw -r -e 0 -D text disk.raw",
        "-f qcow2 -A disk.qcow2",
        "-l one disk.qcow2",
        "-o 1048576 -f raw disk.raw",
        "-s -f raw disk.raw",
        "--image-opts driver=raw,offset=512,file.filename=disk.raw",
    ],
)
def test_lists_what_qemu_nbd_lists(tmp_path: Path, options: str) -> None:
    image(tmp_path, "raw")
    run("qemu-img", "snapshot", "-c", "one", image(tmp_path, "qcow2"))
    found = []
    for tool in (BIN / "lamina-nbd", "qemu-nbd"):
        socket = tmp_path / "socket"
        words = [tool, "-k", str(socket), "-t", "-x", "a b", *options.split()]
        with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.DEVNULL) as server:
            deadline = time.monotonic() + 20
            while not socket.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            found += [run(lister, "-L", "-k", socket) for lister in ("qemu-nbd", tool)]
            server.terminate()
        assert not socket.exists()
    assert len(set(found)) == 1
    assert "export: 'a b'" in found[0]


@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="needs nbdkit")
@pytest.mark.parametrize(
    "options",
    [
        ["memory", "1M"],
        ["--no-sr", "memory", "1M"],
        ["--oldstyle", "memory", "1M"],
        ["--mask-handshake=0", "memory", "1M"],
        ["--filter=blocksize-policy", "memory", "1M", "blocksize-minimum=512"],
    ],
)
def test_lists_other_servers_as_qemu_nbd_does(tmp_path: Path, options: list[str]) -> None:
    socket = tmp_path / "socket"
    found = []
    with nbdkit(socket, *options):
        for tool in (BIN / "lamina-nbd", "qemu-nbd"):
            done = subprocess.run([tool, "-L", "-k", socket], capture_output=True, text=True)
            text = done.stdout + done.stderr.replace("lamina-nbd", "qemu-nbd")
            found.append((done.returncode, text))
    assert found[0] == found[1]


def test_ends_with_its_last_client(tmp_path: Path) -> None:
    disk, socket = image(tmp_path, "raw"), tmp_path / "socket"
    words = [BIN / "lamina-nbd", "-k", socket, "-f", "raw", disk]
    with process(socket, *words) as server:
        run(BIN / "lamina-nbd", "-L", "-k", socket)  # does not count: it chose no export
        assert server.poll() is None
        run("qemu-io", "-f", "raw", "-c", "write -P 9 0 64k", url(socket, ""))
        assert server.wait(20) == 0
    assert not socket.exists()
    assert disk.read_bytes()[:65536] == b"\x09" * 65536


def runs(number: int) -> bool:
    try:
        # Empty: it has ended, and nobody has waited for it yet.
        return bool(Path(f"/proc/{number}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("tool", [BIN / "lamina-nbd", "qemu-nbd"])
def test_fork_and_pid_file(tmp_path: Path, tool: Path | str) -> None:
    """The file stays: QEMU's own tests remove it after they have sent the signal."""
    disk, socket, pid = image(tmp_path, "raw"), tmp_path / "socket", tmp_path / "pid"
    pid.write_text("left behind by a process whose number was longer\n")
    run(tool, "--fork", "--pid-file", pid, "-t", "-k", socket, "-f", "raw", disk)
    number = int(pid.read_text())
    try:
        run("qemu-io", "-f", "raw", "-c", "write -P 3 0 512", url(socket, ""))
        second = subprocess.run(
            [tool, "--pid-file", pid, "-r", "-k", f"{socket}2", "-f", "raw", "null-co://"],
            capture_output=True,
            timeout=20,
        )
        assert second.returncode == 1
        assert b"Cannot lock pid file: Resource temporarily unavailable" in second.stderr
    finally:
        os.kill(number, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while runs(number):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert int(pid.read_text()) == number
    assert not socket.exists()
    failed = subprocess.run(
        [tool, "--fork", "-k", socket, tmp_path / "nofile"], capture_output=True
    )
    assert failed.returncode == 1
    assert b"No such file or directory" in failed.stderr


def test_socket_activation(tmp_path: Path) -> None:
    import socket as sockets

    disk, path = image(tmp_path, "raw"), tmp_path / "socket"
    with sockets.socket(sockets.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(5)
        script = (
            "import os,sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        words = [LIBNBD_PYTHON, "-c", script, str(listening.fileno()), BIN / "lamina-nbd"]
        server = subprocess.Popen(
            [*words, "-f", "raw", disk], pass_fds=[listening.fileno()], stderr=subprocess.PIPE
        )
        try:
            found = run("qemu-img", "info", url(path, ""))
            assert "virtual size: 4 MiB" in found
            assert server.wait(20) == 0
        finally:
            server.kill()
            server.communicate()


def test_every_accepted_write_is_there_after_the_end(tmp_path: Path) -> None:
    """Ended in the middle of things: the image is whole, and what was answered is in it."""
    disk, socket = image(tmp_path, "qcow2"), tmp_path / "socket"
    with lamina_nbd(socket, "-f", "qcow2", disk) as server:
        commands = ("write -P 1 0 1M", "flush", "write -P 2 1M 1M", "sleep 5000")
        words = [word for command in commands for word in ("-c", command)]
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", *words, url(socket)], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            for line in client.stdout:
                if "offset 1048576" in line:
                    break
            server.terminate()
            assert server.wait(20) == 0
            client.kill()
    run("qemu-img", "check", "-f", "qcow2", disk)
    found = run("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", disk)
    assert "failed" not in found
