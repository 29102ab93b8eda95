"""Creating images: options settled first, then the file, then what the format writes into it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from lamina.block import filenames, registry
from lamina.block.backend import Backend
from lamina.block.node import NodeOptions
from lamina.block.opening import open_node
from lamina.block.options import Spec, Type, convert, parse, specs
from lamina.block.permissions import Perm
from lamina.errors import ImageUnsupported, LaminaError, StorageError, UsageError
from lamina.hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.block.driver import Driver
    from lamina.block.node import Node
    from lamina.block.secrets import Secrets
    from lamina.block.session import Session

BACKING_FILE = "backing_file"
BACKING_FORMAT = "backing_fmt"
SIZE = "size"
PREALLOCATION = "preallocation"
MAX_SIZE = (1 << 63) - 1
"""Bytes."""


def create_image(
    filename: str,
    format: str,
    *,
    session: Session,
    options: Mapping[str, Any] | None = None,
    size: int | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
    open_backing: bool = True,
) -> Any:
    """Create an image; returns the ``CreateOptions`` of the format as they were settled.

    See ``prepare`` for the parameters and errors; after an error that creating the content raised,
    no new file is left behind.
    """
    creation = prepare(
        filename,
        format,
        session=session,
        options=options,
        size=size,
        backing_file=backing_file,
        backing_format=backing_format,
        open_backing=open_backing,
    )
    creation.run()
    return creation.format_options


def prepare(
    filename: str,
    format: str,
    *,
    session: Session,
    options: Mapping[str, Any] | None = None,
    size: int | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
    open_backing: bool = True,
) -> Creation:
    """Everything that can be checked before the file is touched.

    ``options`` are those of the format and of the protocol together, as users write them; the
    parameters ``backing_file`` and ``backing_format`` win over the options of these names. ``size``
    in bytes; None: from the options or the backing file. The backing file is opened to see that it
    is there unless ``open_backing`` is off. Raises UsageError, and what opening it raises.
    """
    format_driver, protocol_driver = _drivers(filename, format)
    given = dict(options or {})
    merged = _merged(format_driver, protocol_driver)
    for key in given:
        if key not in merged:
            raise UsageError(f"Invalid parameter '{key}'", field=key)
    if size is not None:
        if SIZE in given:
            raise UsageError("The image size must be specified only once")
        given[SIZE] = size
    for key, value, what in (
        (BACKING_FILE, backing_file, "Backing file"),
        (BACKING_FORMAT, backing_format, "Backing file format"),
    ):
        if value is not None:
            if not _supports(format_driver, key):
                raise UsageError(f"{what} not supported for file format '{format}'")
            given[key] = value
    creation = Creation(filename, format_driver, protocol_driver, given, session)
    creation.settle(open_backing=open_backing)
    return creation


class Creation:
    """An image about to be created: its options are settled, nothing is written yet.

    ``format_options`` and ``protocol_options`` are instances of the drivers' ``CreateOptions``.
    For the drivers it is the ``CreateContext``.
    """

    format_options: Any
    protocol_options: Any

    def __init__(
        self,
        filename: str,
        format_driver: Driver,
        protocol_driver: Driver,
        given: dict[str, Any],
        session: Session,
    ) -> None:
        self.filename = filename
        self.session = session
        self.secrets: Secrets = session.secrets
        self.warn = session.warn
        self._format = format_driver
        self._protocol = protocol_driver
        self._given = given
        self._with_backing = True
        self._backing: Node | None = None
        self._beside: list[Node] = []
        self._created: list[str] = []

    # -- settling --------------------------------------------------------------------------------

    def settle(self, *, open_backing: bool) -> None:
        given = self._given
        self._with_backing = open_backing
        for key, (spec, _) in _merged(self._format, self._protocol).items():
            if key in given:
                given[key] = _checked(spec, given[key])
        name = given.get(BACKING_FILE)
        if name is not None:
            self._check_backing_name(name)
            if open_backing:
                self._look_at_backing(name)
            elif BACKING_FORMAT not in given:
                raise UsageError("Backing file specified without backing format")
        if given.get(SIZE) is None and _supports(self._format, SIZE):
            raise UsageError("Image creation needs a size parameter")
        if not 0 <= given.get(SIZE, 0) <= MAX_SIZE:
            raise UsageError(
                f"Invalid image size specified. Must be between 0 and {MAX_SIZE}.", field=SIZE
            )

    def _check_backing_name(self, name: str) -> None:
        if not name:
            raise UsageError("Expected backing file name, got empty string")
        if name == self.filename:
            raise UsageError(
                "Error: Trying to create an image with the same filename as the backing file"
            )

    def _look_at_backing(self, name: str) -> None:
        """The backing file must be there; it gives the image its size, and tells its format to
        somebody who forgot to."""
        given = self._given
        try:
            node = self._open_backing(name)
        except LaminaError as error:
            error.hint = "Could not open backing image."
            raise
        try:
            if BACKING_FORMAT not in given:
                raise UsageError(
                    "Backing file specified without backing format",
                    hint=f"Detected format of {node.driver}.",
                )
            if given.get(SIZE) is None:
                given[SIZE] = node.size
        finally:
            node.close()

    def _open_backing(self, name: str) -> Node:
        """Without locks: somebody may be using it."""
        driver = self._given.get(BACKING_FORMAT)
        return open_node(
            filenames.combine(self.filename, name),
            session=self.session,
            defaults=NodeOptions(force_share=True),
            options=None if driver is None else {"driver": driver},
            locked=True,
        )

    def settled(self) -> list[tuple[str, str]]:
        """Key and text of each option that was given or is always listed, in QEMU's order."""
        lines = []
        for key, (spec, default) in _merged(self._format, self._protocol).items():
            value = self._given.get(key, default if spec.listed else None)
            if value is not None:
                lines.append((key, _text(spec, value)))
        return lines

    # -- doing it --------------------------------------------------------------------------------

    def run(self) -> None:
        """Create the file, then the image in it. Raises what the drivers raise."""
        self._parse()
        try:
            self._protocol.create_file(self.filename, self.protocol_options, self)
            if self._format is not self._protocol:
                self._create_content()
        except StorageError as error:
            if error.errno == errno.EFBIG:
                raise _too_large(self._format) from None
            raise

    def _parse(self) -> None:
        """Make the instances; this is where words are checked that only drivers know."""
        assert self._format.CreateOptions is not None
        assert self._protocol.CreateOptions is not None
        self.format_options, rest = parse(self._format.CreateOptions, self._given)
        if self._format is not self._protocol:
            rest[SIZE] = self._format.new_file_size(self.format_options)
            if self._format.metadata_is_whole and rest.get(PREALLOCATION) == "metadata":
                rest[PREALLOCATION] = "off"
            self.protocol_options, rest = parse(self._protocol.CreateOptions, rest)
        else:
            self.protocol_options = self.format_options

    def _create_content(self) -> None:
        file = open_node(
            self.filename,
            session=self.session,
            defaults=NodeOptions(read_only=False, unmap=True),
            protocol=True,
        )
        try:
            with Backend(file, perm=Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE):
                self._write_content(file)
        finally:
            self._close_others()
            file.close_unused()

    def _write_content(self, file: Node) -> None:
        try:
            self._format.create(self.format_options, file, self)
            file.flush()
        except BaseException:
            for filename in (self.filename, *self._created):
                _remove_file(filename)
            raise

    # -- what the format asks for ----------------------------------------------------------------

    def backing_node(self, *, needed: bool = False) -> Node | None:
        name = self._given.get(BACKING_FILE)
        if name is None or not (self._with_backing or needed):
            return None
        if self._backing is None:
            self._backing = self._open_backing(name)
        return self._backing

    def create_beside(self, filename: str, size: int, *, from_here: bool = False) -> Node:
        full = filename if from_here else filenames.combine(self.filename, filename)
        driver = registry.driver(filenames.protocol_options(full)["driver"])
        assert driver.CreateOptions is not None
        options: Any
        options, _ = parse(driver.CreateOptions, {SIZE: size})
        driver.create_file(full, options, self)
        self._created.append(full)
        node = open_node(
            full,
            session=self.session,
            defaults=NodeOptions(read_only=False, unmap=True),
            protocol=True,
        )
        self._beside.append(node)
        return node

    def _close_others(self) -> None:
        for node in (*self._beside, *([self._backing] if self._backing else [])):
            node.close_unused()
        self._beside.clear()
        self._backing = None


