"""The client beside a server in this process, and servers that misbehave."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lamina.block.node import NodeOptions
from lamina.block.opening import open_node
from lamina.block.session import Session
from lamina.block.sockets import SocketAddress, listen
from lamina.block.tls import TlsCredentials
from lamina.errors import ImageUnsupported, LaminaError, Refused, StorageError, UsageError
from lamina.protocols.nbd import connections, naming
from lamina.records import replace
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages, steps
from lamina.wire.nbd.agreement import Description
from lamina.wire.nbd.negotiation_server import negotiate
from lamina.wire.nbd.replies import replies_of
from lamina.wire.nbd.transmission_server import Request, RequestReader
from tests.unit.nbd.pairing import Catalogue
from tests.unit.nbd.serving import (
    Serving,
    make_certificates,
    make_keys,
    open_export,
    serving,
)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    content = random.Random(1).randbytes(1 << 20)
    with serving(tmp_path, content=content) as one:
        yield one


# -- names -----------------------------------------------------------------------------------------

UNIX = {"server.type": "unix", "server.path": "/s"}


def inet(host: str, port: str = "10809") -> dict[str, str]:
    return {"server.type": "inet", "server.host": host, "server.port": port}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nbd://Example.com", inet("Example.com")),
        ("nbd+tcp://h:1/", inet("h", "1")),
        ("nbd://h//disk", {**inet("h"), "export": "/disk"}),
        ("nbd://h/hello%20world", {**inet("h"), "export": "hello world"}),
        ("nbd://[::1]:5/x", {**inet("::1", "5"), "export": "x"}),
        ("nbd://user@h/x", {**inet("h"), "export": "x"}),
        ("nbd+unix:///?socket=/s", UNIX),
        ("nbd+unix://?socket=/s", UNIX),
        ("nbd+unix:///a%2fb?socket=%2Fs", {**UNIX, "export": "a/b"}),
        ("nbd:h:5", inet("h", "5")),
        ("nbd:[::1]:5:exportname=a:b", {**inet("::1", "5"), "export": "a:b"}),
        ("nbd:unix:/s", UNIX),
        ("nbd:unix:/s:exportname=a b", {**UNIX, "export": "a b"}),
        (
            "nbds://bob@h/x?tls-hostname=other&tls-verify-peer=0",
            {
                **inet("h"),
                "export": "x",
                "tls": True,
                "tls-username": "bob",
                "tls-hostname": "other",
                "tls-verify-peer": "0",
            },
        ),
        ("nbds+unix:///?socket=/s&tls-type=psk", {**UNIX, "tls": True, "tls-type": "psk"}),
        ("nbds+unix://bob@/?socket=/s", {**UNIX, "tls": True, "tls-username": "bob"}),
    ],
)
def test_names(name: str, options: dict[str, Any]) -> None:
    assert naming.parse_name(name) == options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nbd:", "NBD server address missing"),
        ("nbd:h:1:exportname=", "NBD server address missing"),
        ("nbd:h", "error parsing address 'h'"),
        ("nbd:[::1:5", "error parsing address '[::1:5'"),
        ("nbd://", "No valid URL specified"),
        ("nbd:///x", "No valid URL specified"),
        ("nbd://h:port/", "No valid URL specified"),
        ("nbd://h/?x=y", "No valid URL specified"),
        ("nbd+unix:///x", "No valid URL specified"),
        ("nbd+unix://h/x?socket=/s", "No valid URL specified"),
        ("nbd+unix:///x?socket=/s&tls-type=psk", "No valid URL specified"),
        ("nbd+unix://bob@/x?socket=/s", "No valid URL specified"),
        ("nbds+unix://bob@h/x?socket=/s", "No valid URL specified"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        naming.parse_name(name)
    assert str(caught.value) == message


@pytest.mark.parametrize("export", ["", "disk", "a b", "100% ?", "/x", "ü"])
@pytest.mark.parametrize("kind", ["unix", "inet"])
def test_names_shown_open_the_same(kind: str, export: str) -> None:
    shown = naming.uri(kind, "::1", "5", "/tmp/s k", export, secure=False)
    assert shown is not None
    found = naming.parse_name(shown)
    assert found.get("export", "") == export
    if kind == "unix":
        assert found["server.path"] == "/tmp/s k"
    else:
        assert found["server.host"] == "::1"


def test_name_of_a_node(served: Serving) -> None:
    node = open_node(
        served.options, session=Session(), defaults=NodeOptions(), protocol=True
    )
    assert node.filename == f"nbd+unix:///disk?socket={served.socket}"
    node.close()


# -- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tls-creds": "x"}, "No TLS credentials with id 'x'"),
        ({"tls-creds": "other"}, "Object with id 'other' is not TLS credentials"),
        ({"tls-creds": "server"}, "Expecting TLS credentials with a client endpoint"),
        ({"export": "nope"}, "Requested export not available"),
        ({"export": "n" * 4097}, "export name too long to send to server"),
        ({"x-dirty-bitmap": "qemu:dirty-bitmap:b"}, "requested x-dirty-bitmap qemu"),
        ({"host": "h"}, "Cannot use 'server' and path/host/port at the same time"),
        ({"server.port": "5"}, "Parameter 'port' is unexpected"),
        ({"reconnect-delay": "-1"}, "Parameter 'reconnect-delay' expects"),
        ({"tls": "on", "tls-type": "none"}, "Parameter 'tls-type' does not accept"),
        ({"tls": "on", "tls-certificates": "/nosuch"}, "Unable to access credentials /nosuch/ca"),
    ],
)
def test_options_that_make_no_sense(
    served: Serving, options: dict[str, str], message: str
) -> None:
    session = Session()
    session.objects["other"] = object()
    session.objects["server"] = TlsCredentials("anon", "server")
    with pytest.raises(LaminaError, match=message.replace("(", ".")):
        open_node(
            {**served.options, **options},
            session=session,
            defaults=NodeOptions(),
            protocol=True,
        )


def test_read_only_exports(tmp_path: Path) -> None:
    with serving(tmp_path, writable=False) as one:
        with pytest.raises(Refused, match="Permission denied"):
            open_export(one)
        node = open_node(
            {**one.options, "auto-read-only": "on"},
            session=Session(),
            defaults=NodeOptions(read_only=False),
            protocol=True,
        )
        assert node.read_only
        with pytest.raises(Refused):
            node.reopen(read_only=False)
        node.close()


def test_prefetching(tmp_path: Path) -> None:
    """The server is asked to, in pieces that it takes; one that cannot be asked is read from."""
    pieces: list[tuple[int, int]] = []
    commands: set[int] = set()
    content = bytes(100 << 20)

    def noting(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        for request in batch:
            if request.command == nbd.CMD_DISC:
                return False
            commands.add(request.command)
            pieces.append((request.offset, request.length))
            if request.command == nbd.CMD_CACHE:
                connection.sendall(replies.success(request.cookie, request.offset))
            else:
                reading(content)(connection, [request], replies)
        return True

    for flags, command in (
        (nbd.HAS_FLAGS | nbd.SEND_CACHE, nbd.CMD_CACHE),
        (nbd.HAS_FLAGS, nbd.CMD_READ),
    ):
        pieces.clear()
        commands.clear()
        one = Impostor(tmp_path, [noting], flags=flags, size=len(content))
        node = open_export(one, read_only=True)  # type: ignore[arg-type]
        node.prefetch(1000, (70 << 20) + 1)
        node.close()
        one.close()
        one.socket.unlink()
        assert commands == {command}
        assert max(length for _, length in pieces) <= 32 << 20
        end = 1000
        for offset, length in pieces:
            assert offset == end
            end += length
        assert end == 1001 + (70 << 20)


def test_size_is_fixed(served: Serving) -> None:
    node = open_export(served)
    with pytest.raises(ImageUnsupported, match="Cannot resize"):
        node.truncate(1 << 19)
    with pytest.raises(ImageUnsupported, match="Cannot grow"):
        node.truncate(1 << 21, exact=False)
    node.truncate(1 << 19, exact=False)
    node.close()


@pytest.mark.parametrize("kind", ["x509", "psk", "anon"])
def test_tls(tmp_path: Path, kind: str) -> None:
    make_certificates(tmp_path / "pki")
    make_keys(tmp_path / "pki", "alice", "bob")
    creds = str(tmp_path / "pki")
    with serving(tmp_path, tls=TlsCredentials(kind, "server", creds)) as one:
        if kind == "anon":
            node = open_export(one, tls=True, tls_type="anon")
        elif kind == "psk":
            options = {"tls": True, "tls_type": "psk", "tls_username": "alice"}
            node = open_export(one, tls_psk_file=f"{creds}/keys.psk", **options)
            make_keys(tmp_path / "others", "alice")
            with pytest.raises(StorageError, match="TLS handshake failed"):
                open_export(one, tls_psk_file=str(tmp_path / "others" / "keys.psk"), **options)
            make_keys(tmp_path / "others", "mallory")
            options["tls_username"] = "mallory"
            with pytest.raises(StorageError, match="TLS handshake failed"):
                open_export(one, tls_psk_file=str(tmp_path / "others" / "keys.psk"), **options)
        else:
            node = open_export(
                one, tls=True, tls_certificates=creds, tls_hostname="localhost"
            )
            with pytest.raises(StorageError, match="does not match the hostname other"):
                open_export(one, tls=True, tls_certificates=creds, tls_hostname="other")
            with pytest.raises(UsageError, match="No hostname"):
                open_export(one, tls=True, tls_certificates=creds)
        data = random.Random(4).randbytes(700_000)
        node.writev([(at, data[at : at + 70_000]) for at in range(0, 700_000, 70_000)])
        assert node.read(0, 700_000) == data
        assert node.filename.startswith("nbds+unix:///disk?socket=")
        node.close()
        with pytest.raises(LaminaError, match="TLS negotiation required"):
            open_export(one)


# -- threads and connections -----------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("multi_conn", [False, True])
def test_many_threads(tmp_path: Path, multi_conn: bool, secure: bool) -> None:
    """Large reads and writes at once, in more than sockets can hold: nobody waits for ever."""
    tls, options = None, {}
    if secure:
        make_certificates(tmp_path / "pki")
        creds = str(tmp_path / "pki")
        tls = TlsCredentials("x509", "server", creds)
        options = {"tls": True, "tls_certificates": creds, "tls_hostname": "localhost"}
    with serving(tmp_path, size=8 << 20, multi_conn=multi_conn, tls=tls) as one:
        node = open_export(one, **options)
        failures: list[object] = []

        def work(number: int) -> None:
            dice = random.Random(number)
            start = number << 20
            mine = bytearray(1 << 20)
            for _ in range(20):
                batch = []
                for piece in range(4):
                    length = dice.choice((512, 4096, 200_000))
                    at = (piece << 18) + dice.randrange((1 << 18) - length)
                    data = dice.randbytes(length)
                    mine[at : at + length] = data
                    batch.append((start + at, data))
                node.writev(batch)
                found = bytearray(1 << 20)
                view = memoryview(found)
                node.readv(
                    [(start + at, view[at : at + 65536]) for at in range(0, 1 << 20, 65536)]
                )
                if found != mine:
                    failures.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert not failures
        assert one.server is not None
        if not multi_conn:
            assert one.server.connections == 1
        node.close()


# -- a server that goes away -----------------------------------------------------------------------


def test_requests_wait_for_a_server_to_come_back(tmp_path: Path) -> None:
    one = Serving(tmp_path)
    one.start()
    node = open_export(one, reconnect_delay=20)
    node.write(0, b"before")
    one.stop()
    later = threading.Timer(0.5, one.start)
    later.start()
    try:
        assert node.read(0, 6) == b"before"
        node.write(6, b"after")
        node.flush()
        assert node.read(0, 11) == b"beforeafter"
    finally:
        later.join()
        node.close()
        one.stop()


def test_without_delay_requests_fail_until_the_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_FIRST_PAUSE", 0.05)
    one = Serving(tmp_path)
    one.start()
    node = open_export(one, read_only=True)
    one.stop()
    for _ in range(3):
        with pytest.raises(StorageError) as caught:
            node.read(0, 512)
        assert caught.value.errno == errno.EIO
    one.start()
    time.sleep(0.3)
    assert node.read(0, 512) == bytes(512)
    node.close()
    one.stop()


@pytest.mark.parametrize("change", ["shrunk", "read-only", "without trim"])
def test_a_disk_that_lost_something_is_not_taken_for_the_old_one(
    tmp_path: Path, change: str
) -> None:
    one = Serving(tmp_path)
    one.start()
    node = open_export(one, reconnect_delay=1)
    one.stop()
    if change == "shrunk":
        one.disk.write_bytes(bytes(4096))
        one.start()
    elif change == "read-only":
        one.start(writable=False)
    else:
        export = one.start().exports()[0]
        export.description = replace(
            export.description, flags=export.description.flags & ~nbd.SEND_TRIM
        )
    for _ in range(2):
        with pytest.raises(StorageError):
            node.read(0, 512)
    told = [line for line in one.log if "instead of" in line]
    if change == "shrunk":
        assert told == [
            "NBD export 'disk' has 4096 bytes instead of 1048576: it is not used until it is as "
            "long as before"
        ]
    else:
        assert not told
    one.stop()
    with suppress(StorageError):  # it flushes
        node.close()


def test_a_disk_that_has_grown_goes_on_as_it_was(tmp_path: Path) -> None:
    one = Serving(tmp_path)
    one.start(multi_conn=False)
    node = open_export(one, reconnect_delay=20)
    node.write(512, b"before")
    for size in (2 << 20, 3 << 20):
        one.stop()
        os.truncate(one.disk, size)
        one.start(multi_conn=True)
        assert node.read(512, 6) == b"before"
        assert node.size == 1 << 20
        assert node.extents(0, 1 << 20)[-1].end == 1 << 20
        with pytest.raises(StorageError, match="No space left"):
            node.write(1 << 20, b"behind")
    node.close()
    one.stop()
    then = "instead of 1048576: the disk is as long as before until it is opened again"
    assert [line for line in one.log if "instead of" in line] == [
        f"NBD export 'disk' has 2097152 bytes {then}",
        f"NBD export 'disk' has 3145728 bytes {then}",
    ]


def test_open_timeout(tmp_path: Path) -> None:
    one = Serving(tmp_path)
    started = time.monotonic()
    with pytest.raises(StorageError, match="Failed to connect"):
        open_export(one, open_timeout=1)
    assert 0.8 < time.monotonic() - started < 5
    later = threading.Timer(0.3, one.start)
    later.start()
    node = open_export(one, open_timeout=20)
    node.close()
    later.join()
    one.stop()


# -- servers that misbehave ------------------------------------------------------------------------


class Carrier:
    """Carries our side of a handshake as a server."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, length: int, what: str) -> bytes:
        data = b""
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise StorageError("the end")
            data += part
        return data

    def start_tls(self) -> None:
        raise NotImplementedError


