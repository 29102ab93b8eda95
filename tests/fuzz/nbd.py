"""Fuzzing both sides of NBD: conversations that somebody has tampered with."""

from __future__ import annotations

import random
import tracemalloc

from lamina.errors import LaminaError
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages
from lamina.wire.nbd.agreement import Description, Style
from lamina.wire.nbd.messages import BlockSizes
from lamina.wire.nbd.negotiation_client import Wish, list_exports
from lamina.wire.nbd.negotiation_client import negotiate as ask
from lamina.wire.nbd.negotiation_server import negotiate as serve
from lamina.wire.nbd.replies import StructuredReplies, replies_of
from lamina.wire.nbd.transmission_client import ReplyReader, Request, pack_request
from lamina.wire.nbd.transmission_server import RequestReader
from tests.fuzz.mutation import mutate
from tests.unit.nbd.pairing import Catalogue, Side, converse, listen

_EXPORTS = Catalogue(
    Description("a", 1 << 30, 0x1DED, "text", BlockSizes(), ("base:allocation", "x:y")),
    Description("", 4096, 3),
)
_ENDS = 32 << 20
"""Bytes of memory that nothing may exceed."""


def fuzz_negotiation(count: int, seed: int = 0) -> int:
    """How many handshakes came to an agreement in spite of all."""
    rng = random.Random(seed)
    wishes = [Wish("a", contexts=("base:allocation",)), Wish(""), Wish("a", highest=Style.SIMPLE)]
    spoken: list[tuple[Side, Side]] = []
    for wish in wishes:
        spoken.append(converse(ask(wish), serve(_EXPORTS)))
    spoken.append(converse(list_exports(), serve(_EXPORTS)))
    agreed = 0
    for _ in range(count):
        which = int(rng.random() * len(spoken))
        client, server = spoken[which]
        if rng.random() < 0.5:
            data = bytes(server.sent)
            wish = wishes[which] if which < len(wishes) else None
            side = listen(list_exports() if wish is None else ask(wish), _tampered(rng, data))
        else:
            data = bytes(client.sent)
            side = listen(serve(_EXPORTS, tls=rng.random() < 0.2), _tampered(rng, data))
        if side.error is not None and not isinstance(side.error, LaminaError):
            raise side.error
        agreed += side.done and side.error is None
    return agreed


def _tampered(rng: random.Random, data: bytes) -> bytes:
    padded = data + bytes(-len(data) % 8)
    return bytes(mutate(rng, padded, [(0, len(padded))])[: len(data)])


def fuzz_requests(count: int, seed: int = 0) -> int:
    """How many requests were understood."""
    rng = random.Random(seed)
    understood = 0
    for _ in range(count):
        extended = rng.random() < 0.5
        out = bytearray()
        for cookie in range(6):
            command = int(rng.random() * 8)
            buffer = bytes(600) if command == nbd.CMD_WRITE else None
            request = Request(command, 4096, 600, buffer=buffer)
            request.cookie = cookie
            out += pack_request(request, extended=extended) + (buffer or b"")
        data = _tampered(rng, bytes(out))
        reader = RequestReader(extended=extended)
        try:
            reader.buffers()[0][: len(data)] = data
            reader.received(len(data))
            while batch := reader.requests():
                understood += len(batch)
                for one in batch:
                    assert one.payload is None or len(one.payload) == one.length
        except LaminaError:
            pass
    return understood


def fuzz_replies(count: int, seed: int = 0) -> int:
    """How many requests were answered."""
    rng = random.Random(seed)
    answered = 0
    for _ in range(count):
        style = Style(int(rng.random() * 3))
        requests, out = _conversation(style)
        waiting = {request.cookie: request for request in requests}
        guard = bytes(requests[0].buffer or b"")
        reader = ReplyReader(style, waiting, {0})
        data = memoryview(_tampered(rng, out))
        try:
            while len(data):
                done = 0
                for buffer in reader.buffers():
                    part = data[done : done + len(buffer)]
                    buffer[: len(part)] = part
                    done += len(part)
                for request in reader.received(done):
                    answered += 1
                    if request.command == nbd.CMD_READ and not request.error:
                        assert request.filled == request.length
                data = data[done:]
        except LaminaError:
            pass
        assert len(guard) == requests[0].length
    return answered


def _conversation(style: Style) -> tuple[list[Request], bytes]:
    replies = replies_of(style)
    requests = [
        Request(nbd.CMD_READ, 4096, 300, buffer=memoryview(bytearray(300))),
        Request(nbd.CMD_WRITE, 0, 10, buffer=bytes(10)),
        Request(nbd.CMD_BLOCK_STATUS, 512, 4096),
        Request(nbd.CMD_READ, 8192, 100, buffer=memoryview(bytearray(100))),
    ]
    for cookie, request in enumerate(requests, 1):
        request.cookie = cookie
    out = bytearray(replies.data_header)
    replies.pack_data(out, 0, 1, 4096, 4096, 300)
    out += b"d" * 300 + replies.error(2, 0, nbd.ENOSPC, "no space")
    if isinstance(replies, StructuredReplies):
        out += replies.status(3, 512, 0, [(512, 0), (512, 3)])
        out += replies.error_at(4, 8192, nbd.EIO, 8200, done=False)
        out += replies.hole(4, 8192, 8192, 100)
    else:
        out += replies.error(3, 512, nbd.EINVAL) + replies.error(4, 8192, nbd.EIO)
    return requests, bytes(out)


def fuzz_garbage(count: int, seed: int = 0) -> None:
    """Noise instead of a peer, announced lengths and all, in bounded memory."""
    rng = random.Random(seed)
    tracemalloc.start()
    try:
        for _ in range(count):
            noise = rng.randbytes(200)
            header = messages.OPTION_REPLY.pack(
                nbd.OPTION_REPLY_MAGIC, 11, int(rng.random() * 5), int(rng.random() * 2**32)
            )
            for data in (noise, header + noise):
                greeting = messages.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, 3)
                for side in (
                    listen(ask(Wish("a")), data),
                    listen(ask(Wish("a")), greeting + data),
                    listen(serve(_EXPORTS), data),
                    listen(serve(_EXPORTS), messages.CLIENT_FLAGS.pack(3) + data),
                ):
                    assert side.error is None or isinstance(side.error, LaminaError)
        assert tracemalloc.get_traced_memory()[1] < _ENDS
    finally:
        tracemalloc.stop()
