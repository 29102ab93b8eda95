"""The command line."""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import dataclass
from lamina.tools.arguments import GetoptError, Option, Parsed, parse
from lamina.tools.tool import EXIT_FAILURE, EXIT_OK

if TYPE_CHECKING:
    from lamina.tools.tool import Tool

_MAX_STRING = 4096
_DISCARD = ("ignore", "off", "unmap", "on")
_AIO = ("threads", "native", "io_uring")
_DETECT_ZEROES = ("off", "on", "unmap")
_ONCE = ("discard", "detect-zeroes", "aio")


def _export_name(text: str) -> str:
    return _short(text, "name")


def _description(text: str) -> str:
    return _short(text, "description")


def _short(text: str, what: str) -> str:
    if len(text.encode("utf-8", "surrogateescape")) > _MAX_STRING:
        raise UsageError(f"export {what} '{text}' too long")
    return text


def _socket(text: str) -> str:
    if not text.startswith("/"):
        raise UsageError("socket path must be absolute")
    return text


def _shared(text: str) -> int:
    return _count(text, "shared device number")


def _handshake_limit(text: str) -> int:
    return _count(text, "handshake limit")


def _offset(text: str) -> str:
    digits = text.removeprefix("-").removeprefix("+")
    if not (digits.isascii() and digits.isdigit()):
        raise UsageError(f"Invalid offset '{text}'")
    return text


def _count(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 31:
        raise UsageError(f"Invalid {what} '{text}'")
    return int(text)


def _word(choices: tuple[str, ...], trouble: str) -> Any:
    def read(text: str) -> str:
        if text not in choices:
            raise UsageError(trouble.format(text))
        return text

    return read


def _cache(text: str) -> str:
    from lamina.block.cache_modes import cache_mode

    try:
        cache_mode(text)
    except UsageError:
        raise UsageError(f"Invalid cache mode `{text}'") from None
    return text


OPTIONS = (
    Option("h", "help", help="show this help and exit"),
    Option("V", "version", help="show the version and exit"),
    Option("p", "port", "PORT", "TCP port to listen on (10809)"),
    Option("b", "bind", "IFACE", "address to listen on (0.0.0.0)"),
    Option("k", "socket", "PATH", "Unix socket to listen on, instead of TCP", _socket),
    Option("e", "shared", "NUM", "clients at a time (1); 0: any number", _shared),
    Option("t", "persistent", help="go on after the last client has left"),
    Option("v", "verbose", help="with --fork: go on telling what happens"),
    Option("x", "export-name", "NAME", "name of the export (empty)", _export_name),
    Option("D", "description", "TEXT", "what the export is, for people", _description),
    Option(
        "",
        "handshake-limit",
        "SECONDS",
        "how long a handshake may take (10); 0: for ever",
        _handshake_limit,
    ),
    Option("o", "offset", "OFFSET", "serve what begins there, in bytes", _offset),
    Option("A", "allocation-depth", help="tell clients which layer holds what"),
    Option("B", "bitmap", "NAME", "tell clients what a dirty bitmap of the image says"),
    Option("L", "list", help="list the exports of another server"),
    Option("", "object", "OBJDEF", "an object that is needed, as TYPE,id=ID,…"),
    Option("", "tls-creds", "ID", "serve under TLS only, with the credentials of that object"),
    Option("", "tls-authz", "ID", "the object that says which clients may connect"),
    Option("", "tls-hostname", "NAME", "with -L: what the certificate has to be for"),
    Option("T", "trace", "TRACE", "accepted as QEMU's tools do; there is nothing to trace"),
    Option("", "fork", help="return as soon as the server serves, which goes on"),
    Option("", "pid-file", "PATH", "write the server's process id there"),
    Option("", "selinux-label", "LABEL", "of the listening socket"),
    Option("c", "connect", "DEV", "serve to the kernel, as the device DEV"),
    Option("d", "disconnect", help="disconnect the device that is given"),
    Option("f", "format", "FMT", "format of the image; found out by looking if not given"),
    Option("r", "read-only", help="let nobody write"),
    Option("s", "snapshot", help="write to a temporary file, and forget it at the end"),
    Option("l", "load-snapshot", "SNAPSHOT", "serve an internal snapshot, for reading"),
    Option("n", "nocache", help="keep out of the host's page cache, as --cache=none"),
    Option(
        "", "cache", "MODE", "none, writeback (default), writethrough, directsync, unsafe", _cache
    ),
    Option("", "aio", "MODE", "threads, native or io_uring", _word(_AIO, "Invalid aio mode '{}'")),
    Option(
        "",
        "discard",
        "MODE",
        "whether discards reach the storage: unmap or ignore",
        _word(_DISCARD, "Invalid discard mode `{}'"),
    ),
    Option(
        "",
        "detect-zeroes",
        "MODE",
        "whether zeroes are written as such: off, on, unmap",
        _word(
            _DETECT_ZEROES, "Failed to parse detect_zeroes mode: invalid parameter value: {}"
        ),
    ),
    Option("", "image-opts", help="FILE is a list of options (driver=…,…) instead of a file name"),
)


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    image: str = ""
    port: str | None = None
    bind: str | None = None
    socket: str | None = None
    shared: int = 1
    persistent: bool = False
    verbose: bool = False
    name: str = ""
    description: str = ""
    handshake_limit: int = 10
    offset: str | None = None
    allocation_depth: bool = False
    bitmap: str | None = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    tls_hostname: str | None = None
    fork: bool = False
    pid_file: str | None = None
    device: str | None = None
    format: str | None = None
    read_only: bool = False
    temporary: bool = False
    """Writes go to a temporary overlay."""
    snapshot: str | None = None
    cache: str = "writeback"
    aio: str | None = None
    discard: str | None = None
    detect_zeroes: str | None = None
    image_opts: bool = False


def run(arguments: list[str], tool: Tool) -> int:
    try:
        given = parse(arguments, OPTIONS, stop_at=("help", "version"))
    except GetoptError as error:
        tool.error(error)
        tool.error(f"Try `{tool.name} --help' for more information.")
        return EXIT_FAILURE
    if given.flag("help"):
        _usage(tool)
        return EXIT_OK
    if given.flag("version"):
        from lamina.tools.version import version_line

        print(version_line(tool))
        return EXIT_OK
    _check(given)
    listing = given.flag("list")
    if listing:
        if given.operands:
            raise UsageError("List mode is incompatible with a file name")
        if any(given.flag(key) for key in ("connect", "disconnect")):
            raise UsageError("List mode is incompatible with per-device settings")
    elif len(given.operands) != 1:
        tool.error("Invalid number of arguments")
        tool.hint(f"Try `{tool.name} --help' for more information.")
        return EXIT_FAILURE
    if given.flag("disconnect"):
        from lamina.tools.nbd.device import disconnect

        disconnect(given.operands[0])
        return EXIT_OK
    if given.flag("load-snapshot"):
        _check_snapshot(tool, given.value("load-snapshot"))
    for text in given.values("object"):
        from lamina.tools.objects import add_object

        add_object(tool, text)
    settings = _settings(given)
    if listing:
        from lamina.tools.nbd.listing import list_exports

        return list_exports(tool, settings)
    from lamina.tools.nbd.serving import serve

    return serve(tool, settings)


def _check(given: Parsed) -> None:
    """Raises UsageError for options that do not go together."""
    if len(given.values("nocache")) + len(given.values("cache")) > 1:
        raise UsageError("-n and --cache can only be specified once")
    for key in _ONCE:
        if len(given.values(key)) > 1:
            raise UsageError(f"--{key} can only be specified once")
    if given.value("detect-zeroes") == "unmap" and given.value("discard") not in ("unmap", "on"):
        raise UsageError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation "
            "to unmap"
        )
    if given.flag("image-opts") and given.flag("format"):
        raise UsageError("--image-opts and -f are mutually exclusive")
    if given.flag("tls-creds"):
        if given.flag("tls-hostname") and not given.flag("list"):
            raise UsageError("TLS hostname is only supported with export list")
        if given.flag("tls-authz") and given.flag("list"):
            raise UsageError("TLS authorization is incompatible with export list")
    else:
        for key in ("tls-authz", "tls-hostname"):
            if given.flag(key):
                raise UsageError(f"--{key} is not permitted without --tls-creds")
    if given.flag("tls-creds") and given.flag("connect"):
        raise UsageError("TLS is not supported with a host device")
    if given.flag("selinux-label"):
        raise UsageError("SELinux support not enabled in this binary")


