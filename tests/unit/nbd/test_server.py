"""The server: what it answers, to whom, and for how long."""

from __future__ import annotations

import os
import random
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lamina.block.backend import Backend
from lamina.block.dirty import DirtyBitmap
from lamina.block.limits import WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.block.session import Session
from lamina.block.tls import Authorization, TlsCredentials
from lamina.errors import StorageError, UsageError
from lamina.exports.nbd import Export, Limits, Server
from lamina.exports.nbd.contexts import BitmapContext, DepthContext, _in_blocks, find_bitmap
from lamina.testing.memory import MemoryFile
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages
from lamina.wire.nbd.agreement import Style
from lamina.wire.nbd.transmission_client import ReplyReader, Request, pack_request
from tests.unit.nbd.serving import Serving, make_certificates, make_keys, open_export, serving


class Client:
    """A connection that asks what a test wants, sense or nonsense."""

    def __init__(
        self, one: Serving, style: Style = Style.EXTENDED, contexts: Sequence[str] = ()
    ) -> None:
        self.socket = one.connect()
        self.style = style
        self._take(messages.GREETING.size)
        out = messages.CLIENT_FLAGS.pack(3)
        if style is Style.STRUCTURED:
            out += messages.option(nbd.OPT_STRUCTURED_REPLY)
        if style is Style.EXTENDED:
            out += messages.option(nbd.OPT_EXTENDED_HEADERS)
        if contexts:
            query = messages.pack_query_request("disk", contexts)
            out += messages.option(nbd.OPT_SET_META_CONTEXT, query)
        go = messages.pack_info_request("disk", [nbd.INFO_BLOCK_SIZE])
        self.socket.sendall(out + messages.option(nbd.OPT_GO, go))
        self.flags = 0
        numbers = set()
        while True:
            header = self._take(messages.OPTION_REPLY.size)
            _, option, kind, length = messages.OPTION_REPLY.unpack(header)
            data = self._take(length)
            if kind == nbd.REP_META_CONTEXT:
                numbers.add(messages.unpack_meta_context(data)[0])
            if kind == nbd.REP_INFO and data[:2] == b"\0\0":
                _, self.flags = messages.unpack_info_export(data[2:])
            if option == nbd.OPT_GO and kind == nbd.REP_ACK:
                break
        self._pending: dict[int, Request] = {}
        self._reader = ReplyReader(style, self._pending, numbers)
        self._cookie = 0

    def _take(self, length: int) -> bytes:
        data = self.socket.recv(length, socket.MSG_WAITALL) if length else b""
        assert len(data) == length
        return data

    def send(self, *requests: Request) -> None:
        self.socket.sendall(self._packed(requests))

    def _packed(self, requests: Sequence[Request]) -> bytes:
        out = []
        for request in requests:
            self._cookie += 1
            request.cookie = self._cookie
            self._pending[request.cookie] = request
            out.append(pack_request(request, extended=self.style is Style.EXTENDED))
            if request.command == nbd.CMD_WRITE:
                out.append(bytes(request.buffer or b""))
        return b"".join(out)

    def ask(self, *requests: Request) -> list[int]:
        """Their errors. What is sent and what comes back may be more than sockets can hold."""
        sending = threading.Thread(target=self.socket.sendall, args=(self._packed(requests),))
        sending.start()
        while self._pending:
            buffers = self._reader.buffers()
            count = self.socket.recv_into(buffers[0])
            assert count
            self._reader.received(count)
        sending.join()
        return [request.error for request in requests]

    def ended(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()


def read(offset: int, length: int, flags: int = 0) -> Request:
    buffer = memoryview(bytearray(length))
    return Request(nbd.CMD_READ, offset, length, flags=flags, buffer=buffer)


def write(offset: int, data: bytes, flags: int = 0) -> Request:
    return Request(nbd.CMD_WRITE, offset, len(data), flags=flags, buffer=data)


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- requests --------------------------------------------------------------------------------------

SIZE = 4 << 20


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("seed", range(2))
def test_random_requests_agree_with_a_bytearray(tmp_path: Path, seed: int, style: Style) -> None:
    dice = random.Random(seed)
    model = bytearray(SIZE)
    with serving(tmp_path, size=SIZE) as one:
        client = Client(one, style)
        for _ in range(60):
            batch = []
            slot = SIZE // 8
            for start in range(0, SIZE, slot):
                length = dice.choice((1, 512, 4096, 70_000, 300_000))
                at = start + dice.randrange(slot - length)
                what = dice.choice(("read", "read", "write", "zero"))
                if what == "read":
                    df = nbd.CMD_FLAG_DF if style is not Style.SIMPLE and dice.random() < 0.3 else 0
                    batch.append(read(at, length, df))
                elif what == "write":
                    fua = nbd.CMD_FLAG_FUA if dice.random() < 0.2 else 0
                    batch.append(write(at, dice.randbytes(length), fua))
                else:
                    flags = dice.choice((0, nbd.CMD_FLAG_NO_HOLE))
                    batch.append(Request(nbd.CMD_WRITE_ZEROES, at, length, flags=flags))
            assert not any(client.ask(*batch))
            for request in batch:
                end = request.offset + request.length
                if request.command == nbd.CMD_READ:
                    assert request.buffer == model[request.offset : end]
                elif request.command == nbd.CMD_WRITE:
                    model[request.offset : end] = request.buffer or b""
                else:
                    model[request.offset : end] = bytes(request.length)
        assert client.ask(Request(nbd.CMD_FLUSH)) == [0]
        client.close()
    assert one.disk.read_bytes() == model
    assert not one.log


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (read(SIZE - 1, 2), nbd.EINVAL),
        (read(1 << 63, 1), nbd.EINVAL),
        (read(0, 0), 0),
        (read(0, (32 << 20) + 1), nbd.EINVAL),
        (read(0, 512, 1 << 9), nbd.EINVAL),
        (read(0, 512, nbd.CMD_FLAG_FUA), 0),
        (write(SIZE - 1, b"xx"), nbd.ENOSPC),
        (write(0, b""), 0),
        (write(0, b"x", nbd.CMD_FLAG_DF), nbd.EINVAL),
        (Request(nbd.CMD_WRITE_ZEROES, SIZE, 1), nbd.ENOSPC),
        (Request(nbd.CMD_WRITE_ZEROES, 0, (1 << 64) - 1), nbd.ENOSPC),
        (Request(nbd.CMD_TRIM, SIZE, 1), nbd.EINVAL),
        (Request(nbd.CMD_TRIM, 0, SIZE, flags=nbd.CMD_FLAG_FUA), 0),
        (Request(nbd.CMD_CACHE, 0, SIZE), 0),
        (Request(nbd.CMD_CACHE, 0, (32 << 20) + 1), nbd.EINVAL),
        (Request(nbd.CMD_BLOCK_STATUS, 0, 512), nbd.EINVAL),
        (Request(nbd.CMD_RESIZE, 0, 512), nbd.EINVAL),
        (Request(0xFFFF, 0, 512), nbd.EINVAL),
    ],
)
def test_each_request_gets_its_own_answer(
    tmp_path: Path, request_: Request, error: int
) -> None:
    with serving(tmp_path, size=SIZE) as one:
        client = Client(one)
        assert client.ask(write(0, b"before"), request_, read(0, 6)) == [0, error, 0]
        client.close()


