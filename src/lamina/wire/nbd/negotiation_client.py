"""The client's side of the handshake: from the first byte to the transmission phase.

Servers of every age are served: those of the old style, which offer one nameless export, those that
know nothing but EXPORT_NAME, and those with GO, structured replies and extended headers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from lamina.records import dataclass, replace
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages
from lamina.wire.nbd.agreement import Agreement, Description, Style
from lamina.wire.nbd.steps import (
    Negotiation,
    ProtocolError,
    Receive,
    Send,
    Skip,
    StartTls,
    receive,
)

_MAX_REPLY = 4 + 2 * nbd.MAX_STRING
"""Bytes of data that a reply to an option may have."""
_MAX_REPLIES = 1 << 16
"""To one option: a server that never comes to an end is left."""
_MAX_REPLIED = 16 << 20
"""Bytes of them together."""


@dataclass(frozen=True)
class Wish:
    """What a client wants of a server."""

    export: str = ""
    tls: bool = False
    """Go on under TLS, or not at all."""
    contexts: tuple[str, ...] = ()
    """Metadata contexts to select, each by its full name."""
    highest: Style = Style.EXTENDED
    """No more than this is asked for."""


class OptionRefused(ProtocolError):
    """The server answered an option with an error; ``kind`` is its REP_ERR number."""

    def __init__(self, message: str, kind: int, hint: str | None) -> None:
        super().__init__(message, hint=hint, errno=22)
        self.kind = kind


def negotiate(wish: Wish) -> Negotiation[Agreement]:
    """Choose an export. Raises ProtocolError, and OptionRefused where the server does not want."""
    flags = yield from _greeting()
    if flags is None:
        return (yield from _oldstyle(wish))
    if not flags & nbd.FIXED_NEWSTYLE:
        if wish.tls:
            raise ProtocolError("Server does not support STARTTLS")
        return (yield from _export_name(wish, flags))
    if wish.tls:
        yield from _start_tls()
    style = yield from _agree_on_style(wish.highest)
    contexts = {}
    if style is not Style.SIMPLE and wish.contexts:
        contexts = yield from _set_contexts(wish.export, wish.contexts)
    export = yield from _info(nbd.OPT_GO, wish.export)
    if export is None:
        if style is Style.EXTENDED:
            raise ProtocolError("Server has extended headers but no option 7 (go)")
        # Without GO there is no way to hear why: look whether there is such an export first.
        yield from _check_listed(wish.export)
        agreed = yield from _export_name(wish, flags)
        return replace(agreed, style=style, contexts=contexts)
    return Agreement(export, style, contexts)


def list_exports(*, tls: bool = False) -> Negotiation[tuple[Style, list[Description]]]:
    """All exports that a server tells of, with whatever it says about them."""
    flags = yield from _greeting()
    if flags is None:
        agreed = yield from _oldstyle(Wish(tls=tls))
        return Style.SIMPLE, [agreed.export]
    if not flags & nbd.FIXED_NEWSTYLE:
        raise ProtocolError("Server does not support export lists")
    if tls:
        yield from _start_tls()
    style = yield from _agree_on_style(Style.EXTENDED)
    found = []
    for name, text in (yield from _list()):
        export: Description | None = None
        with suppress(OptionRefused):
            export = yield from _info(nbd.OPT_INFO, name)
        export = replace(export or Description(name, flags=0), text=text)
        if style is not Style.SIMPLE:
            contexts = yield from _list_contexts(name)
            export = replace(export, contexts=tuple(contexts))
        found.append(export)
    yield Send(messages.option(nbd.OPT_ABORT), last=True)
    return style, found


# -- the beginning ---------------------------------------------------------------------------------


def _greeting() -> Negotiation[int | None]:
    """The server's handshake flags, already answered; None: it is of the old style."""
    magic = messages.U64.unpack((yield Receive(8, "initial magic")))[0]
    if magic != nbd.INIT_MAGIC:
        raise ProtocolError(f"Bad initial magic received: 0x{magic:016x}")
    magic = messages.U64.unpack((yield Receive(8, "server magic")))[0]
    if magic == nbd.OLDSTYLE_MAGIC:
        return None
    if magic != nbd.OPTION_MAGIC:
        raise ProtocolError(f"Bad server magic received: 0x{magic:x}")
    flags: int = messages.U16.unpack((yield Receive(2, "server flags")))[0]
    answer = flags & (nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES)
    yield Send(messages.CLIENT_FLAGS.pack(answer))
    return flags


def _oldstyle(wish: Wish) -> Negotiation[Agreement]:
    if wish.tls:
        raise ProtocolError("Server does not support STARTTLS")
    if wish.export:
        raise ProtocolError("Server does not support non-empty export names")
    size, flags = messages.OLDSTYLE_REST.unpack(
        (yield Receive(messages.OLDSTYLE_REST.size, "export length"))
    )
    if flags & ~0xFFFF:
        raise ProtocolError(f"Unexpected export flags {flags:x}")
    return Agreement(_checked(Description(size=size, flags=flags)))


