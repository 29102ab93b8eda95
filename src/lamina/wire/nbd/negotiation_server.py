"""The server's side of the handshake.

A peer that sends nonsense is told so as long as that makes sense, and left otherwise; none can make
this side keep more than a few kilobytes, nor go on for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from lamina.hints import Protocol
from lamina.records import replace
from lamina.wire.nbd import constants as nbd
from lamina.wire.nbd import messages
from lamina.wire.nbd.agreement import Agreement, Description, Style
from lamina.wire.nbd.messages import BlockSizes, Malformed
from lamina.wire.nbd.steps import (
    Negotiation,
    ProtocolError,
    Receive,
    Send,
    Skip,
    StartTls,
    receive,
)

MAX_OPTIONS = 10_000
"""Of one handshake: enough to ask about thousands of exports, too few to go on for ever."""
_MAX_DATA = 1 << 16
"""Bytes of data of an option that are looked at; longer ones are thrown away and refused."""
_LONG_NAME = 80
"""Letters of a name that are repeated in an error."""
_KNOWN = frozenset(nbd.OPTION_NAMES) - {nbd.OPT_PEEK_EXPORT}
_WITHOUT_DATA = frozenset(
    {
        nbd.OPT_ABORT,
        nbd.OPT_LIST,
        nbd.OPT_STARTTLS,
        nbd.OPT_STRUCTURED_REPLY,
        nbd.OPT_EXTENDED_HEADERS,
    }
)


class Exports(Protocol):
    """What a server serves, at this moment."""

    def listed(self) -> Iterable[Description]: ...

    def find(self, name: str) -> Description | None: ...


def negotiate(exports: Exports, *, tls: bool = False) -> Negotiation[Agreement | None]:
    """None: the client ended it. Raises ProtocolError where it cannot go on.

    With ``tls`` nothing but STARTTLS and ABORT is served before the connection is secured.
    """
    return (yield from _Handshake(exports, tls).negotiate())


class _Handshake:
    """The state between options."""

    def __init__(self, exports: Exports, tls: bool) -> None:
        self._exports = exports
        self._tls_pending = tls
        self._secured = False
        self._fixed = False
        self._zeroes = True
        self._forget()

    def _forget(self) -> None:
        """TLS begins: what was agreed before was agreed with nobody knows whom."""
        self._style = Style.SIMPLE
        self._contexts: dict[str, int] = {}
        self._contexts_of = ""

    def negotiate(self) -> Negotiation[Agreement | None]:
        yield Send(
            messages.GREETING.pack(
                nbd.INIT_MAGIC, nbd.OPTION_MAGIC, nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES
            )
        )
        flags = messages.CLIENT_FLAGS.unpack((yield Receive(4, "client flags")))[0]
        if flags & ~(nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES):
            raise ProtocolError(f"Unknown client flags 0x{flags:x} received")
        self._fixed = bool(flags & nbd.FIXED_NEWSTYLE)
        self._zeroes = not flags & nbd.NO_ZEROES
        for _ in range(MAX_OPTIONS):
            magic, number, length = messages.OPTION.unpack(
                (yield Receive(messages.OPTION.size, "opts magic"))
            )
            if magic != nbd.OPTION_MAGIC:
                raise ProtocolError("Bad magic received")
            if length > nbd.MAX_PAYLOAD:
                raise ProtocolError(f"len ({length}) is larger than max len ({nbd.MAX_PAYLOAD})")
            if number == nbd.OPT_EXPORT_NAME:
                return (yield from self._export_name(length))
            if not self._fixed:
                raise ProtocolError(f"Unsupported option 0x{number:x}")
            if self._tls_pending and number not in (nbd.OPT_STARTTLS, nbd.OPT_ABORT):
                yield from self._refuse(
                    number,
                    nbd.REP_ERR_TLS_REQD,
                    f"Option 0x{number:x} not permitted before TLS",
                    length,
                )
                continue
            if number == nbd.OPT_ABORT:
                yield Send(messages.option_reply(number, nbd.REP_ACK), last=True)
                return None
            agreed = yield from self._option(number, length)
            if agreed is not None:
                return agreed
        raise ProtocolError("The client goes on negotiating without end")

    def _option(self, number: int, length: int) -> Negotiation[Agreement | None]:
        """Serve one option other than EXPORT_NAME and ABORT; the agreement, if it was the last."""
        if number not in _KNOWN:
            yield from self._refuse(
                number, nbd.REP_ERR_UNSUP, f"Unsupported option {_named(number)}", length
            )
            return None
        if number in _WITHOUT_DATA and length:
            yield from self._refuse(
                number,
                nbd.REP_ERR_INVALID,
                f"option '{nbd.OPTION_NAMES[number]}' has unexpected length",
                length,
            )
            return None
        if length > _MAX_DATA:
            yield from self._refuse(number, nbd.REP_ERR_TOO_BIG, "Option data too long", length)
            return None
        data = yield from receive(length, "option data")
        try:
            if number == nbd.OPT_LIST:
                yield from self._list()
            elif number == nbd.OPT_STARTTLS:
                yield from self._start_tls()
            elif number in (nbd.OPT_INFO, nbd.OPT_GO):
                return (yield from self._info(number, data))
            elif number in (nbd.OPT_STRUCTURED_REPLY, nbd.OPT_EXTENDED_HEADERS):
                yield from self._set_style(number)
            else:
                yield from self._query_contexts(number, data)
        except Malformed as error:
            message = f"{error} in option {nbd.OPTION_NAMES[number]}"
            yield from self._refuse(number, nbd.REP_ERR_INVALID, message)
        return None

    def _refuse(self, number: int, kind: int, message: str, skip: int = 0) -> Negotiation[None]:
        """Answer with an error, after throwing away ``skip`` bytes of data."""
        if skip:
            yield Skip(skip, "option data")
        yield Send(messages.option_reply(number, kind, message.encode("utf-8", "surrogateescape")))

    # -- the options -----------------------------------------------------------------------------

    def _export_name(self, length: int) -> Negotiation[Agreement]:
        """This option cannot be answered by an error: what is wrong ends the connection."""
        if self._tls_pending:
            raise ProtocolError("Option 0x1 not permitted before TLS")
        if self._style is Style.EXTENDED:
            raise ProtocolError("Extended headers already negotiated")
        if length > nbd.MAX_STRING:
            raise ProtocolError("Bad length received")
        name = messages.text((yield from receive(length, "export name")))
        export = self._exports.find(name)
        if export is None:
            raise ProtocolError("export not found")
        agreed = self._agreement(export)
        answer = messages.EXPORT.pack(export.size, agreed.export.flags)
        yield Send(answer + bytes(messages.EXPORT_PADDING if self._zeroes else 0))
        return agreed

    def _list(self) -> Negotiation[None]:
        for export in self._exports.listed():
            data = messages.pack_server(export.name, export.text)
            yield Send(messages.option_reply(nbd.OPT_LIST, nbd.REP_SERVER, data))
        yield Send(messages.option_reply(nbd.OPT_LIST, nbd.REP_ACK))

    def _start_tls(self) -> Negotiation[None]:
        if self._secured:
            yield from self._refuse(nbd.OPT_STARTTLS, nbd.REP_ERR_INVALID, "TLS already enabled")
        elif not self._tls_pending:
            yield from self._refuse(nbd.OPT_STARTTLS, nbd.REP_ERR_POLICY, "TLS not configured")
        else:
            yield Send(messages.option_reply(nbd.OPT_STARTTLS, nbd.REP_ACK))
            yield StartTls()
            self._secured, self._tls_pending = True, False
            self._forget()

    def _set_style(self, number: int) -> Negotiation[None]:
        if self._style is Style.EXTENDED:
            if number == nbd.OPT_STRUCTURED_REPLY:
                kind, message = nbd.REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated"
            else:
                kind, message = nbd.REP_ERR_INVALID, "extended headers already negotiated"
            yield from self._refuse(number, kind, message)
        elif number == nbd.OPT_STRUCTURED_REPLY and self._style is Style.STRUCTURED:
            yield from self._refuse(
                number, nbd.REP_ERR_INVALID, "structured reply already negotiated"
            )
        else:
            extended = number == nbd.OPT_EXTENDED_HEADERS
            self._style = Style.EXTENDED if extended else Style.STRUCTURED
            yield Send(messages.option_reply(number, nbd.REP_ACK))

    def _info(self, number: int, data: bytes) -> Negotiation[Agreement | None]:
        request = messages.unpack_info_request(data)
        export = self._exports.find(request.export)
        if export is None:
            yield from self._unknown(number, request.export)
            return None
        agreed = self._agreement(export)
        answers = []
        if nbd.INFO_NAME in request.wanted:
            answers.append(messages.pack_info_text(nbd.INFO_NAME, export.name))
        if export.text:
            answers.append(messages.pack_info_text(nbd.INFO_DESCRIPTION, export.text))
        sizes = export.sizes
        obedient = nbd.INFO_BLOCK_SIZE in request.wanted
        if number == nbd.OPT_GO and not obedient:
            # It would not know that it has to align anything; INFO may tell.
            sizes = BlockSizes(1, sizes.preferred, sizes.maximum)
        answers.append(messages.pack_info_block_size(sizes))
        answers.append(messages.pack_info_export(export.size, agreed.export.flags))
        out = b"".join(messages.option_reply(number, nbd.REP_INFO, one) for one in answers)
        if sizes.minimum > 1 and not obedient:
            yield Send(out)
            yield from self._refuse(
                number,
                nbd.REP_ERR_BLOCK_SIZE_REQD,
                "request NBD_INFO_BLOCK_SIZE to use this export",
            )
            return None
        yield Send(out + messages.option_reply(number, nbd.REP_ACK))
        return agreed if number == nbd.OPT_GO else None

    def _query_contexts(self, number: int, data: bytes) -> Negotiation[None]:
        selecting = number == nbd.OPT_SET_META_CONTEXT
        if selecting:
            self._contexts = {}
            if self._style is Style.SIMPLE:
                raise Malformed("Structured replies have to be negotiated first")
        request = messages.unpack_query_request(data)
        export = self._exports.find(request.export)
        if export is None:
            yield from self._unknown(number, request.export)
            return
        chosen = [
            (index, name)
            for index, name in enumerate(export.contexts)
            if (not request.queries and not selecting)
            or any(_asks_for(query, name, selecting) for query in request.queries)
        ]
        for index, name in chosen:
            # The numbers that are listed mean nothing: they are to be 0.
            data = messages.pack_meta_context(index if selecting else 0, name)
            yield Send(messages.option_reply(number, nbd.REP_META_CONTEXT, data))
        yield Send(messages.option_reply(number, nbd.REP_ACK))
        if selecting:
            self._contexts = {name: index for index, name in chosen}
            self._contexts_of = export.name

    def _unknown(self, number: int, name: str) -> Negotiation[None]:
        shown = name if len(name) < _LONG_NAME else f"{name[:_LONG_NAME]}..."
        yield from self._refuse(number, nbd.REP_ERR_UNKNOWN, f"export '{shown}' not present")

    def _agreement(self, export: Description) -> Agreement:
        flags = export.flags | nbd.HAS_FLAGS
        contexts = self._contexts if self._contexts_of == export.name else {}
        if self._style is not Style.SIMPLE:
            flags |= nbd.SEND_DF
        if self._style is Style.EXTENDED and export.contexts:
            flags |= nbd.BLOCK_STATUS_PAYLOAD
        return Agreement(replace(export, flags=flags), self._style, dict(contexts))


def _asks_for(query: str, context: str, selecting: bool) -> bool:
    """Whether ``query`` means ``context``: by its name or, in lists, by the beginning of it."""
    if query == context:
        return True
    return not selecting and query.endswith(":") and context.startswith(query)


def _named(number: int) -> str:
    return f"{number} ({nbd.name(nbd.OPTION_NAMES, number)})"