def _check_snapshot(tool: Tool, text: str) -> None:
    """Raises UsageError for ``snapshot.…`` that is neither an id nor a name."""
    from lamina.block.keyvalue import parse_keyvalue

    if not text.startswith("snapshot."):
        return
    for key in parse_keyvalue(text):
        if key not in ("snapshot.id", "snapshot.name"):
            tool.error(f"Invalid parameter '{key}'")
            raise UsageError(f"Failed in parsing snapshot param `{text}'")


def _settings(given: Parsed) -> Settings:
    return Settings(
        image=given.operands[0] if given.operands else "",
        port=given.value("port"),
        bind=given.value("bind"),
        socket=given.value("socket"),
        shared=given.value("shared", 1),
        persistent=given.flag("persistent"),
        verbose=given.flag("verbose"),
        name=given.value("export-name", ""),
        description=given.value("description", ""),
        handshake_limit=given.value("handshake-limit", 10),
        offset=given.value("offset"),
        allocation_depth=given.flag("allocation-depth"),
        bitmap=given.value("bitmap"),
        tls_creds=given.value("tls-creds"),
        tls_authz=given.value("tls-authz"),
        tls_hostname=given.value("tls-hostname"),
        fork=given.flag("fork"),
        pid_file=given.value("pid-file"),
        device=given.value("connect"),
        format=given.value("format"),
        read_only=given.flag("read-only") or given.flag("load-snapshot"),
        temporary=given.flag("snapshot"),
        snapshot=given.value("load-snapshot"),
        cache="none" if given.flag("nocache") else given.value("cache", "writeback"),
        aio=given.value("aio"),
        discard=given.value("discard"),
        detect_zeroes=given.value("detect-zeroes"),
        image_opts=given.flag("image-opts"),
    )


def _usage(tool: Tool) -> None:
    lines = [
        f"Usage: {tool.name} [OPTIONS] FILE",
        f"  or:  {tool.name} -L [OPTIONS]",
        "Serve the disk in FILE over NBD, or list the exports of another server.",
        "",
    ]
    for option in OPTIONS:
        names = f"-{option.short}, " if option.short else "    "
        names += f"--{option.long}" + (f"={option.argument}" if option.argument else "")
        lines.append(f"  {names:<27} {option.help}")
    print("\n".join(lines))
