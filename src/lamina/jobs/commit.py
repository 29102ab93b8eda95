"""Writing what the layers above a backing file hold into that file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from lamina.block.permissions import Perm
from lamina.block.status import chain
from lamina.errors import LaminaError, UsageError
from lamina.hints import TYPE_CHECKING
from lamina.jobs.convert import Conversion, Settings
from lamina.jobs.sources import Sources

if TYPE_CHECKING:
    from lamina.block.backend import Backend
    from lamina.block.node import Node


class _Commit(Conversion):
    def explained(self, error: LaminaError, doing: str, place: int) -> LaminaError:
        """There is one thing that was being done."""
        return error


def commit(
    top: Backend,
    base: Backend,
    *,
    rate: int = 0,
    progress: Callable[[float], None] = lambda done: None,
) -> None:
    """Make ``base``, a writable layer of the chain of ``top``, read as ``top`` does.

    ``base`` grows if it is smaller. It is flushed when this returns; ``top`` is as it was.
    """
    if base.size < top.size:
        base.truncate(top.size)
    settings = Settings(base=base.node, look_for_zeroes=False, rate=rate, progress=progress)
    _Commit(Sources([top]), base, settings).run()
    base.flush()


@contextmanager
def writable_layer(top: Backend, base: Node) -> Iterator[Backend]:
    """A layer of the chain of ``top``, opened for writing for as long as it takes.

    The layers above have to bear with it: whoever writes to ``base`` knows what they show.
    """
    from lamina.block.backend import Backend

    uses = [
        attachment
        for layer in chain(top.node)
        for attachment in layer.unfiltered.children.values()
        if attachment.role == "backing" and attachment.node.unfiltered is base.unfiltered
    ]
    before = [(use.perm, use.shared) for use in uses]
    was_read_only = base.read_only
    for use in uses:
        use.change(use.perm, Perm.ALL)
    try:
        base.reopen(read_only=False)
        try:
            perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
            with Backend(base, perm=perm) as backend:
                yield backend
        finally:
            if was_read_only:
                base.reopen(read_only=True)
    finally:
        for use, (perm, shared) in zip(uses, before, strict=True):
            use.change(perm, shared)


def empty(disk: Backend) -> None:
    """Let everything of ``disk`` come from its backing file. Raises what the driver raises."""
    from lamina.block import registry

    node = disk.node.unfiltered
    registry.driver(node.driver).make_empty(node)
    disk.flush()


def find_layer(node: Node, name: str) -> Node | None:
    """The layer below ``node`` that is called ``name``, seen from the layer that stores it."""
    from lamina.block.filenames import full_backing_filename, local_file

    def place(filename: str) -> str:
        path = local_file(filename)
        return filename if path is None else os.path.realpath(path)

    layers = chain(node)
    for upper, layer in pairwise(layers):
        stored = upper.unfiltered.info().backing_filename
        if name == stored:
            return layer
        try:
            wanted = full_backing_filename(upper.unfiltered, name)
        except UsageError:
            # Where there are no directories, names say nothing but themselves.
            wanted = name
        if place(wanted) == place(layer.filename):
            return layer
    return None