# -- options ---------------------------------------------------------------------------------------


def creation_options(format: str, filename: str | None = None) -> list[Spec]:
    """What ``-o`` takes, sorted by key: of the format, and of the protocol of ``filename``.

    Raises UsageError or ImageUnsupported for drivers that create nothing.
    """
    format_driver, protocol_driver = _drivers(filename, format)
    return [spec for _, (spec, _) in sorted(_merged(format_driver, protocol_driver).items())]


def options_help(format: str, filename: str | None = None) -> str:
    """The same as the text of ``-o help``, without a newline at its end."""
    title = "Supported options:" if filename is not None else f"Supported {format} options:"
    lines = [title]
    for spec in creation_options(format, filename):
        lines.append(f"  {f'{spec.key}=<{spec.type.value}>':<22} - {spec.help}")
    if filename is None:
        lines += [
            "",
            "The protocol level may support further options.",
            "Specify the target filename to include those options.",
        ]
    return "\n".join(lines)


def _drivers(filename: str | None, format: str) -> tuple[Driver, Driver]:
    """The drivers that will create the image; both are the format's if no file is named."""
    try:
        format_driver = registry.driver(format)
    except UsageError:
        raise UsageError(f"Unknown file format '{format}'") from None
    protocol_driver = format_driver
    if filename is not None:
        prefix = filenames.protocol_prefix(filename)
        if prefix is not None and registry.by_prefix(prefix) is None:
            raise UsageError(f"Unknown protocol '{prefix}'")
        protocol_driver = registry.driver(filenames.protocol_name(filename))
    if format_driver.CreateOptions is None:
        raise ImageUnsupported(f"Format driver '{format}' does not support image creation")
    if protocol_driver.CreateOptions is None:
        raise ImageUnsupported(
            f"Protocol driver '{protocol_driver.name}' does not support image creation"
        )
    return format_driver, protocol_driver


