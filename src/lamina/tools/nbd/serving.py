"""Opening the image and serving it."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from lamina.block.sockets import SocketAddress, listen
from lamina.block.tls import Authorization, TlsCredentials
from lamina.errors import LaminaError, StorageError, UsageError
from lamina.exports.nbd import Export, Limits, Server
from lamina.exports.nbd.contexts import BitmapContext, Context, DepthContext, find_bitmap
from lamina.hints import TYPE_CHECKING
from lamina.tools.nbd.daemon import Daemon
from lamina.tools.opening import load_snapshot, open_image
from lamina.tools.tool import EXIT_OK
from lamina.wire.nbd.constants import PORT

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.tools.nbd.command import Settings
    from lamina.tools.tool import Tool

_BACKLOG = 1024
_FIRST_PASSED = 3
"""Number of the first descriptor that a service manager passes on."""


def serve(tool: Tool, settings: Settings) -> int:
    tls = credentials(tool, settings.tls_creds, "server")
    authorization = _authorization(tool, settings.tls_authz)
    context = tls.context() if tls else None
    passed = _passed_sockets(tool)
    with ExitStack() as cleanup:
        daemon = Daemon(
            fork=settings.fork, pid_file=settings.pid_file, talkative=settings.verbose
        )
        sockets: list[socket.socket] = []
        if passed:
            sockets = passed
        elif settings.device is None:
            address = server_address(settings)
            sockets = listen(address, _BACKLOG)
            if address.type == "unix":
                cleanup.callback(_remove, address.path)
        backend = cleanup.enter_context(_open(tool, settings))
        export = Export(
            backend,
            name=settings.name,
            text=settings.description,
            read_only=settings.read_only,
            multi_conn=settings.shared != 1,
            contexts=_contexts(backend, settings),
        )

        def ended(served: bool) -> None:
            if served and not settings.persistent and not server.connections:
                daemon.stop()

        server = Server(
            limits=Limits(settings.shared, settings.handshake_limit),
            tls=context,
            authorization=authorization,
            log=tool.error,
            on_end=ended,
        )
        cleanup.enter_context(server)
        server.add_export(export)
        if settings.device is not None:
            from lamina.tools.nbd.device import attach

            cleanup.enter_context(attach(settings.device, server, export, daemon.stop))
        server.listen(sockets)
        daemon.ready()
        daemon.wait()
    return EXIT_OK


def credentials(tool: Tool, name: str | None, endpoint: str) -> TlsCredentials | None:
    """The object of that id. Raises UsageError."""
    if name is None:
        return None
    found = tool.session.objects.get(name)
    if found is None:
        raise UsageError(f"Failed to get TLS creds: No TLS credentials with id '{name}'")
    if not isinstance(found, TlsCredentials):
        raise UsageError(
            f"Failed to get TLS creds: Object with id '{name}' is not TLS credentials"
        )
    if found.endpoint != endpoint:
        raise UsageError(
            f"Failed to get TLS creds: Expected TLS credentials for a {endpoint} endpoint"
        )
    return found


def _authorization(tool: Tool, name: str | None) -> Authorization | None:
    if name is None:
        return None
    found = tool.session.objects.get(name)
    if not isinstance(found, Authorization):
        raise UsageError(f"No authorization object with id '{name}'")
    return found


def _passed_sockets(tool: Tool) -> list[socket.socket]:
    """Listening sockets of systemd's socket activation. Raises UsageError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(os.environ.get("LISTEN_FDS", "0"))
    except ValueError:
        return []
    if count > 1:
        raise UsageError(f"{tool.name} does not support socket activation with LISTEN_FDS > 1")
    found = []
    for fd in range(_FIRST_PASSED, _FIRST_PASSED + count):
        try:
            found.append(socket.socket(fileno=fd))
        except OSError as error:
            raise UsageError(
                f"Socket activation failed: invalid file descriptor fd = {fd}: {error.strerror}"
            ) from None
        os.set_inheritable(fd, False)
    return found


def server_address(settings: Settings) -> SocketAddress:
    """Where to listen, or to connect to."""
    if settings.socket is not None:
        return SocketAddress("unix", path=settings.socket)
    return SocketAddress("inet", settings.bind or "0.0.0.0", settings.port or str(PORT))


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError.from_os_error(error, path=path) from None


# -- the image -------------------------------------------------------------------------------------


def _open(tool: Tool, settings: Settings) -> Backend:
    prefix = f"Failed to blk_new_open '{settings.image}': "
    options = {} if settings.aio is None else {"file.aio": settings.aio}
    if settings.temporary:
        from lamina.tools.io.files import How
        from lamina.tools.io.temporary import open_with_overlay

        how = How(
            read_only=settings.read_only,
            cache=settings.cache,
            discard=settings.discard,
            format=settings.format,
        )
        try:
            backend = open_with_overlay(tool.session, settings.image, how, options)
        except LaminaError as error:
            raise error.in_context(prefix) from None
    else:
        backend = open_image(
            tool,
            settings.image,
            format=settings.format,
            image_opts=settings.image_opts,
            prefix=prefix,
            writable=not settings.read_only,
            cache=settings.cache,
            discard=settings.discard,
            detect_zeroes=settings.detect_zeroes,
            options=options,
        )
    try:
        if settings.offset is not None:
            backend = _from_offset(tool, backend, settings)
        if settings.snapshot is not None:
            try:
                load_snapshot(backend, settings.snapshot)
            except LaminaError as error:
                raise error.in_context("Failed to load snapshot: ") from None
    except BaseException:
        backend.close()
        raise
    return backend


def _from_offset(tool: Tool, below: Backend, settings: Settings) -> Backend:
    """What begins at the offset, as a window upon the image."""
    from lamina.block.backend import Backend

    session = tool.session
    session.add_node(below.node)
    with below:
        return Backend.open(
            {"driver": "raw", "file": below.node.name, "offset": settings.offset},
            session=session,
            writable=not settings.read_only,
            cache=settings.cache,
            discard=settings.discard,
            detect_zeroes=settings.detect_zeroes,
        )


def _contexts(backend: Backend, settings: Settings) -> list[Context]:
    found: list[Context] = []
    if settings.allocation_depth:
        found.append(DepthContext(backend.node))
    if settings.bitmap is not None:
        found.append(
            BitmapContext(
                find_bitmap(backend.node, settings.bitmap, read_only=settings.read_only)
            )
        )
    return found
