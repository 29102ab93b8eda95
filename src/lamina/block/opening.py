"""Opening: from a name or a set of options to a graph of nodes.

The user says what to open in one of three ways: a file name (``disk.qcow2``, ``nbd://host/disk``,
``file:a:b``), options (``driver=raw,file.filename=…``, dotted or nested), or options written as a
file name (``json:{…}``). A name alone means: the protocol that the name asks for, below the format
that the first bytes suggest.

Two levels are told apart. At the *protocol* level a name stands for storage, and nothing is probed:
so every format opens its ``file``. At the *image* level a name stands for a disk: so users and
backing files are opened. Each node takes the generic options (read-only, cache, …) that were not
given for it from the node above.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from lamina.block import filenames, registry
from lamina.block.generic_options import below_format, generic_options
from lamina.block.keyvalue import flatten, take
from lamina.block.node import Node, NodeOptions
from lamina.block.opening_context import Context
from lamina.block.options import parse
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.session import Session

def open_node(
    reference: str | Mapping[str, Any],
    *,
    session: Session,
    defaults: NodeOptions,
    options: Mapping[str, Any] | None = None,
    protocol: bool = False,
    inspect: bool = False,
    locked: bool = False,
    check: bool = False,
    backing: bool = True,
) -> Node:
    """Open a file name or a set of options; nobody uses the node yet.

    ``defaults`` are the generic options for nodes that do not say otherwise; ``options`` are merged
    with (and win over) those of ``reference``. With ``protocol`` nothing is probed and no format is
    put on top. ``inspect``, ``locked`` and ``check`` are those of ``OpenContext``. Without
    ``backing`` the image is opened without its backing file.
    """
    opener = Opener(
        session, inspect=inspect, locked=locked, check=check, backing=backing
    )
    given = flatten(options or {})
    if isinstance(reference, str):
        return opener.open(reference, given, defaults, protocol=protocol)
    return opener.open(None, {**flatten(reference), **given}, defaults, protocol=protocol)


class Opener:
    """One request to open something, with what all of its nodes have in common."""

    def __init__(
        self, session: Session, *, inspect: bool, locked: bool, check: bool, backing: bool
    ) -> None:
        self.session = session
        self.inspect = inspect
        self.locked = locked
        self.check = check
        self.backing = backing
        self._depth = 0
        self._nesting = 0

    def open(
        self,
        filename: str | None,
        options: dict[str, Any],
        defaults: NodeOptions,
        *,
        protocol: bool = False,
        chain: tuple[str, ...] = (),
    ) -> Node:
        """``options`` are dotted and taken over by the callee; ``chain`` names the overlays."""
        self._depth += 1
        try:
            _make_room(self._depth)
            return self._open(filename, options, defaults, protocol, chain)
        finally:
            self._depth -= 1

    def _open(
        self,
        filename: str | None,
        options: dict[str, Any],
        defaults: NodeOptions,
        protocol: bool,
        chain: tuple[str, ...],
    ) -> Node:
        if filename is not None and filenames.is_json(filename):
            options = {**filenames.parse_json(filename), **options}
            filename = None
        if protocol and filename is None and "driver" not in options and "filename" in options:
            # Only names by themselves have prefixes: among options, a name is that of a file.
            options["driver"] = filenames.local_driver(str(options["filename"]))
        name = options.pop("driver", None)
        if isinstance(name, str):
            return self._open_known(name, filename, options, defaults, chain)
        if protocol:
            name, options = _protocol(filename, options)
            return self._open_driver(name, options, defaults, filename, chain=chain)
        return self._open_probed(filename, options, defaults, chain)

    def _open_known(
        self,
        name: str,
        filename: str | None,
        options: dict[str, Any],
        defaults: NodeOptions,
        chain: tuple[str, ...],
    ) -> Node:
        driver = registry.driver(name)
        if filename is None:
            return self._open_driver(name, options, defaults, None, chain=chain)
        if registry.is_protocol(name):
            options = {**driver.parse_filename(filename), **options}
            return self._open_driver(name, options, defaults, filename, chain=chain)
        _name_child(options, filename)
        return self._open_driver(name, options, defaults, filename, chain=chain)

    def _open_probed(
        self,
        filename: str | None,
        options: dict[str, Any],
        defaults: NodeOptions,
        chain: tuple[str, ...],
    ) -> Node:
        """A format on top of its storage, by what the storage holds."""
        if filename is None and not any(k == "file" or k.startswith("file.") for k in options):
            raise UsageError("Must specify either driver or file")
        if filename is not None:
            _name_child(options, filename)
        settings, _ = generic_options(dict(options), defaults)
        file = self.child("file", options, below_format(settings), chain)
        try:
            name = _probe(file)
            return self._open_driver(
                name, options, defaults, filename, chain=chain, file=file, probed=True
            )
        except BaseException:
            file.close_unused()
            raise

    def _open_driver(
        self,
        name: str,
        options: dict[str, Any],
        defaults: NodeOptions,
        filename: str | None,
        *,
        chain: tuple[str, ...],
        file: Node | None = None,
        probed: bool = False,
    ) -> Node:
        driver = registry.driver(name)
        settings, options = generic_options(options, defaults)
        if settings.node_name:
            self.session.check_name(settings.node_name)
        shown = options.get("filename") or (file.filename if file else filename) or ""
        settings = replace(settings, filename=str(shown), probed=probed)
        parsed: Any
        parsed, rest = parse(driver.Options, options)
        own = {key: value for key, value in options.items() if key not in rest}
        context = Context(self, driver, settings, {**options}, rest, chain)
        if file is not None:
            context.opened["file"] = file
        try:
            node = driver.open(parsed, context)
        except BaseException:
            context.close_unused()
            raise
        try:
            context.refuse_leftovers()
            if type(node).filename is Node.filename:
                shown = filenames.shown_filename(driver, node, own, filename)
                node.options = replace(node.options, filename=shown)
            if settings.node_name:
                self.session.add_node(node)
        except BaseException:
            node.close()
            raise
        return node

    def child(
        self,
        role: str,
        options: dict[str, Any],
        defaults: NodeOptions,
        chain: tuple[str, ...],
        filename: str | None = None,
    ) -> Node:
        """The child that ``options`` describe under ``role``; takes these keys out of them.

        ``filename``: what to open, with those options, where they do not say it themselves.
        """
        reference = options.pop(role, None)
        below = take(options, f"{role}.")
        if reference is not None:
            if below:
                raise UsageError(
                    "Cannot reference an existing block device with additional options "
                    "or a new filename"
                )
            return self.session.node(str(reference))
        if not below and filename is None:
            raise UsageError(f'A block device must be specified for "{role}"')
        if self._nesting == MAX_NESTING:
            raise UsageError("The options are nested too deep")
        self._nesting += 1
        try:
            return self.open(filename, below, defaults, protocol=True, chain=chain)
        finally:
            self._nesting -= 1


def _name_child(options: dict[str, Any], filename: str) -> None:
    """Let ``file`` be what ``filename`` asks for; options given for it win."""
    if "file" in options:
        raise UsageError(
            "Cannot reference an existing block device with additional options or a new filename"
        )
    if "file.filename" in options:
        raise UsageError("Can't specify 'file' and 'filename' options at the same time")
    for key, value in filenames.protocol_options(filename).items():
        options.setdefault(f"file.{key}", value)


def _protocol(filename: Any, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if filename is None:
        raise UsageError("Must specify either driver or file")
    found = {**filenames.protocol_options(str(filename)), **options}
    return found.pop("driver"), found


# -- what is there -------------------------------------------------------------------------------


def _probe(file: Node) -> str:
    from lamina.block.probing import PROBE_SIZE, probe

    try:
        head = file.read(0, min(PROBE_SIZE, file.size))
    except LaminaError as error:
        raise error.in_context("Could not read image for determining its format: ") from None
    name = probe(head, file.filename)
    if not registry.is_known(name):
        raise UsageError(f"The image is in the format '{name}', which has no driver here")
    return name


MAX_CHAIN = 1000
"""Images, one upon the other. QEMU ends where it runs out of file descriptors, a bit above."""
MAX_NESTING = 64
"""Nodes between an image and its storage."""
_USUAL_CHAIN = 16
_FRAMES_PER_IMAGE = 32


def _make_room(depth: int) -> None:
    """Let Python call as deep as a long backing chain is: opening, reading, closing follow it.

    Raises UsageError if the chain is longer than anything sensible.
    """
    if depth > MAX_CHAIN + 1:  # the last image has its storage below it
        raise UsageError(f"The backing chain is longer than {MAX_CHAIN} images")
    if depth > _USUAL_CHAIN:
        needed = 1000 + depth * _FRAMES_PER_IMAGE
        if sys.getrecursionlimit() < needed:
            sys.setrecursionlimit(needed)