def _export_name(wish: Wish, handshake_flags: int) -> Negotiation[Agreement]:
    yield Send(messages.option(nbd.OPT_EXPORT_NAME, wish.export.encode("utf-8", "surrogateescape")))
    answer = yield Receive(messages.EXPORT.size, "export length")
    size, flags = messages.EXPORT.unpack(answer)
    if not handshake_flags & nbd.NO_ZEROES:
        yield Skip(messages.EXPORT_PADDING, "reserved block")
    return Agreement(_checked(Description(wish.export, size, flags)))


def _checked(export: Description) -> Description:
    if export.size >= 1 << 63:
        raise ProtocolError("Export length is too large")
    if export.size % export.sizes.minimum:
        raise ProtocolError(
            f"export size {export.size} is not multiple of minimum block size "
            f"{export.sizes.minimum}"
        )
    return export


# -- options ---------------------------------------------------------------------------------------


def _start_tls() -> Negotiation[None]:
    if not (yield from _simple_option(nbd.OPT_STARTTLS, tolerated=False)):
        raise ProtocolError("Server does not support STARTTLS")
    yield StartTls()


def _agree_on_style(highest: Style) -> Negotiation[Style]:
    if highest >= Style.EXTENDED and (yield from _simple_option(nbd.OPT_EXTENDED_HEADERS)):
        return Style.EXTENDED
    if highest >= Style.STRUCTURED and (yield from _simple_option(nbd.OPT_STRUCTURED_REPLY)):
        return Style.STRUCTURED
    return Style.SIMPLE


def _simple_option(number: int, *, tolerated: bool = True) -> Negotiation[bool]:
    """Whether the server agrees to an option without data; ``tolerated`` as for ``_reply``."""
    name = nbd.OPTION_NAMES[number]
    yield Send(messages.option(number))
    kind, length = yield from _reply_header(number)
    if kind & nbd.REP_ERROR:
        yield from _reply_error(number, kind, length, tolerated=tolerated)
        return False
    if length:
        raise ProtocolError(
            f"Option {number} ('{name}') response length is {length} (it should be zero)"
        )
    if kind != nbd.REP_ACK:
        raise ProtocolError(
            f"Server answered option {number} ({name}) with unexpected reply {kind} "
            f"({nbd.name(nbd.REPLY_NAMES, kind)})"
        )
    return True


def _info(number: int, name: str) -> Negotiation[Description | None]:
    """INFO or GO. None: the server knows no such option."""
    wanted = [nbd.INFO_BLOCK_SIZE]
    if number == nbd.OPT_INFO:
        wanted.append(nbd.INFO_DESCRIPTION)
    yield Send(messages.option(number, messages.pack_info_request(name, wanted)))
    found = Description(name, flags=0)
    for kind, data in (yield from _replies(number, nbd.REP_INFO)):
        if kind == nbd.REP_ERR_UNSUP:
            return None
        if len(data) < messages.U16.size:
            raise ProtocolError(f"NBD_REP_INFO length {len(data)} is too short")
        topic, content = messages.U16.unpack_from(data)[0], data[messages.U16.size :]
        if topic == nbd.INFO_EXPORT:
            size, flags = messages.unpack_info_export(content)
            found = replace(found, size=size, flags=flags)
        elif topic == nbd.INFO_BLOCK_SIZE:
            sizes = messages.unpack_info_block_size(content)
            found = replace(found, sizes=sizes, sizes_told=True)
        elif topic == nbd.INFO_DESCRIPTION:
            found = replace(found, text=messages.text(content))
    if not found.flags:
        raise ProtocolError("broken server omitted NBD_INFO_EXPORT")
    return _checked(found)


def _list() -> Negotiation[list[tuple[str, str]]]:
    """Names and descriptions."""
    yield Send(messages.option(nbd.OPT_LIST))
    replies = yield from _replies(nbd.OPT_LIST, nbd.REP_SERVER)
    return [messages.unpack_server(data) for kind, data in replies if kind == nbd.REP_SERVER]


def _check_listed(name: str) -> Negotiation[None]:
    """Raises ProtocolError where the server lists its exports and this is not among them."""
    yield Send(messages.option(nbd.OPT_LIST))
    replies = yield from _replies(nbd.OPT_LIST, nbd.REP_SERVER)
    if any(kind == nbd.REP_ERR_UNSUP for kind, _ in replies):
        return  # no list: EXPORT_NAME itself will show
    if all(messages.unpack_server(data)[0] != name for _, data in replies):
        raise ProtocolError(f"No export with name '{name}' available")


