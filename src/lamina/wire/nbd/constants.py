"""The numbers of the protocol (section "Values"), and the names that messages call them by."""

from __future__ import annotations

import errno

from lamina.hints import Final

PORT: Final = 10809

# -- handshake -------------------------------------------------------------------------------------

INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

# Handshake flags of the server, and the same bits in the client's answer.
FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_PEEK_EXPORT: Final = 4
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

OPTION_NAMES: Final = {
    OPT_EXPORT_NAME: "export name",
    OPT_ABORT: "abort",
    OPT_LIST: "list",
    OPT_PEEK_EXPORT: "peek export",
    OPT_STARTTLS: "starttls",
    OPT_INFO: "info",
    OPT_GO: "go",
    OPT_STRUCTURED_REPLY: "structured reply",
    OPT_LIST_META_CONTEXT: "list meta context",
    OPT_SET_META_CONTEXT: "set meta context",
    OPT_EXTENDED_HEADERS: "extended headers",
}

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR: Final = 1 << 31
"""The bit that all errors have."""
REP_ERR_UNSUP: Final = REP_ERROR + 1
REP_ERR_POLICY: Final = REP_ERROR + 2
REP_ERR_INVALID: Final = REP_ERROR + 3
REP_ERR_PLATFORM: Final = REP_ERROR + 4
REP_ERR_TLS_REQD: Final = REP_ERROR + 5
REP_ERR_UNKNOWN: Final = REP_ERROR + 6
REP_ERR_SHUTDOWN: Final = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERROR + 8
REP_ERR_TOO_BIG: Final = REP_ERROR + 9
REP_ERR_EXT_HEADER_REQD: Final = REP_ERROR + 10

REPLY_NAMES: Final = {
    REP_ACK: "ack",
    REP_SERVER: "server",
    REP_INFO: "info",
    REP_META_CONTEXT: "meta context",
    REP_ERR_UNSUP: "unsupported",
    REP_ERR_POLICY: "denied by policy",
    REP_ERR_INVALID: "invalid",
    REP_ERR_PLATFORM: "platform lacks support",
    REP_ERR_TLS_REQD: "TLS required",
    REP_ERR_UNKNOWN: "export unknown",
    REP_ERR_SHUTDOWN: "server shutting down",
    REP_ERR_BLOCK_SIZE_REQD: "block size required",
    REP_ERR_TOO_BIG: "option payload too big",
    REP_ERR_EXT_HEADER_REQD: "extended headers required",
}

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

INFO_NAMES: Final = {
    INFO_EXPORT: "export",
    INFO_NAME: "name",
    INFO_DESCRIPTION: "description",
    INFO_BLOCK_SIZE: "block size",
}

# -- transmission ----------------------------------------------------------------------------------

HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
ROTATIONAL: Final = 1 << 4
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_RESIZE: Final = 1 << 9
SEND_CACHE: Final = 1 << 10
SEND_FAST_ZERO: Final = 1 << 11
BLOCK_STATUS_PAYLOAD: Final = 1 << 12

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7
CMD_RESIZE: Final = 8

COMMAND_NAMES: Final = {
    CMD_READ: "read",
    CMD_WRITE: "write",
    CMD_DISC: "disconnect",
    CMD_FLUSH: "flush",
    CMD_TRIM: "trim",
    CMD_CACHE: "cache",
    CMD_WRITE_ZEROES: "write zeroes",
    CMD_BLOCK_STATUS: "block status",
    CMD_RESIZE: "resize",
}

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

REPLY_FLAG_DONE: Final = 1

CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_BLOCK_STATUS_EXT: Final = 6
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT + 1
CHUNK_ERROR_OFFSET: Final = CHUNK_ERROR_BIT + 2

BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1
"""base:allocation: no space is taken."""
STATE_ZERO: Final = 2
"""base:allocation: reads as zeroes."""

# -- limits ----------------------------------------------------------------------------------------

MAX_STRING: Final = 4096
"""Bytes of an export name, a context name, an error message."""
MAX_PAYLOAD: Final = 32 << 20
"""Bytes of data in one message, where the server advertises nothing else."""
MAX_DESCRIPTORS: Final = 1 << 20
"""Extents in one chunk of a block status reply."""

# -- errors ----------------------------------------------------------------------------------------

EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

_TO_HOST: Final = {
    EPERM: errno.EPERM,
    EIO: errno.EIO,
    ENOMEM: errno.ENOMEM,
    EINVAL: errno.EINVAL,
    ENOSPC: errno.ENOSPC,
    EOVERFLOW: errno.EOVERFLOW,
    ENOTSUP: errno.ENOTSUP,
    ESHUTDOWN: errno.ESHUTDOWN,
}
_TO_WIRE: Final = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.ENOSPC: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.ENOTSUP: ENOTSUP,
    errno.EOPNOTSUPP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
}


def to_errno(number: int) -> int:
    """The host's number for an error on the wire; EINVAL for one that the protocol lacks."""
    return _TO_HOST.get(number, errno.EINVAL)


def from_errno(number: int) -> int:
    """The error on the wire that says ``number`` of the host best."""
    return _TO_WIRE.get(number, EINVAL)


def name(names: dict[int, str], number: int) -> str:
    """How messages speak of ``number``."""
    return names.get(number, "<unknown>")