def _merged(format_driver: Driver, protocol_driver: Driver) -> dict[str, tuple[Spec, Any]]:
    """Key -> what it says of itself and its default; the format's win over the protocol's."""
    merged: dict[str, tuple[Spec, Any]] = {}
    for driver in (format_driver, protocol_driver):
        if driver.CreateOptions is not None:
            for name, spec in specs(driver.CreateOptions).items():
                merged.setdefault(spec.key, (spec, getattr(driver.CreateOptions, name)))
    return merged


def _supports(driver: Driver, key: str) -> bool:
    assert driver.CreateOptions is not None
    return any(spec.key == key for spec in specs(driver.CreateOptions).values())


def _checked(spec: Spec, value: Any) -> Any:
    """The value as its type, but switches as they were written: they are shown again."""
    found = convert(Spec(spec.key, spec.type, spec.help), value)
    return value if spec.type is Type.BOOL else found


def _text(spec: Spec, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


# -- trouble ---------------------------------------------------------------------------------------


def _too_large(driver: Driver) -> StorageError:
    hint = " (try using a larger cluster size)" if _supports(driver, "cluster_size") else ""
    return StorageError(
        f"The image size is too large for file format '{driver.name}'{hint}", errno=errno.EFBIG
    )


def _remove_file(filename: str) -> None:
    """After a failure: a local file that holds half an image helps nobody."""
    path = filenames.local_file(filename)
    if path is not None and os.path.isfile(path):
        os.unlink(path)