def test_read_only(tmp_path: Path) -> None:
    with serving(tmp_path, read_only=True) as one:
        client = Client(one)
        assert client.flags & nbd.READ_ONLY
        assert not client.flags & (nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES)
        requests = [
            write(0, b"x"),
            Request(nbd.CMD_TRIM, 0, 1),
            Request(nbd.CMD_WRITE_ZEROES, 0, 1),
            Request(nbd.CMD_FLUSH),
        ]
        assert client.ask(*requests) == [nbd.EPERM, nbd.EPERM, nbd.EPERM, 0]
        client.close()
    assert one.disk.read_bytes() == bytes(1 << 20)


class Failing(Node):
    """Every third sector cannot be read or written; knows what was flushed."""

    driver = "failing"

    def __init__(self) -> None:
        super().__init__(NodeOptions(read_only=False))
        self.data = bytearray(1 << 20)
        self.flushes = 0
        self.slow = threading.Event()
        self.slow.set()

    @property
    def size(self) -> int:
        return len(self.data)

    def info(self) -> Any:
        raise NotImplementedError

    def extents(self, offset: int, length: int) -> Any:
        from lamina.block.extents import Extent, Kind

        return [Extent(offset, length, Kind.DATA, self, offset)]

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            self._check(offset, len(buffer))
            buffer[:] = self.data[offset : offset + len(buffer)]

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        self.slow.wait(20)
        for offset, data in requests:
            self._check(offset, len(data))
            self.data[offset : offset + len(data)] = data

    def _check(self, offset: int, length: int) -> None:
        if any(sector % 3 == 2 for sector in range(offset // 512, (offset + length) // 512)):
            raise StorageError.from_errno(28)

    def _flush(self) -> None:
        self.flushes += 1


def failing() -> tuple[Failing, Backend]:
    node = Failing()
    return node, Backend(node, perm=Perm.CONSISTENT_READ | Perm.WRITE)


@pytest.mark.parametrize("style", Style)
def test_one_failure_in_a_batch_fails_one_request(tmp_path: Path, style: Style) -> None:
    node, backend = failing()
    with serving(tmp_path, backend=backend) as one:
        client = Client(one, style)
        batch = [write(sector * 512, bytes([sector]) * 512) for sector in range(9)]
        batch += [read(sector * 512, 512) for sector in range(9)]
        errors = client.ask(*batch)
        assert errors == [0, 0, nbd.ENOSPC] * 6
        long = [read(512, 100_000), read(0, 512)]
        assert client.ask(*long) == [nbd.ENOSPC, 0]
        assert client.ask(read(3 * 512, 512)) == [0]
        client.close()
    assert node.data[: 2 * 512] == bytes(512) + b"\1" * 512


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_a_file_that_is_cut_while_it_is_sent(tmp_path: Path, style: Style) -> None:
    """What cannot be sent straight from the file comes some other way, or as an error."""
    content = random.Random(1).randbytes(SIZE)
    with serving(tmp_path, content=content) as one:
        client = Client(one, style)
        os.truncate(one.disk, SIZE // 2)
        requests = [read(SIZE // 2 - 100_000, 300_000), read(0, 100_000), read(SIZE - 512, 512)]
        errors = client.ask(*requests)
        assert errors[1] == 0
        assert requests[1].buffer == content[:100_000]
        if not errors[0]:
            expected = content[SIZE // 2 - 100_000 : SIZE // 2] + bytes(200_000)
            assert requests[0].buffer == expected
        client.close()


def test_block_status(tmp_path: Path) -> None:
    bitmap = DirtyBitmap("b0", SIZE, 65536)
    bitmap.set(65536, 1)
    with serving(
        tmp_path, size=SIZE, contexts=[BitmapContext(bitmap)]
    ) as one:
        one.backend.node.write(1 << 20, b"x" * 65536)
        one.backend.flush()
        names = ["base:allocation", "qemu:dirty-bitmap:b0"]
        for style in (Style.STRUCTURED, Style.EXTENDED):
            client = Client(one, style, names)
            request = Request(nbd.CMD_BLOCK_STATUS, 0, SIZE)
            assert client.ask(request) == [0]
            assert request.status[0] == [
                (1 << 20, 3),
                (65536, 0),
                (SIZE - (1 << 20) - 65536, 3),
            ]
            assert request.status[1] == [(65536, 0), (65536, 1), (SIZE - 131072, 0)]
            request = Request(nbd.CMD_BLOCK_STATUS, 512, 1 << 20, flags=nbd.CMD_FLAG_REQ_ONE)
            assert client.ask(request) == [0]
            assert request.status == {0: [((1 << 20) - 512, 3)], 1: [(65536 - 512, 0)]}
            assert client.ask(Request(nbd.CMD_BLOCK_STATUS, 0, 0)) == [nbd.EINVAL]
            client.close()


def test_allocation_depth(tmp_path: Path) -> None:
    from lamina.block.creation import create_image

    session = Session()
    base, top = str(tmp_path / "base"), str(tmp_path / "top")
    create_image(base, "qcow2", session=session, size=1 << 20)
    with Backend.open(base, session=session, writable=True) as image:
        image.write(0, b"x" * 131072)
    create_image(top, "qcow2", session=session, backing_file=base, backing_format="qcow2")
    with Backend.open(top, session=session, writable=True) as image:
        image.write(65536, b"y" * 65536)
        context = DepthContext(image.node)
        assert context.status(0, 1 << 20, only_one=False, longest=1 << 32) == [
            (65536, 2),
            (65536, 1),
            ((1 << 20) - 131072, 0),
        ]


@pytest.mark.parametrize("seed", range(20))
def test_edges_move_to_blocks(seed: int) -> None:
    dice = random.Random(seed)
    block = 16
    offset = dice.randrange(4) * block
    extents = [(dice.randrange(1, 40), dice.randrange(4)) for _ in range(30)]
    each = [value for length, value in extents for _ in range(length)]
    expected = []
    for start in range(0, len(each), block):
        part = each[start : start + block]
        value = part[0]
        for one in part:
            value &= one
        expected += [value] * len(part)
    found = list(_in_blocks(extents, offset, block))
    assert [value for length, value in found for _ in range(length)] == expected
    at = offset
    for length, _ in found[:-1]:
        assert length > 0
        at += length
        assert at % block == 0


def test_bitmaps_that_cannot_be_shown(tmp_path: Path) -> None:
    node = MemoryFile(1 << 20)
    node.dirty_bitmaps.append(DirtyBitmap("on", 1 << 20, 65536))
    node.dirty_bitmaps.append(DirtyBitmap("off", 1 << 20, 65536, enabled=False))
    with pytest.raises(UsageError, match="Bitmap 'x' is not found"):
        find_bitmap(node, "x", read_only=False)
    with pytest.raises(UsageError, match="Enabled bitmap 'on' incompatible with readonly export"):
        find_bitmap(node, "on", read_only=True)
    assert find_bitmap(node, "on", read_only=False).name == "on"
    assert find_bitmap(node, "off", read_only=True).name == "off"


# -- clients that behave badly ---------------------------------------------------------------------


def test_noise_ends_one_connection_only(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        good = Client(one)
        for noise in (b"\0" * 32, b"GET / HTTP/1.0\r\n\r\n" * 10, b"\xff" * 100_000):
            with one.connect() as raw:
                raw.sendall(noise)
            client = Client(one)
            client.socket.sendall(noise)
            assert client.ended()
            client.close()
        assert good.ask(read(0, 512)) == [0]
        good.close()
        eventually(lambda: one.server is not None and one.server.connections == 0)
    assert any("option negotiation failed" in line for line in one.log)
    assert any("Disconnect client, due to: invalid magic" in line for line in one.log)


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as the host allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_thousands_of_half_open_handshakes_keep_nobody_out(
    tmp_path: Path, many_files: None
) -> None:
    """Silent ones, and ones that stop in the middle of their flags, of an option, of its data."""
    flags = messages.CLIENT_FLAGS.pack(nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)
    option = messages.OPTION.pack(nbd.OPTION_MAGIC, nbd.OPT_GO, 4000)
    beginnings = (b"", flags[:2], flags, flags + option[:9], flags + option + bytes(100))
    with serving(tmp_path, limits=Limits(0, handshake_seconds=60)) as one:
        assert one.server is not None
        client = Client(one)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        silent = []
        for number in range(2000):
            connection = one.connect()
            silent.append(connection)
            with suppress(OSError):  # it may have been given up by now
                connection.sendall(beginnings[number % len(beginnings)])
            if number % 100 == 0:
                assert client.ask(read(0, 512)) == [0]  # whoever was there is served
                assert threading.active_count() < 300
        other = Client(one)
        assert other.ask(read(0, 512)) == [0]
        eventually(lambda: one.server is not None and one.server.connections < 140)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 64 << 10  # kilobytes
        assert client.ask(read(0, 512)) == [0]
        for connection in silent:
            connection.close()
        eventually(lambda: one.server is not None and one.server.connections == 2)
        other.close()
        client.close()
    assert any("Too many handshakes" in line for line in one.log)


def test_a_flood_of_options_is_ended(tmp_path: Path) -> None:
    """Sent as fast as the host can, its answers taken: others are served meanwhile and after."""
    many = messages.option(nbd.OPT_LIST) * 500 + messages.option(0x4711, bytes(4096)) * 20
    with serving(tmp_path, limits=Limits(0, handshake_seconds=60)) as one:
        client = Client(one)
        flooding = one.connect()
        flooding.sendall(messages.CLIENT_FLAGS.pack(nbd.FIXED_NEWSTYLE))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        def flood() -> None:
            with suppress(OSError):
                while True:
                    flooding.sendall(many)

        sending = threading.Thread(target=flood)
        sending.start()
        with suppress(ConnectionError):
            while flooding.recv(1 << 16):
                assert client.ask(read(0, 512)) == [0]
        sending.join(20)
        assert not sending.is_alive()
        assert client.ask(read(0, 512)) == [0]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
        client.close()
        flooding.close()
    assert one.log == [
        "option negotiation failed: The client goes on negotiating without end"
    ]


def test_waiting_for_an_idle_client_takes_no_time_of_the_host(tmp_path: Path) -> None:
    """The server stays awake for a client that asks again at once, not for one that does not."""
    with serving(tmp_path) as one:
        client = Client(one)
        for _ in range(200):
            assert client.ask(read(0, 512)) == [0]
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.1
        client.close()


def test_handshakes_have_their_time(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(1, handshake_seconds=0.3)) as one:
        silent = one.connect()
        silent.settimeout(10)
        silent.recv(100)
        client = Client(one)  # waits until the first one is given up
        assert client.ask(read(0, 512)) == [0]
        assert silent.recv(100) == b""
        time.sleep(0.5)  # the limit ends with the handshake
        assert client.ask(read(0, 512)) == [0]
        client.close()
        silent.close()
    assert any("The handshake takes too long" in line for line in one.log)


def test_a_client_that_does_not_read_is_left(tmp_path: Path) -> None:
    with serving(tmp_path, size=16 << 20, limits=Limits(0, send_seconds=0.5)) as one:
        one.backend.node.write(0, b"\1" * (16 << 20))
        client = Client(one)
        client.send(*[read(0, 16 << 20) for _ in range(50)])
        other = Client(one)
        assert other.ask(read(0, 512)) == [0]
        eventually(lambda: any("The client does not read" in line for line in one.log), 20)
        assert other.ask(read(0, 512)) == [0]
        other.close()
        client.close()


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_announced_payloads_take_no_memory(tmp_path: Path) -> None:
    with serving(tmp_path, size=64 << 20, limits=Limits(0)) as one:
        before = resident_kib()
        clients = [Client(one) for _ in range(30)]
        for client in clients:
            request = Request(nbd.CMD_WRITE, 0, 32 << 20)
            client.socket.sendall(pack_request(request, extended=True) + bytes(1000))
        time.sleep(0.3)
        assert resident_kib() - before < 100 << 10  # of 960 MiB that were announced
        for client in clients:
            client.close()
        eventually(lambda: one.server is not None and one.server.connections == 0)
    assert sum("end-of-file" in line for line in one.log) == 30


def test_no_more_connections_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(2)) as one:
        first, second = Client(one), Client(one)
        waiting = one.connect()
        waiting.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.recv(1)
        first.close()
        waiting.settimeout(10)
        assert waiting.recv(8) == b"NBDMAGIC"
        waiting.close()
        second.close()


# -- TLS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "identity", "welcome"),
    [
        ("x509", "CN=client,O=Tests\\, Inc.", True),
        ("x509", "CN=other", False),
        ("psk", "alice", True),
        ("psk", "bob", False),
        ("anon", "alice", False),
    ],
)
def test_authorization(tmp_path: Path, kind: str, identity: str, welcome: bool) -> None:
    make_certificates(tmp_path / "pki")
    make_keys(tmp_path / "pki", "bob", "alice")
    creds = TlsCredentials(kind, "server", str(tmp_path / "pki"))
    options = {
        "tls": True,
        "tls_type": kind,
        "tls_certificates": creds.dir,
        "tls_hostname": "localhost",
        "tls_username": "alice",
    }
    one = Serving(tmp_path)
    server = one.start(tls=creds)
    server._authorization = Authorization(identity)
    if welcome:
        open_export(one, **options).close()
    else:
        with pytest.raises(StorageError):
            open_export(one, **options)
        eventually(lambda: any("authz check" in line for line in one.log))
    one.stop()


# -- exports and the end ---------------------------------------------------------------------------


def test_exports_come_and_go(tmp_path: Path) -> None:
    with serving(tmp_path) as one:
        assert one.server is not None
        other = Export(one.backend, name="other")
        one.server.add_export(other)
        with pytest.raises(UsageError, match="already has export named 'other'"):
            one.server.add_export(Export(one.backend, name="other"))
        client = Client(one)
        one.server.remove_export(other)
        assert client.ask(read(0, 512)) == [0]
        one.server.remove_export(one.server.exports()[0])
        assert client.ended()
        assert one.server.exports() == []


def test_what_was_asked_for_before_the_end_is_done(tmp_path: Path) -> None:
    node, backend = failing()
    one = Serving(tmp_path)
    server = one.start(backend=backend)
    client = Client(one)
    node.slow.clear()
    client.send(write(0, b"\7" * 512), write(512, b"\7" * 512))
    time.sleep(0.2)
    closing = threading.Thread(target=server.close)
    closing.start()
    time.sleep(0.2)
    node.slow.set()
    closing.join(20)
    assert not closing.is_alive()
    reply = client.socket.recv(1000, socket.MSG_WAITALL)
    assert len(reply) == 64
    assert node.data[:1024] == b"\7" * 1024
    assert node.flushes == 1
    client.close()


def test_a_stuck_client_does_not_stop_the_end(tmp_path: Path) -> None:
    one = Serving(tmp_path, size=16 << 20)
    server = one.start(limits=Limits(0, send_seconds=0))
    one.backend.node.write(0, b"\1" * (16 << 20))
    client = Client(one)
    client.send(*[read(0, 16 << 20) for _ in range(50)])
    time.sleep(0.3)
    started = time.monotonic()
    server.close(seconds=0.5)
    assert time.monotonic() - started < 10
    client.close()
    one.stop()


def test_several_servers_leave_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    for number in range(3):
        path = tmp_path / str(number)
        path.mkdir()
        with serving(path) as one:
            client = Client(one)
            assert isinstance(one.server, Server)
            client.close()
    eventually(lambda: threading.active_count() == before)


def test_extended_headers_speak_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    one = Serving(tmp_path)
    os.truncate(one.disk, 1 << 40)
    one.start()
    client = Client(one, Style.EXTENDED, ["base:allocation"])
    request = Request(nbd.CMD_BLOCK_STATUS, 0, 1 << 40)
    assert client.ask(request) == [0]
    assert request.status == {0: [(1 << 40, 3)]}
    compact = Client(one, Style.STRUCTURED, ["base:allocation"])
    request = Request(nbd.CMD_BLOCK_STATUS, 0, 0xFFFFFFFF)
    assert compact.ask(request) == [0]
    assert sum(length for length, _ in request.status[0]) <= 0xFFFFFFFF
    client.close()
    compact.close()
    one.stop()