def _set_contexts(name: str, queries: Sequence[str]) -> Negotiation[dict[str, int]]:
    """Those of ``queries`` that the export has, with their numbers."""
    yield Send(
        messages.option(nbd.OPT_SET_META_CONTEXT, messages.pack_query_request(name, queries))
    )
    replies = yield from _replies(
        nbd.OPT_SET_META_CONTEXT, nbd.REP_META_CONTEXT, tolerated=True
    )
    found: dict[str, int] = {}
    for kind, data in replies:
        if kind & nbd.REP_ERROR:
            return {}
        number, context = messages.unpack_meta_context(data)
        if context not in queries:
            raise ProtocolError(
                f"Failed to negotiate meta context '{queries[0]}', "
                f"server answered with different context '{messages.printable(data[4:])}'"
            )
        if context in found or number in found.values():
            raise ProtocolError("Server answered with the same meta context twice")
        found[context] = number
    return found


def _list_contexts(name: str) -> Negotiation[list[str]]:
    yield Send(messages.option(nbd.OPT_LIST_META_CONTEXT, messages.pack_query_request(name, [])))
    replies = yield from _replies(
        nbd.OPT_LIST_META_CONTEXT, nbd.REP_META_CONTEXT, tolerated=True
    )
    return [
        messages.unpack_meta_context(data)[1]
        for kind, data in replies
        if not kind & nbd.REP_ERROR
    ]


# -- replies to options ----------------------------------------------------------------------------


def _replies(
    number: int, expected: int, *, tolerated: bool = False
) -> Negotiation[list[tuple[int, bytes]]]:
    """All replies of type ``expected`` up to the ACK.

    An error UNSUP, or with ``tolerated`` any, is the last of the list; others are raised.
    """
    found: list[tuple[int, bytes]] = []
    total = 0
    while True:
        kind, length = yield from _reply_header(number)
        if kind & nbd.REP_ERROR:
            data = yield from _reply_error(number, kind, length, tolerated=tolerated)
            return [*found, (kind, data)]
        if kind == nbd.REP_ACK:
            if length:
                raise ProtocolError("server sent invalid NBD_REP_ACK")
            return found
        if kind != expected:
            raise ProtocolError(
                f"unexpected reply type {kind} ({nbd.name(nbd.REPLY_NAMES, kind)}), "
                f"expected {expected} ({nbd.REPLY_NAMES[expected]})"
            )
        total += length
        if length > _MAX_REPLY:
            raise ProtocolError("option reply is too long")
        if len(found) == _MAX_REPLIES or total > _MAX_REPLIED:
            raise ProtocolError(f"Too many replies to option {_named(number)}")
        found.append((kind, (yield from receive(length, "option reply"))))


def _reply_header(number: int) -> Negotiation[tuple[int, int]]:
    """Type of the next reply, and the length of its data."""
    header = yield Receive(messages.OPTION_REPLY.size, "option reply")
    magic, about, kind, length = messages.OPTION_REPLY.unpack(header)
    if magic != nbd.OPTION_REPLY_MAGIC:
        raise ProtocolError("Unexpected option reply magic")
    if about != number:
        raise ProtocolError(f"Unexpected option type {_named(about)}, expected {_named(number)}")
    return kind, length


def _reply_error(
    number: int, kind: int, length: int, *, tolerated: bool
) -> Negotiation[bytes]:
    """What the server says about an error: if it is UNSUP or ``tolerated``; others are raised."""
    if length > nbd.MAX_PAYLOAD:
        raise ProtocolError(
            f"server error {kind:#x} ({nbd.name(nbd.REPLY_NAMES, kind)}) message is too long"
        )
    text = b""
    if length > nbd.MAX_STRING:
        yield Skip(length, "option error message")
    else:
        text = yield from receive(length, "option error message")
    if kind != nbd.REP_ERR_UNSUP and not tolerated:
        raise _refused(number, kind, text)
    return text


def _named(number: int) -> str:
    return f"{number} ({nbd.name(nbd.OPTION_NAMES, number)})"


def _refused(number: int, kind: int, data: bytes) -> OptionRefused:
    option = _named(number)
    hints = []
    if kind == nbd.REP_ERR_POLICY:
        message = f"Denied by server for option {option}"
    elif kind == nbd.REP_ERR_INVALID:
        message = f"Invalid parameters for option {option}"
    elif kind == nbd.REP_ERR_PLATFORM:
        message = f"Server lacks support for option {option}"
    elif kind == nbd.REP_ERR_TLS_REQD:
        message = f"TLS negotiation required before option {option}"
        hints.append("Did you forget a valid tls-creds?")
    elif kind == nbd.REP_ERR_UNKNOWN:
        message = "Requested export not available"
    elif kind == nbd.REP_ERR_SHUTDOWN:
        message = f"Server shutting down before option {option}"
    elif kind == nbd.REP_ERR_BLOCK_SIZE_REQD:
        message = f"Server requires INFO_BLOCK_SIZE for option {option}"
    else:
        message = f"Unknown error code when asking for option {option}"
    if data:
        hints.append(f"server reported: {messages.printable(data)}")
    return OptionRefused(message, kind, "\n".join(hints) or None)


