"""What a driver is told when it is opened or asked to create an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lamina.hints import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lamina.block.node import Node, NodeOptions
    from lamina.block.secrets import Secrets


class OpenContext(Protocol):
    """Handed to ``Driver.open(options, context)``. Implemented by ``block.opening_context``."""

    node_options: NodeOptions
    """For ``Node.__init__``."""
    secrets: Secrets
    objects: Mapping[str, object]
    """Other objects that users made (``--object``), by their id."""
    warn: Callable[[str], None]
    """Tells people what no error can tell: what went wrong while closing, above all."""
    inspect: bool
    """Only metadata is wanted (``info``): open nothing that an image names, no data is read."""
    locked: bool
    """No data will be read: encrypted images stay locked, without their secrets."""
    check: bool
    """The image is opened to be checked or repaired: tolerate what can be."""
    image_option: Mapping[str, Any]
    """The options of this node as given, children's included, flattened to dotted keys."""

    def open_child(
        self,
        role: str,
        *,
        node_options: NodeOptions | None = None,
        filename: str | None = None,
    ) -> Node:
        """Open the child that the options describe under ``role`` (``file`` above all).

        ``filename``: what to open, with those options, where they do not say it themselves.
        """

    def take_options(self, prefix: str) -> dict[str, Any]:
        """The options whose keys begin with ``prefix``, without it: for lists and other options
        that are no fields of ``Driver.Options`` (``inject-error.0.event``). An option that nobody
        takes is refused."""

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
        """Open what an image *names* (backing file, data file, extent): passes the opening policy.

        ``filename`` as stored; ``driver`` as stored or None to probe. ``part``: the name is that of
        a local file without which the image says nothing of itself, so it is opened by those who
        inspect as well, unless their policy denies everything. ``plain``: the name is a path as it
        is, seen from the working directory; nothing in it is a prefix. None is returned where the
        user said ``backing=null`` or only inspects. Raises Refused, or what opening raises.
        """

    def create_part(self, role: str, filename: str, *, relative_to: Node) -> Node:
        """Create and open another local file that an open image is to consist of, and is going to
        name: for images that grow. Passes the opening policy; raises StorageError (EEXIST) where
        there is such a file."""


class CreateContext(Protocol):
    """Handed to ``Driver.create``, ``create_file`` and ``measure``."""

    filename: str
    """Of the new image, for messages and for names relative to it."""
    secrets: Secrets
    warn: Callable[[str], None]

    def backing_node(self, *, needed: bool = False) -> Node | None:
        """The backing file of the new image, opened for reading, where one was named and opened.

        ``needed``: open it although the user said not to look at it, since the image says more of
        it than its name. Raises what opening it raises.
        """

    def create_beside(self, filename: str, size: int, *, from_here: bool = False) -> Node:
        """Create and open another file that the new image consists of (data file, extent).

        ``from_here``: its name is seen from the working directory, not from the new image.
        """
