"""Handshakes: ours with ours, ours with servers and clients of every age and temper."""

from __future__ import annotations

import struct

import pytest

from lamina.records import replace
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages
from lamina.wire.nbd.agreement import Description, Style
from lamina.wire.nbd.messages import BlockSizes
from lamina.wire.nbd.negotiation_client import OptionRefused, Wish, list_exports
from lamina.wire.nbd.negotiation_client import negotiate as ask
from lamina.wire.nbd.negotiation_server import MAX_OPTIONS
from lamina.wire.nbd.negotiation_server import negotiate as serve
from lamina.wire.nbd.steps import ProtocolError
from tests.unit.nbd.pairing import Catalogue, converse, listen, replies_in

FLAGS = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA
DISK = Description(
    "disk",
    1 << 40,
    FLAGS,
    "a disk",
    BlockSizes(512, 4096, 1 << 20),
    (nbd.BASE_ALLOCATION, "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"),
)
EXPORTS = Catalogue(DISK, Description("", 512, FLAGS), Description("schön /x", 0, FLAGS))

C_FLAGS = messages.CLIENT_FLAGS.pack(nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)
GREETING = messages.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, 3)


@pytest.mark.parametrize("style", Style)
def test_go_with_every_style(style: Style) -> None:
    wish = Wish("disk", contexts=(nbd.BASE_ALLOCATION, "nobody:knows"), highest=style)
    client, server = converse(ask(wish), serve(EXPORTS))
    assert client.error is server.error is None
    flags = FLAGS
    contexts = {}
    if style is not Style.SIMPLE:
        flags |= nbd.SEND_DF
        contexts = {nbd.BASE_ALLOCATION: 0}
    if style is Style.EXTENDED:
        flags |= nbd.BLOCK_STATUS_PAYLOAD
    for side in (client, server):
        assert side.result.style is style
        assert side.result.contexts == contexts
        assert side.result.export.size == 1 << 40
        assert side.result.export.flags == flags
        assert side.result.export.sizes == DISK.sizes


@pytest.mark.parametrize("name", ["", "schön /x", "disk"])
def test_names_and_tls(name: str) -> None:
    client, server = converse(ask(Wish(name, tls=True)), serve(EXPORTS, tls=True))
    assert client.secured
    assert server.secured
    assert client.result.export.name == server.result.export.name == name


def test_list() -> None:
    client, server = converse(list_exports(), serve(EXPORTS))
    style, found = client.result
    assert style is Style.EXTENDED
    assert [export.name for export in found] == ["disk", "", "schön /x"]
    assert found[0] == replace(
        DISK, flags=FLAGS | nbd.SEND_DF | nbd.BLOCK_STATUS_PAYLOAD, sizes_told=True
    )
    assert server.done
    assert server.result is None


def test_no_such_export() -> None:
    client, server = converse(ask(Wish("nope")), serve(EXPORTS))
    assert isinstance(client.error, OptionRefused)
    assert client.error.kind == nbd.REP_ERR_UNKNOWN
    assert str(client.error) == "Requested export not available"
    assert client.error.hint == "server reported: export 'nope' not present"
    assert not server.done


def test_plain_client_of_a_tls_server() -> None:
    client, server = converse(ask(Wish("disk")), serve(EXPORTS, tls=True))
    assert str(client.error) == "TLS negotiation required before option 7 (go)"
    assert isinstance(client.error, OptionRefused)
    assert client.error.hint == (
        "Did you forget a valid tls-creds?\n"
        "server reported: Option 0x7 not permitted before TLS"
    )
    kinds = {kind for _, kind, _ in replies_in(bytes(server.sent))}
    assert kinds == {nbd.REP_ERR_TLS_REQD}


def test_tls_client_of_a_plain_server() -> None:
    client, _ = converse(ask(Wish("disk", tls=True)), serve(EXPORTS))
    assert str(client.error) == "Denied by server for option 5 (starttls)"
    assert isinstance(client.error, OptionRefused)
    assert client.error.hint == "server reported: TLS not configured"


def test_what_was_agreed_before_tls_is_forgotten() -> None:
    # A client that asks for structured replies in the clear is refused, and TLS starts afresh.
    out = C_FLAGS + messages.option(nbd.OPT_STRUCTURED_REPLY) + messages.option(nbd.OPT_STARTTLS)
    out += messages.option(nbd.OPT_GO, messages.pack_info_request("", []))
    side = listen(serve(EXPORTS, tls=True), out)
    assert side.secured
    assert side.result.style is Style.SIMPLE


# -- the client, and servers that are not ours ----------------------------------------------------


