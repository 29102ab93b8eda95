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

import os
import sys
from collections.abc import Callable, Mapping

from lamina.block import filenames, registry
from lamina.block.keyvalue import flatten, subset
from lamina.block.node import Node, NodeOptions
from lamina.block.options import Spec, Type, convert, parse
from lamina.block.policy import Policy, check_format, check_named
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.driver import Driver
    from lamina.block.secrets import Secrets
    from lamina.block.session import Session

_BOOLS = {
    "read-only": "read_only",
    "auto-read-only": "auto_read_only",
    "force-share": "force_share",
    "cache.direct": "direct",
    "cache.no-flush": "no_flush",
}
_DISCARD = {"off": False, "ignore": False, "on": True, "unmap": True}
_DETECT_ZEROES = ("off", "on", "unmap")


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
        file = self.child("file", options, _below_format(settings), chain)
        try:
            name = _probe(file)
            return self._open_driver(
                name, options, defaults, filename, chain=chain, file=file, probed=True
            )
        except BaseException:
            _close_unused(file)
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
                shown = shown_filename(driver, node, own, filename)
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
        below = _take(options, f"{role}.")
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


class Context:
    """What a driver sees while it opens a node: an ``OpenContext``."""

    def __init__(
        self,
        opener: Opener,
        driver: Driver,
        settings: NodeOptions,
        image_option: Mapping[str, Any],
        rest: dict[str, Any],
        chain: tuple[str, ...],
    ) -> None:
        self.node_options = settings
        self.secrets: Secrets = opener.session.secrets
        self.objects: Mapping[str, object] = opener.session.objects
        self.warn = opener.session.warn
        self.inspect = opener.inspect
        self.locked = opener.locked or opener.inspect
        self.check = opener.check
        self.image_option = image_option
        self.opened: dict[str, Node] = {}
        self._opener = opener
        self._driver = driver
        self._rest = rest
        self._chain = chain

    def open_child(
        self,
        role: str,
        *,
        node_options: NodeOptions | None = None,
        filename: str | None = None,
    ) -> Node:
        ready = self.opened.get(role)
        if ready is None:
            defaults = node_options or self._child_defaults()
            ready = self._opener.child(role, self._rest, defaults, self._chain, filename)
            self.opened[role] = ready
        return ready

    def _child_defaults(self) -> NodeOptions:
        if self._driver.is_format:
            return _below_format(self.node_options)
        return replace(self.node_options, node_name="", filename="", probed=False)

    def take_options(self, prefix: str) -> dict[str, Any]:
        return _take(self._rest, prefix)

    def open_named(
        self,
        role: str,
        filename: str,
        *,
        driver: str | None,
        relative_to: Node,
        part: bool = False,
        plain: bool = False,
    ) -> Node | None:
        if self._rest.get(role, "") is None:
            del self._rest[role]
            return None
        inspecting = self._opener.inspect
        if part:
            inspecting &= self._opener.session.policy is Policy.DENY
            filename = filenames.plain_name(filename)
        if role in self._rest and not inspecting:
            reference = self._rest.pop(role)
            return self._prefixed(role, lambda: self._opener.session.node(str(reference)))
        if inspecting and role != "backing":
            # What is not opened cannot be wrong.
            self._rest.pop(role, None)
            _take(self._rest, f"{role}.")
        if inspecting or (role == "backing" and not self._opener.backing):
            return None
        explicit = _take(self._rest, f"{role}.")
        node = self._prefixed(
            role, lambda: self._open_named(role, filename, driver, relative_to, explicit, plain)
        )
        if node is not None:
            self.opened[role] = node
        return node

    def create_part(self, role: str, filename: str, *, relative_to: Node) -> Node:
        full = filenames.full_backing_filename(relative_to, filenames.plain_name(filename))
        path = filenames.local_file(full)
        self._check_named(role, filename, path, relative_to)
        if path is None:
            raise ImageUnsupported("Only images in local files can get more of them")
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except OSError as error:
            raise StorageError.from_os_error(error, path=path) from None
        return self._opener.open(full, {}, _below_format(self.node_options), protocol=True)

    def _check_named(
        self, role: str, filename: str, path: str | None, relative_to: Node
    ) -> str | None:
        """Raises Refused unless ``path``, of what is named so, may be opened. Returns the path of
        the image."""
        storage = filenames.storage(relative_to)
        own_path = storage.filename if filenames.is_local(storage) else None
        what = role.removesuffix("-file")
        check_named(self._opener.session.policy, filename, what, path, own_path)
        return own_path

    def _open_named(
        self,
        role: str,
        filename: str,
        driver: str | None,
        relative_to: Node,
        explicit: dict[str, Any],
        plain: bool,
    ) -> Node | None:
        protocol = role != "backing"
        defaults = _below_format(self.node_options)
        if role == "backing":
            defaults = replace(self._child_defaults(), read_only=True, auto_read_only=False)
        user_says_where = any(
            key in ("file", "filename") or key.startswith("file.") for key in explicit
        )
        if user_says_where:
            return self._opener.open(None, explicit, defaults, protocol=protocol)
        if not filename:
            if not explicit:
                return None
            raise UsageError("Must specify either driver or file")
        if "\0" in filename:
            raise UsageError(f"The name of the {role} file contains a NUL byte")
        full = filename if plain else filenames.full_backing_filename(relative_to, filename)
        path = filename if plain else filenames.local_file(full)
        own_path = self._check_named(role, filename, path, relative_to)
        # A file of this image is no step down the chain: only backing files can lead back.
        chain = (*self._chain, _identity(relative_to.filename, own_path))
        if role == "backing" and _identity(full, path) in chain:
            raise UsageError(f"Backing file '{full}' creates an infinite loop.")
        if driver is not None:
            explicit.setdefault("driver", driver)
            if self._opener.session.policy is not Policy.ALLOW:
                check_format(driver, filename, role)
        if plain and "driver" not in explicit:
            explicit["driver"] = filenames.local_driver(filename)
            explicit["filename"] = filename
            return self._opener.open(None, explicit, defaults, chain=chain)
        full = filenames.plain_name(filename) if plain else full
        return self._opener.open(full, explicit, defaults, protocol=protocol, chain=chain)

    @staticmethod
    def _prefixed(role: str, action: Callable[[], Node | None]) -> Node | None:
        try:
            return action()
        except LaminaError as error:
            if role == "backing":
                error.in_context("Could not open backing file: ")
            raise

    def close_unused(self) -> None:
        """After a failure: what was opened for a node that did not come to be."""
        for node in self.opened.values():
            _close_unused(node)

    def refuse_leftovers(self) -> None:
        """Raises UsageError for options that nobody asked for."""
        for key in self._rest:
            if key.startswith("backing.") and not self._opener.inspect:
                raise UsageError("Driver doesn't support backing files", field=key)
            if registry.is_protocol(self._driver.name):
                text = f"Block protocol '{self._driver.name}' doesn't support the option '{key}'"
            else:
                text = f"Block format '{self._driver.name}' does not support the option '{key}'"
            raise UsageError(text, field=key)


