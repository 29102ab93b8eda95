"""Disk images and remote disks, every format and protocol of QEMU's block layer.

>>> import lamina
>>> lamina.create("disk.raw", "raw", 1 << 20)
>>> with lamina.open("disk.raw", format="raw", writable=True) as image:
...     image.pwrite(b"hello", 512)
...     image.pread(5, 512)
b'hello'
>>> lamina.inspect("disk.raw").virtual_size
1048576

Everything is imported when it is first used: ``import lamina`` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from typing import Any

    from lamina.bitmaps import Bitmap
    from lamina.block.info import NodeInfo
    from lamina.block.policy import Policy
    from lamina.errors import (
        Busy,
        ImageCorrupt,
        ImageUnsupported,
        LaminaError,
        Refused,
        StorageError,
        UsageError,
    )
    from lamina.image import Image, Region

__all__ = [
    "Bitmap",
    "Busy",
    "Image",
    "ImageCorrupt",
    "ImageUnsupported",
    "LaminaError",
    "NodeInfo",
    "Policy",
    "Refused",
    "Region",
    "StorageError",
    "UsageError",
    "create",
    "inspect",
    "open",
]

_HOMES = {
    "Bitmap": "lamina.bitmaps",
    "Image": "lamina.image",
    "NodeInfo": "lamina.block.info",
    "Policy": "lamina.block.policy",
    "Region": "lamina.image",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lamina' has no attribute '{name}'")
    module = __import__(_HOMES.get(name, "lamina.errors"), fromlist=[name])
    return getattr(module, name)


def open(
    image: str | os.PathLike[str] | Mapping[str, Any],
    *,
    format: str | None = None,
    writable: bool = False,
    cache: str = "writeback",
    force_share: bool = False,
    backing: bool = True,
    policy: Policy | str = "allow",
    secrets: Mapping[str, bytes | str] | None = None,
) -> Image:
    """Open an image or a disk by its name, by a ``json:{…}`` name, or by options.

    ``format`` is guessed from the content where it is not given; for writing, say it. ``cache`` is
    ``writeback``, ``writethrough``, ``none``, ``directsync`` or ``unsafe``. ``force_share`` reads
    although somebody writes. Without ``backing`` only this layer is opened. ``policy`` says which
    names that the image stores may be opened: ``allow``, ``beside`` or ``deny``; choose one of the
    latter two for images from strangers. ``secrets`` are passphrases by id.

    Raises LaminaError: UsageError, StorageError, ImageCorrupt, ImageUnsupported, Refused or Busy.

    >>> import lamina
    >>> lamina.create("a.raw", "raw", "64k")
    >>> options = {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "a.raw"}}
    >>> with lamina.open(options) as window:
    ...     window.size
    65024
    """
    from lamina.image import open_image

    return open_image(
        image,
        format=format,
        writable=writable,
        cache=cache,
        force_share=force_share,
        backing=backing,
        policy=policy,
        secrets=secrets,
    )


def create(
    filename: str | os.PathLike[str],
    format: str,
    size: int | str | None = None,
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
    options: Mapping[str, Any] | None = None,
    policy: Policy | str = "allow",
    secrets: Mapping[str, bytes | str] | None = None,
) -> None:
    """Create an image of ``size`` bytes (or ``"10G"``); an existing file is overwritten.

    ``options`` are those of ``qemu-img create -o`` under their names: ``{"cluster_size": "1M"}``.
    With a backing file the size may be left out, and its format must be given. A relative
    ``backing_file`` is one beside the new image. Raises LaminaError.

    >>> import lamina
    >>> lamina.create("full.raw", "raw", "64k", options={"preallocation": "full"})
    >>> lamina.inspect("full.raw").actual_size
    65536
    """
    from lamina.image import create_image

    create_image(
        filename,
        format,
        size,
        backing_file=backing_file,
        backing_format=backing_format,
        options=options,
        policy=policy,
        secrets=secrets,
    )


def inspect(
    image: str | os.PathLike[str] | Mapping[str, Any], *, format: str | None = None
) -> NodeInfo:
    """What an image says of itself, without opening anything that it names.

    Safe for files from strangers: time and memory are bounded whatever the file holds. It may be
    in use by somebody else meanwhile. Raises LaminaError.
    """
    from lamina.image import open_image

    with open_image(
        image, format=format, force_share=True, inspect=True, policy="deny", secrets=None
    ) as opened:
        return opened.info()