def test_oldstyle() -> None:
    hello = struct.pack(">QQQI124x", nbd.INIT_MAGIC, nbd.OLDSTYLE_MAGIC, 4096, 3)
    side = listen(ask(Wish()), hello)
    assert side.result.export.size == 4096
    assert side.result.export.flags == 3
    assert side.result.style is Style.SIMPLE
    assert not side.sent
    assert str(listen(ask(Wish("a")), hello).error) == (
        "Server does not support non-empty export names"
    )
    assert str(listen(ask(Wish(tls=True)), hello).error) == "Server does not support STARTTLS"


@pytest.mark.parametrize("zeroes", [True, False])
def test_newstyle_that_is_not_fixed(zeroes: bool) -> None:
    flags = 0 if zeroes else nbd.NO_ZEROES
    hello = messages.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, flags)
    answer = messages.EXPORT.pack(1 << 20, 5) + bytes(124 if zeroes else 0)
    side = listen(ask(Wish("x")), hello + answer + b"more")
    assert side.result.export.size == 1 << 20
    assert side.inbox == b"more"
    assert side.sent == messages.CLIENT_FLAGS.pack(flags) + messages.option(1, b"x")


def test_a_server_without_go_is_asked_for_its_list_first() -> None:
    unsupported = [
        messages.option_reply(option, nbd.REP_ERR_UNSUP)
        for option in (nbd.OPT_EXTENDED_HEADERS, nbd.OPT_STRUCTURED_REPLY, nbd.OPT_GO)
    ]
    listed = messages.option_reply(nbd.OPT_LIST, nbd.REP_SERVER, messages.pack_server("a", ""))
    listed += messages.option_reply(nbd.OPT_LIST, nbd.REP_ACK)
    hello = GREETING + b"".join(unsupported) + listed
    side = listen(ask(Wish("a")), hello + messages.EXPORT.pack(7, 1))
    assert side.result.export.size == 7
    assert str(listen(ask(Wish("b")), hello).error) == "No export with name 'b' available"


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (b"SSH-2.0-OpenSSH_9", "Bad initial magic received: 0x5353482d322e302d"),
        (b"NBDMAGIC" + bytes(8), "Bad server magic received: 0x0"),
        (GREETING + bytes(20), "Unexpected option reply magic"),
        (
            GREETING + messages.option_reply(8, nbd.REP_ACK),
            "Unexpected option type 8 (structured reply), expected 11 (extended headers)",
        ),
        (
            GREETING + messages.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, 11, 1, 1 << 30),
            "Option 11 ('extended headers') response length is 1073741824 (it should be zero)",
        ),
        (
            GREETING + messages.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, 11, 1 << 31, 1 << 30),
            "server error 0x80000000 (<unknown>) message is too long",
        ),
    ],
)
def test_servers_that_make_no_sense(hello: bytes, message: str) -> None:
    side = listen(ask(Wish()), hello)
    assert isinstance(side.error, ProtocolError)
    assert str(side.error) == message


def _go(*infos: bytes) -> bytes:
    out = GREETING + messages.option_reply(nbd.OPT_EXTENDED_HEADERS, nbd.REP_ERR_UNSUP)
    out += messages.option_reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK)
    for info in infos:
        out += messages.option_reply(nbd.OPT_GO, nbd.REP_INFO, info)
    return out + messages.option_reply(nbd.OPT_GO, nbd.REP_ACK)


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([], "broken server omitted NBD_INFO_EXPORT"),
        ([b"\0"], "NBD_REP_INFO length 1 is too short"),
        ([b"\0\0\0"], "remaining export info len 1 is unexpected size"),
        ([messages.pack_info_export(1 << 63, 1)], "Export length is too large"),
        ([b"\0\3" + struct.pack(">III", 3, 4, 5)], "server minimum block size 3 is not a power"),
        ([b"\0\3" + struct.pack(">III", 0, 4, 5)], "server minimum block size 0 is not a power"),
        ([b"\0\3" + struct.pack(">III", 1 << 17, 1 << 17, 1 << 20)], "is too large"),
        ([b"\0\3" + struct.pack(">III", 512, 256, 512)], "server preferred block size 256"),
        ([b"\0\3" + struct.pack(">III", 512, 512, 100)], "server maximum block size 100"),
        (
            [b"\0\3" + struct.pack(">III", 512, 512, 512), messages.pack_info_export(1000, 1)],
            "export size 1000 is not multiple of minimum block size 512",
        ),
    ],
)
def test_descriptions_that_make_no_sense(infos: list[bytes], message: str) -> None:
    side = listen(ask(Wish()), _go(*infos))
    assert isinstance(side.error, ProtocolError)
    assert message in str(side.error)


def test_unknown_infos_are_passed_over() -> None:
    side = listen(ask(Wish()), _go(b"\x12\x34whatever", messages.pack_info_export(5, 1)))
    assert side.result.export.size == 5
    assert side.result.style is Style.STRUCTURED


