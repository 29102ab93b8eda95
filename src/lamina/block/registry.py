"""Names of drivers and where they are: ``name -> "module:DRIVER"``, imported when first asked for.

Drivers of third parties register themselves in the entry point group ``lamina.drivers``; it is
looked at only for names that are not known here, because looking is slow.
"""

from __future__ import annotations

from lamina.errors import UsageError
from lamina.hints import TYPE_CHECKING

if TYPE_CHECKING:
    from lamina.block.driver import Driver

_FORMATS = {
    "bochs": "lamina.formats.bochs:DRIVER",
    "cloop": "lamina.formats.cloop:DRIVER",
    "dmg": "lamina.formats.dmg:DRIVER",
    "luks": "lamina.formats.luks:DRIVER",
    "parallels": "lamina.formats.parallels:DRIVER",
    "qcow": "lamina.formats.qcow:DRIVER",
    "qcow2": "lamina.formats.qcow2:DRIVER",
    "qed": "lamina.formats.qed:DRIVER",
    "raw": "lamina.formats.raw:DRIVER",
    "vdi": "lamina.formats.vdi:DRIVER",
    "vhdx": "lamina.formats.vhdx:DRIVER",
    "vmdk": "lamina.formats.vmdk:DRIVER",
    "vpc": "lamina.formats.vpc:DRIVER",
}

_PROTOCOLS = {
    "file": "lamina.protocols.file:DRIVER",
    "host_cdrom": "lamina.protocols.file.host_device:CDROM_DRIVER",
    "host_device": "lamina.protocols.file.host_device:DRIVER",
    "nbd": "lamina.protocols.nbd:DRIVER",
    "null-aio": "lamina.protocols.null:AIO_DRIVER",
    "null-co": "lamina.protocols.null:DRIVER",
}

_FILTERS = {
    "blkdebug": "lamina.filters.blkdebug:DRIVER",
    "compress": "lamina.filters.compress:DRIVER",
    "copy-on-read": "lamina.filters.copy_on_read:DRIVER",
    "preallocate": "lamina.filters.preallocate:DRIVER",
}

_PREFIXES = {
    "blkdebug": "blkdebug",
    "file": "file",
    "host_cdrom": "host_cdrom",
    "host_device": "host_device",
    "nbd": "nbd",
    "nbd+tcp": "nbd",
    "nbd+unix": "nbd",
    "nbds": "nbd",
    "nbds+tcp": "nbd",
    "nbds+unix": "nbd",
    "null-aio": "null-aio",
    "null-co": "null-co",
}
"""What stands before the first ``:`` of a file name -> the protocol that reads the rest."""

_GROUP = "lamina.drivers"

_targets: dict[str, str] = {**_FORMATS, **_PROTOCOLS, **_FILTERS}
_loaded: dict[str, Driver] = {}


def driver(name: str) -> Driver:
    """The driver of that name. Raises UsageError if there is none."""
    found = _loaded.get(name)
    if found is None:
        target = _targets.get(name) or _third_party().get(name)
        if target is None:
            raise UsageError(f"Unknown driver '{name}'")
        found = _loaded[name] = _load(target)
    return found


def is_known(name: str) -> bool:
    """Whether ``driver`` would find it; imports no driver."""
    return name in _targets or name in _third_party()


def names() -> list[str]:
    """All built-in and registered drivers, sorted."""
    return sorted(_targets)


def register(name: str, target: str, *, prefix: str | None = None) -> None:
    """Add or replace a driver: ``target`` is ``"module:ATTRIBUTE"``.

    ``prefix`` is what file names begin with (before a ``:``) that this protocol reads.
    """
    _targets[name] = target
    _loaded.pop(name, None)
    if prefix is not None:
        _PREFIXES[prefix] = name


def is_protocol(name: str) -> bool:
    """Whether a driver reads file names itself, rather than having them opened below it."""
    return name in _PREFIXES.values()


def by_prefix(prefix: str) -> str | None:
    """The protocol driver for file names that begin with ``prefix:``."""
    return _PREFIXES.get(prefix)


def _load(target: str) -> Driver:
    # __import__ rather than importlib: it is there already, and this runs for every image.
    module, _, attribute = target.partition(":")
    found: Driver = getattr(__import__(module, fromlist=[attribute]), attribute)
    return found


def _third_party() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=_GROUP)}
