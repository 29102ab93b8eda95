"""Requests and replies in every style, arriving in pieces of every size."""

from __future__ import annotations

import itertools
import random
import struct

import pytest

from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import transmission_server
from lamina.wire.nbd.agreement import Style
from lamina.wire.nbd.replies import StructuredReplies, replies_of
from lamina.wire.nbd.steps import ProtocolError
from lamina.wire.nbd.transmission_client import ReplyReader, Request, pack_request
from lamina.wire.nbd.transmission_server import RequestReader


def arrive(buffers: list[memoryview], data: memoryview) -> int:
    """Put the beginning of ``data`` where a reader wants it; how much went in."""
    done = 0
    for buffer in buffers:
        part = data[done : done + len(buffer)]
        buffer[: len(part)] = part
        done += len(part)
    return done


def feed_server(
    reader: RequestReader, data: bytes, dice: random.Random
) -> list[transmission_server.Request]:
    found = []
    view = memoryview(data)
    while len(view):
        count = arrive(reader.buffers(), view[: dice.choice((1, 3, 40, 5000, 1 << 20))])
        reader.received(count)
        view = view[count:]
        while batch := reader.requests():
            for one in batch:
                kept = None if one.payload is None else memoryview(bytes(one.payload))
                found.append(one._replace(payload=kept))
    return found


def feed_client(reader: ReplyReader, data: bytes, dice: random.Random) -> list[Request]:
    found: list[Request] = []
    view = memoryview(data)
    while len(view):
        count = arrive(reader.buffers(), view[: dice.choice((1, 3, 40, 5000, 1 << 20))])
        found += reader.received(count)
        view = view[count:]
    return found


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_requests_arrive_as_they_were_sent(seed: int, extended: bool) -> None:
    dice = random.Random(seed)
    sent = []
    out = bytearray()
    for cookie in range(1, 60):
        command = dice.choice((0, 1, 1, 1, 3, 4, 5, 6, 7, 99))
        length = dice.choice((0, 1, 512, 4096, 65536, 262144, 262145, 700_000))
        data = dice.randbytes(length) if command == nbd.CMD_WRITE else None
        request = Request(command, dice.randrange(1 << 60), length, flags=1, buffer=data)
        request.cookie = cookie
        sent.append(request)
        out += pack_request(request, extended=extended) + (data or b"")
    reader = RequestReader(extended=extended)
    found = feed_server(reader, bytes(out), dice)
    assert len(found) == len(sent)
    assert reader.idle
    for one, other in zip(sent, found, strict=True):
        assert (one.command, one.cookie, one.offset, one.length) == (
            other.command,
            other.cookie,
            other.offset,
            other.length,
        )
        assert bytes(other.payload or b"") == bytes(one.buffer or b"")
        assert not other.fault


def test_payloads_are_handed_out_without_a_copy() -> None:
    reader = RequestReader(extended=False)
    request = Request(nbd.CMD_WRITE, 0, 4096, buffer=bytes(4096))
    data = pack_request(request, extended=False) + b"x" * 4096
    own = reader.buffers()[0]
    own[: len(data)] = data
    reader.received(len(data))
    (found,) = reader.requests()
    assert found.payload is not None
    own[28] = ord("y")
    assert bytes(found.payload[:2]) == b"yx"


def test_payload_that_is_too_long_is_passed_over() -> None:
    reader = RequestReader(extended=False, max_payload=1 << 20)
    long = Request(nbd.CMD_WRITE, 0, (1 << 20) + 1)
    after = Request(nbd.CMD_FLUSH)
    data = pack_request(long, extended=False) + bytes((1 << 20) + 1)
    data += pack_request(after, extended=False)
    found = feed_server(reader, data, random.Random(1))
    assert [(one.command, one.fault) for one in found] == [(1, nbd.EINVAL), (3, 0)]
    reader = RequestReader(extended=True, max_payload=1 << 20)
    with pytest.raises(ProtocolError, match="too long"):
        feed_server(reader, pack_request(long, extended=True), random.Random(1))


