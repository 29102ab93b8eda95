"""File names: which protocol they ask for, what they are relative to, how nodes show theirs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from lamina.block import registry
from lamina.block.keyvalue import flatten, nest
from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.driver import Driver
    from lamina.block.node import Node


def protocol_prefix(filename: str) -> str | None:
    """What stands before the first ``:``, unless a ``/`` comes earlier; None for plain names.

    On Windows a single letter is a drive, and ``\\\\`` separates directories as well.
    """
    head, colon, _ = filename.partition(":")
    if not colon or "/" in head:
        return None
    if sys.platform == "win32" and (len(head) == 1 or "\\" in head):
        return None
    return head


def is_json(filename: str) -> bool:
    return filename.startswith("json:")


def parse_json(filename: str) -> dict[str, Any]:
    """The options in a ``json:{…}`` name, flattened to dotted keys. Raises UsageError."""
    from lamina.block.jsontext import parse

    try:
        value = parse(filename.removeprefix("json:"))
    except UsageError as error:
        raise error.in_context("Could not parse the JSON options: ") from None
    if not isinstance(value, dict):
        raise UsageError("Invalid JSON object given")
    return flatten(value)


def protocol_options(filename: str) -> dict[str, Any]:
    """``driver`` and the options that open ``filename`` at the protocol level.

    Raises UsageError for a prefix that no driver reads.
    """
    prefix = protocol_prefix(filename)
    if prefix is None:
        return local_options(filename)
    if prefix == "file":
        return local_options(plain_file(filename))
    name = registry.by_prefix(prefix)
    if name is None:
        raise UsageError(f"Unknown protocol '{prefix}'")
    return {"driver": name, **registry.driver(name).parse_filename(filename)}


def local_options(path: str) -> dict[str, Any]:
    """The same for the path of a local file or device, whatever it looks like."""
    return {"driver": local_driver(path), "filename": path}


def plain_file(filename: str) -> str:
    """The path in ``file:path``, in a form that nobody takes for a name with a prefix."""
    path = filename.removeprefix("file:")
    return plain_name(path) if path != filename else path


def plain_name(path: str) -> str:
    """A path in a form that nobody takes for a name with a prefix."""
    return f"./{path}" if protocol_prefix(path) is not None else path


def protocol_name(filename: str) -> str:
    """The driver of ``protocol_options``, without reading the rest of the name."""
    prefix = protocol_prefix(filename)
    if prefix is None or prefix == "file":
        return local_driver(filename.removeprefix("file:"))
    name = registry.by_prefix(prefix)
    if name is None:
        raise UsageError(f"Unknown protocol '{prefix}'")
    return name


def local_file(filename: str) -> str | None:
    """The path, if ``filename`` names a plain local file (or one that could be there)."""
    if is_json(filename):
        return local_path(parse_json(filename))
    if protocol_name(filename) != "file":
        return None
    return filename.removeprefix("file:")


def local_driver(filename: str) -> str:
    """``host_device`` or ``host_cdrom`` for devices, ``file`` for everything else, missing files
    included."""
    import stat

    try:
        mode = os.stat(filename).st_mode
    except (OSError, ValueError):
        return "file"
    if stat.S_ISBLK(mode):
        return "host_cdrom" if _is_cdrom(filename) else "host_device"
    return "host_device" if stat.S_ISCHR(mode) else "file"


def _is_cdrom(device: str) -> bool:
    """Whether a block device is a drive with a medium that comes and goes: it tells its state."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        fd = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.ioctl(fd, 0x5326, (1 << 31) - 1)  # CDROM_DRIVE_STATUS of the current slot
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


# -- names relative to an image --------------------------------------------------------------------


def is_absolute(filename: str) -> bool:
    """Whether a name means the same wherever it is stored: an absolute path, or a protocol."""
    return os.path.isabs(filename) or protocol_prefix(filename) is not None


def combine(base: str, name: str) -> str:
    """``name`` as stored in the image ``base`` (a path or URL), seen from where we are."""
    if is_absolute(name):
        return name
    return directory_part(base) + name