def test_a_list_without_end_is_left() -> None:
    out = GREETING + messages.option_reply(11, nbd.REP_ERR_UNSUP)
    out += messages.option_reply(8, nbd.REP_ERR_UNSUP)
    name = messages.pack_server("a" * 4000, "")
    entry = messages.option_reply(nbd.OPT_LIST, nbd.REP_SERVER, name)
    side = listen(list_exports(), out + entry * 5000)
    assert str(side.error) == "Too many replies to option 3 (list)"


# -- the server, and clients that are not ours ----------------------------------------------------


def say(*options: bytes, tls: bool = False) -> list[tuple[int, int, bytes]]:
    """What our server answers; it neither ends nor fails."""
    side = listen(serve(EXPORTS, tls=tls), C_FLAGS + b"".join(options))
    assert not side.done
    return replies_in(bytes(side.sent))


@pytest.mark.parametrize("option", [0, nbd.OPT_PEEK_EXPORT, 12, 0xFFFFFFFF])
def test_unknown_options_are_refused_and_their_data_passed_over(option: int) -> None:
    huge = messages.OPTION.pack(nbd.OPTION_MAGIC, option, 1 << 20) + bytes(1 << 20)
    answers = say(huge, messages.option(option), messages.option(nbd.OPT_LIST, b"x"))
    assert [kind for _, kind, _ in answers] == [
        nbd.REP_ERR_UNSUP,
        nbd.REP_ERR_UNSUP,
        nbd.REP_ERR_INVALID,
    ]
    assert [about for about, _, _ in answers] == [option, option, nbd.OPT_LIST]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\1",
        b"\0\0\0\0",
        b"\0\0\0\0\0",
        b"\0\0\0\0\0\1",
        b"\0\0\0\0\0\1\0",
        b"\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff",
        messages.pack_info_request("n" * 4097, []),
    ],
)
def test_broken_data_of_go(data: bytes) -> None:
    for option in (nbd.OPT_GO, nbd.OPT_INFO):
        assert [kind for _, kind, _ in say(messages.option(option, data))] == [nbd.REP_ERR_INVALID]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0",
        b"\0\0\0\0\0\0\0\1",
        b"\0\0\0\0\xff\xff\xff\xff",
        b"\0\0\0\0\0\0\0\0\0",
        b"\0\0\0\0\0\0\0\1\0\0\0\5abcd",
        messages.pack_query_request("", ["q" * 4097]),
    ],
)
def test_broken_queries(data: bytes) -> None:
    structured = messages.option(nbd.OPT_STRUCTURED_REPLY)
    for option in (nbd.OPT_SET_META_CONTEXT, nbd.OPT_LIST_META_CONTEXT):
        answers = say(structured, messages.option(option, data))
        assert [kind for _, kind, _ in answers] == [nbd.REP_ACK, nbd.REP_ERR_INVALID]


def test_contexts_can_be_listed_before_there_are_structured_replies_but_not_chosen() -> None:
    data = messages.pack_query_request("disk", [])
    answers = say(messages.option(nbd.OPT_SET_META_CONTEXT, data))
    assert [kind for _, kind, _ in answers] == [nbd.REP_ERR_INVALID]
    answers = say(messages.option(nbd.OPT_LIST_META_CONTEXT, data))
    assert [kind for _, kind, _ in answers] == [nbd.REP_META_CONTEXT] * 4 + [nbd.REP_ACK]


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ([], [0, 1, 2, 3], []),
        (["base:"], [0], []),
        (["base:allocation", "base:allocation"], [0], [0]),
        (["qemu:"], [1, 2, 3], []),
        (["qemu:dirty-bitmap:"], [2, 3], []),
        (["qemu:dirty-bitmap:b1", "qemu:dirty-bitmap:b2"], [3], [3]),
        (["qemu", "base:allocatio", "x:y", ""], [], []),
    ],
)
def test_queries(queries: list[str], listed: list[int], selected: list[int]) -> None:
    data = messages.pack_query_request("disk", queries)
    structured = messages.option(nbd.OPT_STRUCTURED_REPLY)
    for option, expected in (
        (nbd.OPT_LIST_META_CONTEXT, listed),
        (nbd.OPT_SET_META_CONTEXT, selected),
    ):
        answers = say(structured, messages.option(option, data))
        assert answers.pop(0)[1] == nbd.REP_ACK
        assert answers.pop() == (option, nbd.REP_ACK, b"")
        found = [messages.unpack_meta_context(data) for _, _, data in answers]
        assert [name for _, name in found] == [DISK.contexts[index] for index in expected]
        if option == nbd.OPT_SET_META_CONTEXT:
            assert [number for number, _ in found] == expected