def test_payload_that_a_command_does_not_have() -> None:
    header = transmission_server.EXTENDED_REQUEST.pack(
        nbd.EXTENDED_REQUEST_MAGIC, nbd.CMD_FLAG_PAYLOAD_LEN, nbd.CMD_TRIM, 7, 0, 100
    )
    found = feed_server(RequestReader(extended=True), header + bytes(100), random.Random(1))
    assert [(one.command, one.cookie, one.fault) for one in found] == [(4, 7, nbd.EINVAL)]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (struct.pack(">QII", 1 << 40, 2, 0), (1 << 40, 0, (2, 0))),
        (struct.pack(">Q", 5), (5, 0, ())),
        (struct.pack(">QII", 9, 2, 2), (9, nbd.EINVAL, None)),
        (struct.pack(">QH", 9, 2), (10, nbd.EINVAL, None)),
        (b"1234", (4, nbd.EINVAL, None)),
    ],
)
def test_block_status_of_some_contexts(payload: bytes, expected: tuple[object, ...]) -> None:
    header = transmission_server.EXTENDED_REQUEST.pack(
        nbd.EXTENDED_REQUEST_MAGIC,
        nbd.CMD_FLAG_PAYLOAD_LEN,
        nbd.CMD_BLOCK_STATUS,
        7,
        0,
        len(payload),
    )
    (found,) = feed_server(RequestReader(extended=True), header + payload, random.Random(1))
    assert (found.length, found.fault, found.contexts) == expected


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(ProtocolError, match="invalid magic"):
        feed_server(RequestReader(extended=False), bytes(28), random.Random(1))


# -- replies ---------------------------------------------------------------------------------------


def pending(*requests: Request) -> dict[int, Request]:
    for cookie, request in enumerate(requests, 1):
        request.cookie = cookie
    return {request.cookie: request for request in requests}


def reading(offset: int, length: int) -> Request:
    return Request(nbd.CMD_READ, offset, length, buffer=memoryview(bytearray(b"?" * length)))


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("seed", range(5))
def test_replies_arrive_as_they_were_sent(seed: int, style: Style) -> None:
    """In any order, reads in any pieces."""
    dice = random.Random(seed)
    replies = replies_of(style)
    disk = bytes(1000) + dice.randbytes(1 << 20)
    lengths = [dice.choice((1, 4096, 300_000)) for _ in range(20)]
    requests = [reading(dice.randrange(700_000), length) for length in lengths]
    requests += [Request(dice.choice((1, 3, 4, 6)), 5, 5) for _ in range(10)]
    waiting = pending(*requests)
    dice.shuffle(requests)
    messages = []
    for request in requests:
        if request.command != nbd.CMD_READ:
            if dice.random() < 0.5:
                messages.append([replies.error(request.cookie, request.offset, nbd.EIO, "bad")])
            else:
                messages.append([replies.success(request.cookie, request.offset)])
            continue
        cuts = {request.offset, request.offset + request.length}
        if style is not Style.SIMPLE:
            cuts |= {request.offset + dice.randrange(request.length) for _ in range(3)}
        edges = sorted(cuts)
        pieces = list(itertools.pairwise(edges))
        dice.shuffle(pieces)
        chunks = []
        for number, (start, end) in enumerate(pieces, 1):
            done = number == len(pieces)
            data = disk[start:end]
            if isinstance(replies, StructuredReplies) and not any(data):
                chunks.append(
                    replies.hole(request.cookie, request.offset, start, end - start, done=done)
                )
                continue
            buffer = bytearray(replies.data_header)
            replies.pack_data(
                buffer, 0, request.cookie, request.offset, start, end - start, done=done
            )
            chunks.append(bytes(buffer) + data)
        messages.append(chunks)
    out = bytearray()
    while messages:  # chunks of different replies may be mixed
        which = dice.choice(messages)
        out += which.pop(0)
        if not which:
            messages.remove(which)
    found = feed_client(ReplyReader(style, waiting, set()), bytes(out), dice)
    assert not waiting
    assert set(found) == set(requests)
    for request in requests:
        if request.command == nbd.CMD_READ:
            assert request.buffer == disk[request.offset : request.offset + request.length]
            assert not request.error
        elif request.error:
            assert request.error == nbd.EIO
            assert request.message == ("" if style is Style.SIMPLE else "bad")


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_block_status(style: Style) -> None:
    replies = replies_of(style)
    assert isinstance(replies, StructuredReplies)
    request = Request(nbd.CMD_BLOCK_STATUS, 4096, 1 << 30)
    waiting = pending(request)
    out = replies.status(1, 4096, 3, [(4096, 0), (8192, 3)], done=False)
    out += replies.status(1, 4096, 0, [(1 << 31, 1)])
    found = feed_client(ReplyReader(style, waiting, {0, 3}), out, random.Random(2))
    assert found == [request]
    assert request.status == {3: [(4096, 0), (8192, 3)], 0: [(1 << 31, 1)]}


def chunk(kind: int, payload: bytes, *, cookie: int = 1, done: bool = True) -> bytes:
    header = struct.pack(">IHHQI", nbd.STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload))
    return header + payload


def data_chunk(offset: int, data: bytes, *, done: bool = True) -> bytes:
    return chunk(nbd.CHUNK_OFFSET_DATA, struct.pack(">Q", offset) + data, done=done)