def directory_part(filename: str) -> str:
    """Everything up to the last separator, with it: of a path, or of the path of a URL."""
    prefix = protocol_prefix(filename)
    start = 0 if prefix is None else len(prefix) + 1
    if filename[start : start + 2] == "//":
        # A URL without a path has no directory: never cut into the name of the host.
        start = filename.find("/", start + 2) + 1
        if start == 0:
            return filename + "/"
    separators = [filename.rfind("/", start)]
    if sys.platform == "win32":
        separators.append(filename.rfind("\\", start))
    return filename[: max(*separators, start - 1) + 1]


def storage(node: Node) -> Node:
    """The node at the bottom: what ``node`` is kept in."""
    below = node
    while (inner := below.child("file") or below.child("image")) is not None:
        below = inner
    return below


def is_local(node: Node) -> bool:
    """Whether a protocol node's file name is a path, whatever it looks like."""
    return node.driver in ("file", "host_device", "host_cdrom")


def base_directory(node: Node) -> str:
    """Where names stored in ``node`` start from, with a separator at its end (or empty).

    Raises UsageError if the node lives where there are no directories.
    """
    below = storage(node)
    if is_local(below):
        path = below.filename
        return path[: len(path) - len(os.path.basename(path))]
    if is_json(below.filename) or below.driver.startswith("null-"):
        raise UsageError(f"Cannot generate a base directory for {below.driver} nodes")
    return directory_part(below.filename)


def full_backing_filename(node: Node, stored: str) -> str:
    """``stored``, the name of a backing file, as it would be opened for ``node``."""
    if is_absolute(stored):
        return stored
    return base_directory(node) + stored


def local_path(options: Mapping[str, Any]) -> str | None:
    """The path of the one plain local file that these options open; None for anything else.

    Options that could name more than that file (``backing.file.filename``, ``data-file``, …) make
    it "anything else".
    """
    given = dict(options)
    for harmless in ("offset", "size"):
        given.pop(harmless, None)
    if given.pop("file.driver", "file") != "file":
        return None
    path = given.pop("file.filename", None)
    if path is None and given.get("driver") == "file":
        path = given.pop("filename", None)
    given.pop("driver", None)
    return path if isinstance(path, str) and not given else None


# -- names to show -------------------------------------------------------------------------------


def description(node: Node) -> dict[str, Any]:
    """Dotted options that open the same as ``node``."""
    if is_json(node.filename):
        return parse_json(node.filename)
    if is_local(node):
        return {"driver": node.driver, "filename": node.filename}
    if registry.is_protocol(node.driver):
        return protocol_options(node.filename)
    below = {f"file.{key}": value for key, value in description(node.file).items()}
    return {"driver": node.driver, **below}


def json_filename(options: Mapping[str, Any]) -> str:
    """``json:{…}`` for a graph that no plain name describes. Dotted keys become objects."""
    import json

    return "json:" + json.dumps(_in_order(nest(options)), ensure_ascii=False)


_BEFORE_DRIVER = ("children", "image", "offset", "read-zeroes", "throttle-group")


def _in_order(value: Any) -> Any:
    """Keys in the order that QEMU shows them in, so that people can compare."""
    if isinstance(value, list):
        return [_in_order(item) for item in value]
    if not isinstance(value, dict):
        return value

    def rank(key: str) -> int:
        if key in _BEFORE_DRIVER:
            return 0
        return {"driver": 1, "file": 3}.get(key, 2)

    return {key: _in_order(value[key]) for key in sorted(value, key=rank)}


def shown_filename(
    driver: Driver, node: Node, own: Mapping[str, Any], filename: str | None
) -> str:
    """The name of ``node``: plain where a plain name opens the same, else ``json:{…}``."""
    strong = {key: value for key, value in own.items() if key in driver.strong_options}
    if registry.is_protocol(driver.name):
        if isinstance(own.get("filename"), str):
            return str(own["filename"])
        return driver.plain_filename(strong) or json_filename(
            {"driver": driver.name, **strong}
        )
    file = node.child("file")
    if file is None:
        return filename or ""
    on_storage = registry.is_protocol(file.driver) and not is_json(file.filename)
    if driver.is_format and on_storage and not strong:
        return file.filename
    below = {f"file.{key}": value for key, value in description(file).items()}
    return json_filename({**strong, "driver": driver.name, **below})