Answer = Callable[[socket.socket, list[Request], Any], bool]
"""Answers a batch of requests; False: that was the last one of this connection."""


class Impostor:
    """Shakes hands as it should; what it answers is up to a test, connection by connection."""

    def __init__(
        self, path: Path, answers: list[Answer], flags: int = 0x1DED, size: int = 1 << 20
    ) -> None:
        self.log: list[str] = []
        self._size = size
        self.socket = path / "socket"
        self._answers = answers
        self._flags = flags & ~nbd.CAN_MULTI_CONN
        (self._listening,) = listen(SocketAddress("unix", path=str(self.socket)), 5)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        exports = Catalogue(Description("disk", self._size, self._flags))
        for answer in self._answers:
            connection, _ = self._listening.accept()
            with connection:
                try:
                    agreed = steps.run(negotiate(exports), Carrier(connection))
                except LaminaError:
                    continue
                if agreed is None:
                    continue
                reader = RequestReader(extended=agreed.style == 2)
                replies = replies_of(agreed.style)
                going_on = True
                while going_on:
                    batch = reader.requests()
                    if batch:
                        going_on = answer(connection, batch, replies)
                        continue
                    count = connection.recv_into(reader.buffers()[0])
                    if not count:
                        break
                    reader.received(count)

    def close(self) -> None:
        self._listening.close()


