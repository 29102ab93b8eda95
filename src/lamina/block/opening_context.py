"""What a driver sees while it opens a node: the children that the user describes, and those that
the image names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from lamina.block import filenames, registry
from lamina.block.generic_options import below_format
from lamina.block.keyvalue import take
from lamina.block.node import Node, NodeOptions
from lamina.block.policy import Policy, check_format, check_named
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.hints import TYPE_CHECKING, Any
from lamina.records import replace

if TYPE_CHECKING:
    from lamina.block.driver import Driver
    from lamina.block.opening import Opener
    from lamina.block.secrets import Secrets


class Context:
    """The ``OpenContext`` of one node."""

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
            return below_format(self.node_options)
        return replace(self.node_options, node_name="", filename="", probed=False)

    def take_options(self, prefix: str) -> dict[str, Any]:
        return take(self._rest, prefix)

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
            take(self._rest, f"{role}.")
        if inspecting or (role == "backing" and not self._opener.backing):
            return None
        explicit = take(self._rest, f"{role}.")
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
        return self._opener.open(full, {}, below_format(self.node_options), protocol=True)

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
        defaults = below_format(self.node_options)
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
            node.close_unused()

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


def _identity(filename: str, path: str | None) -> str:
    """Two names with the same identity open the same file."""
    return filename if path is None else os.path.realpath(path)
