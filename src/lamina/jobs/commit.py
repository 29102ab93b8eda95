"""Writing what the layers above a backing file hold into that file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lamina.jobs.convert import Settings, convert

if TYPE_CHECKING:
    from lamina.block.backend import Backend


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
    convert(
        [top],
        base,
        Settings(
            base=base.node,
            look_for_zeroes=False,
            rate=rate,
            name_place=False,
            progress=progress,
        ),
    )
    base.flush()
