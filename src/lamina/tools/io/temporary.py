"""Writes that are forgotten: an overlay in a temporary file on top of the image (``-s``)."""

from __future__ import annotations

import contextlib
import os
import tempfile

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.session import Session
    from lamina.tools.io.files import How


def open_with_overlay(
    session: Session, name: str | None, how: How, options: dict[str, Any]
) -> Backend:
    """The image, opened for reading only, under a new and empty qcow2 overlay.

    The overlay's file has lost its name when this returns, where the host allows that.
    """
    base = Backend.open(
        {} if name is None else name,
        session=session,
        format=how.format,
        cache=how.cache,
        force_share=how.force_share,
        options=options,
    )
    with base:
        session.add_node(base.node)
        handle, path = tempfile.mkstemp(prefix="lamina-", suffix=".qcow2")
        os.close(handle)
        try:
            create_image(path, "qcow2", session=session, size=base.size)
            return Backend.open(
                {
                    "driver": "qcow2",
                    "file": {"driver": "file", "filename": path},
                    "backing": base.node.name,
                },
                session=session,
                writable=not how.read_only,
                cache="unsafe",
                discard=how.discard,
                copy_on_read=how.copy_on_read,
            )
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