def test_contexts_of_another_export_do_not_count() -> None:
    out = C_FLAGS + messages.option(nbd.OPT_STRUCTURED_REPLY)
    query = messages.pack_query_request("disk", ["base:allocation"])
    out += messages.option(nbd.OPT_SET_META_CONTEXT, query)
    go = messages.pack_info_request("", [])
    assert listen(serve(EXPORTS), out + messages.option(nbd.OPT_GO, go)).result.contexts == {}
    go = messages.pack_info_request("disk", [nbd.INFO_BLOCK_SIZE])
    agreed = listen(serve(EXPORTS), out + messages.option(nbd.OPT_GO, go)).result
    assert agreed.contexts == {"base:allocation": 0}


def test_block_sizes_have_to_be_asked_for() -> None:
    answers = say(messages.option(nbd.OPT_INFO, messages.pack_info_request("disk", [])))
    assert answers[-1][1] == nbd.REP_ERR_BLOCK_SIZE_REQD
    assert {kind for _, kind, _ in answers[:-1]} == {nbd.REP_INFO}
    wants_none = messages.option(nbd.OPT_GO, messages.pack_info_request("disk", []))
    side = listen(serve(EXPORTS), C_FLAGS + wants_none)
    told = [data[2:] for _, _, data in replies_in(bytes(side.sent)) if data[:2] == b"\0\3"]
    assert messages.unpack_info_block_size(told[0]).minimum == 1


def test_styles_are_agreed_on_once() -> None:
    structured = messages.option(nbd.OPT_STRUCTURED_REPLY)
    extended = messages.option(nbd.OPT_EXTENDED_HEADERS)
    answers = say(structured, structured, extended, extended, structured)
    assert [kind for _, kind, _ in answers] == [
        nbd.REP_ACK,
        nbd.REP_ERR_INVALID,
        nbd.REP_ACK,
        nbd.REP_ERR_INVALID,
        nbd.REP_ERR_EXT_HEADER_REQD,
    ]


@pytest.mark.parametrize("padding", [True, False])
def test_export_name(padding: bool) -> None:
    flags = nbd.FIXED_NEWSTYLE | (0 if padding else nbd.NO_ZEROES)
    out = messages.CLIENT_FLAGS.pack(flags) + messages.option(nbd.OPT_EXPORT_NAME, b"disk")
    side = listen(serve(EXPORTS), out)
    assert side.result.export.name == "disk"
    answer = side.sent[messages.GREETING.size :]
    assert answer == messages.EXPORT.pack(1 << 40, FLAGS) + bytes(124 if padding else 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\4", "Unknown client flags 0x4 received"),
        (C_FLAGS + bytes(16), "Bad magic received"),
        (C_FLAGS + messages.OPTION.pack(nbd.OPTION_MAGIC, 77, (32 << 20) + 1), "larger than max"),
        (C_FLAGS + messages.option(nbd.OPT_EXPORT_NAME, b"nope"), "export not found"),
        (C_FLAGS + messages.option(nbd.OPT_EXPORT_NAME, b"n" * 4097), "Bad length received"),
        (bytes(4) + messages.option(nbd.OPT_LIST), "Unsupported option 0x3"),
        (
            C_FLAGS + messages.option(nbd.OPT_EXTENDED_HEADERS) + messages.option(1),
            "Extended headers already negotiated",
        ),
        (C_FLAGS + messages.option(99) * (MAX_OPTIONS + 1), "negotiating without end"),
    ],
)
def test_clients_that_are_left(data: bytes, message: str) -> None:
    side = listen(serve(EXPORTS), data)
    assert isinstance(side.error, ProtocolError)
    assert message in str(side.error)


def test_nothing_is_told_before_tls() -> None:
    go = messages.option(nbd.OPT_GO, messages.pack_info_request("disk", []))
    answers = say(messages.option(nbd.OPT_LIST), go, messages.option(99, b"x" * 99), tls=True)
    assert {kind for _, kind, _ in answers} == {nbd.REP_ERR_TLS_REQD}
    side = listen(serve(EXPORTS, tls=True), C_FLAGS + messages.option(nbd.OPT_EXPORT_NAME, b"disk"))
    assert isinstance(side.error, ProtocolError)
    assert len(side.sent) == messages.GREETING.size
    side = listen(serve(EXPORTS, tls=True), C_FLAGS + messages.option(nbd.OPT_ABORT))
    assert side.done
    assert side.error is None
    twice = C_FLAGS + messages.option(nbd.OPT_STARTTLS) * 2
    side = listen(serve(EXPORTS, tls=True), twice)
    assert [kind for _, kind, _ in replies_in(bytes(side.sent))] == [
        nbd.REP_ACK,
        nbd.REP_ERR_INVALID,
    ]