# -- options -----------------------------------------------------------------------------------


def generic_options(
    options: dict[str, Any], defaults: NodeOptions
) -> tuple[NodeOptions, dict[str, Any]]:
    """The options that every node has, and the others."""
    changes: dict[str, Any] = {}
    for key, name in _BOOLS.items():
        if key in options:
            changes[name] = convert(Spec(key, Type.BOOL, ""), options.pop(key))
    if "node-name" in options:
        changes["node_name"] = str(options.pop("node-name"))
    if "discard" in options:
        word = options.pop("discard")
        if word not in _DISCARD:
            raise UsageError("Invalid discard option")
        changes["unmap"] = _DISCARD[word]
    if "detect-zeroes" in options:
        word = options.pop("detect-zeroes")
        if word not in _DETECT_ZEROES:
            raise UsageError(f"invalid parameter value: {word}")
        changes["detect_zeroes"] = word
    settings = replace(defaults, **changes)
    if settings.detect_zeroes == "unmap" and not settings.unmap:
        raise UsageError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation "
            "to unmap"
        )
    if settings.force_share and not settings.read_only:
        raise UsageError("force-share=on can only be used with read-only images")
    return settings, options


def _below_format(settings: NodeOptions) -> NodeOptions:
    """Defaults for a format's children: the format itself decides about discards and zeroes."""
    return replace(
        settings, node_name="", filename="", unmap=True, detect_zeroes="off", probed=False
    )


def _take(options: dict[str, Any], prefix: str) -> dict[str, Any]:
    found = subset(options, prefix)
    for key in found:
        del options[prefix + key]
    return found


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


def _close_unused(node: Node) -> None:
    if not node.users:
        node.close()


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


def _identity(filename: str, path: str | None) -> str:
    """Two names with the same identity open the same file."""
    return filename if path is None else os.path.realpath(path)


def shown_filename(
    driver: Driver, node: Node, own: Mapping[str, Any], filename: str | None
) -> str:
    """The name of ``node``: plain where a plain name opens the same, else ``json:{…}``."""
    strong = {key: value for key, value in own.items() if key in driver.strong_options}
    if registry.is_protocol(driver.name):
        if isinstance(own.get("filename"), str):
            return str(own["filename"])
        return driver.plain_filename(strong) or filenames.json_filename(
            {"driver": driver.name, **strong}
        )
    file = node.child("file")
    if file is None:
        return filename or ""
    on_storage = registry.is_protocol(file.driver) and not filenames.is_json(file.filename)
    if driver.is_format and on_storage and not strong:
        return file.filename
    below = {f"file.{key}": value for key, value in filenames.description(file).items()}
    return filenames.json_filename({**strong, "driver": driver.name, **below})