@pytest.mark.parametrize(
    "reply",
    [
        bytes(16),
        chunk(0, b"", cookie=2),
        chunk(0, b"x"),
        chunk(0, b"", done=False),
        chunk(0, b""),
        chunk(3, b"12345678"),
        chunk(nbd.CHUNK_OFFSET_DATA, bytes(8)),
        chunk(nbd.CHUNK_OFFSET_HOLE, bytes(11)),
        chunk(nbd.CHUNK_OFFSET_HOLE, struct.pack(">QI", 4096, 0)),
        chunk(nbd.CHUNK_OFFSET_HOLE, struct.pack(">QI", 0, 4096)),
        chunk(nbd.CHUNK_OFFSET_HOLE, struct.pack(">QI", 4096, 0xFFFFFFFF)),
        chunk(nbd.CHUNK_BLOCK_STATUS, struct.pack(">III", 0, 1, 1)),
        chunk(nbd.CHUNK_ERROR, b"\0\0\0\5\0"),
        chunk(nbd.CHUNK_ERROR, b"\0\0\0\0\0\0"),
        chunk(nbd.CHUNK_ERROR, b"\0\0\0\5\0\4abc"),
        chunk(nbd.CHUNK_ERROR, b"\0\0\0\5\xff\xff" + bytes(4090)),
        chunk(nbd.CHUNK_ERROR_OFFSET, b"\0\0\0\5\0\0" + bytes(8)),
        chunk(nbd.CHUNK_ERROR_OFFSET, b"\0\0\0\5\0\0" + bytes(7)),
        data_chunk(4096, bytes(4097)),
        data_chunk(4095, bytes(10)),
        data_chunk(8190, bytes(10)),
        data_chunk(4096, bytes(4095)),
        data_chunk(4096, bytes(100), done=False) + data_chunk(4196, bytes(100)),
        data_chunk(4096, bytes(100), done=False) + data_chunk(4195, bytes(3997)),
        data_chunk(6000, bytes(2192), done=False) + data_chunk(4096, bytes(1905)),
        struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, 1) + bytes(4096),
        struct.pack(">IHHQI", nbd.STRUCTURED_REPLY_MAGIC, 1, nbd.CHUNK_ERROR, 1, 1 << 31),
    ],
)
def test_answers_to_a_read_that_make_no_sense(reply: bytes) -> None:
    request = reading(4096, 4096)
    reader = ReplyReader(Style.STRUCTURED, pending(request), {0})
    with pytest.raises(ProtocolError):
        feed_client(reader, reply, random.Random(3))


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack(">IIQ", nbd.SIMPLE_REPLY_MAGIC, 0, 1),
        chunk(0, b""),
        chunk(nbd.CHUNK_BLOCK_STATUS, struct.pack(">I", 0)),
        chunk(nbd.CHUNK_BLOCK_STATUS, struct.pack(">II", 0, 1)),
        chunk(nbd.CHUNK_BLOCK_STATUS, struct.pack(">III", 0, 0, 1)),
        chunk(nbd.CHUNK_BLOCK_STATUS, struct.pack(">III", 1, 5, 1)),
        chunk(nbd.CHUNK_BLOCK_STATUS_EXT, struct.pack(">IIQQ", 0, 1, 5, 1)),
        chunk(nbd.CHUNK_BLOCK_STATUS, struct.pack(">III", 0, 5, 1), done=False) * 2,
        data_chunk(0, b"x"),
        struct.pack(">IHHQI", nbd.STRUCTURED_REPLY_MAGIC, 1, 5, 1, 0xFFFFFFFC),
    ],
)
def test_answers_to_block_status_that_make_no_sense(reply: bytes) -> None:
    request = Request(nbd.CMD_BLOCK_STATUS, 0, 4096)
    reader = ReplyReader(Style.STRUCTURED, pending(request), {0})
    with pytest.raises(ProtocolError):
        feed_client(reader, reply, random.Random(3))


def test_extended_replies_repeat_the_offset() -> None:
    reader = ReplyReader(Style.EXTENDED, pending(Request(nbd.CMD_TRIM, 5, 5)), set())
    with pytest.raises(ProtocolError, match="offset"):
        feed_client(reader, replies_of(Style.EXTENDED).success(1, 6), random.Random(3))


def test_error_of_an_unknown_kind_is_an_error_all_the_same() -> None:
    request = reading(4096, 4096)
    reader = ReplyReader(Style.STRUCTURED, pending(request), set())
    payload = struct.pack(">IH3s5x", nbd.ENOSPC, 3, b"a\nb")
    assert feed_client(reader, chunk(0xFFFF, payload), random.Random(3)) == [request]
    assert request.error == nbd.ENOSPC
    assert request.message == "a?b"