def reading(data: bytes) -> Answer:
    def answer(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        for request in batch:
            if request.command == nbd.CMD_DISC:
                return False
            head = bytearray(replies.data_header)
            replies.pack_data(
                head, 0, request.cookie, request.offset, request.offset, request.length
            )
            start = request.offset
            connection.sendall(head + data[start : start + request.length])
        return True

    return answer


def saying(data: bytes) -> Answer:
    def answer(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        connection.sendall(data)
        return False

    return answer


@pytest.mark.parametrize(
    "noise",
    [b"", b"garbage", bytes(64), struct.pack(">IHHQQQ", nbd.EXTENDED_REPLY_MAGIC, 1, 0, 99, 0, 0)],
)
def test_nonsense_is_an_error(tmp_path: Path, noise: bytes) -> None:
    one = Impostor(tmp_path, [saying(noise)])
    node = open_export(one, read_only=True)  # type: ignore[arg-type]
    with pytest.raises(StorageError) as caught:
        node.read(0, 4096)
    assert caught.value.errno == errno.EIO
    node.close()
    one.close()


def test_what_was_in_flight_is_sent_again(tmp_path: Path) -> None:
    """The first server answers one request of a batch and dies; the second gets the others."""
    data = random.Random(3).randbytes(1 << 20)
    asked: list[int] = []

    def one_and_no_more(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        reading(data)(connection, batch[:1], replies)
        return False

    def counting(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        asked.extend(one.offset for one in batch if one.command == nbd.CMD_READ)
        return reading(data)(connection, batch, replies)

    one = Impostor(tmp_path, [one_and_no_more, counting])
    node = open_export(one, read_only=True, reconnect_delay=10)  # type: ignore[arg-type]
    found = bytearray(1 << 16)
    view = memoryview(found)
    node.readv([(at, view[at : at + 4096]) for at in range(0, 1 << 16, 4096)])
    assert found == data[: 1 << 16]
    assert 0 not in asked
    assert len(asked) == 15
    node.close()
    one.close()


def test_errors_have_their_numbers(tmp_path: Path) -> None:
    def refusing(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        for request in batch:
            if request.command == nbd.CMD_DISC:
                return False
            number = nbd.ENOSPC if request.command == nbd.CMD_WRITE else 4711
            connection.sendall(replies.error(request.cookie, request.offset, number, "no"))
        return True

    one = Impostor(tmp_path, [refusing])
    node = open_export(one)  # type: ignore[arg-type]
    with pytest.raises(StorageError) as caught:
        node.write(0, b"x")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError) as caught:
        node.read(0, 1)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(StorageError):
        node.close()
    one.close()


@pytest.mark.parametrize("missing", [nbd.SEND_FUA, nbd.SEND_WRITE_ZEROES, nbd.SEND_FAST_ZERO])
def test_what_a_server_lacks_is_made_up_for(tmp_path: Path, missing: int) -> None:
    from lamina.block.limits import WriteFlags

    said: list[tuple[int, int]] = []

    def listening(connection: socket.socket, batch: list[Request], replies: Any) -> bool:
        for request in batch:
            if request.command == nbd.CMD_DISC:
                return False
            said.append((request.command, request.flags & ~nbd.CMD_FLAG_PAYLOAD_LEN))
            connection.sendall(replies.success(request.cookie, request.offset))
        return True

    one = Impostor(tmp_path, [listening], flags=0x1DED & ~missing)
    node = open_export(one)  # type: ignore[arg-type]
    if missing == nbd.SEND_FUA:
        node.writev([(0, b"x" * 512)], WriteFlags.FUA)
        assert said == [(nbd.CMD_WRITE, 0), (nbd.CMD_FLUSH, 0)]
    elif missing == nbd.SEND_WRITE_ZEROES:
        node.write_zeroes(0, 1024)
        assert said == [(nbd.CMD_WRITE, 0)]
        with pytest.raises(ImageUnsupported):
            node.write_zeroes(0, 1024, WriteFlags.NO_FALLBACK)
    else:
        node.write_zeroes(0, 1024, WriteFlags.MAY_UNMAP | WriteFlags.FUA)
        assert said == [(nbd.CMD_WRITE_ZEROES, nbd.CMD_FLAG_FUA)]
        with pytest.raises(ImageUnsupported):
            node.write_zeroes(0, 1024, WriteFlags.NO_FALLBACK)
    node.close()
    one.close()


def test_a_disk_that_does_not_end_with_a_sector(tmp_path: Path) -> None:
    data = random.Random(5).randbytes(1 << 20)
    hello = messages.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, 0)
    path = tmp_path / "socket"
    (listening,) = listen(SocketAddress("unix", path=str(path)), 1)

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(hello)
            connection.recv(4 + 16 + 4, socket.MSG_WAITALL)
            connection.sendall(messages.EXPORT.pack(1000, nbd.HAS_FLAGS) + bytes(124))
            reader = RequestReader(extended=False)
            while True:
                for request in reader.requests():
                    if request.command == nbd.CMD_DISC:
                        return
                    start = request.offset
                    connection.sendall(replies_of(0).success(request.cookie, 0))
                    connection.sendall(data[start : start + request.length])
                reader.received(connection.recv_into(reader.buffers()[0]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    one = Serving(tmp_path, content=b"")
    node = open_export(one, read_only=True)
    assert node.size == 1024
    assert node.read(0, 1024) == data[:1000] + bytes(24)
    assert node.read(1010, 14) == bytes(14)
    with pytest.raises(StorageError):
        node.writev([(990, bytes(20))])
    node.close()
    thread.join(10)
    listening.close()
