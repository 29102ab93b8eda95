"""The gate for requests from outside: ranges, permissions, cache modes, zeroes, guessed formats."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.extents import Extent, Kind
from lamina.block.info import NodeInfo
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node, NodeOptions, ReadRequest, WriteRequest
from lamina.block.permissions import Perm
from lamina.block.session import Session
from lamina.block.zeroes import is_zero
from lamina.errors import Busy, ImageUnsupported, Refused, StorageError, UsageError


class Recorder(Node):
    """Memory that remembers what it was asked."""

    driver = "recorder"

    def __init__(self, options: NodeOptions, size: int = 4096) -> None:
        super().__init__(options)
        self.data = bytearray(size)
        self.calls: list[tuple[object, ...]] = []
        self.applied: list[tuple[Perm, Perm]] = []

    @property
    def size(self) -> int:
        return len(self.data)

    def info(self) -> NodeInfo:
        return NodeInfo("", "recorder", self.size)

    def readv(self, requests: Sequence[ReadRequest]) -> None:
        for offset, buffer in requests:
            buffer[:] = self.data[offset : offset + len(buffer)]

    def writev(self, requests: Sequence[WriteRequest], flags: WriteFlags = WriteFlags.NONE) -> None:
        for offset, data in requests:
            self.data[offset : offset + len(data)] = data
            self.calls.append(("write", offset, len(data), flags))

    def write_zeroes(
        self, offset: int, length: int, flags: WriteFlags = WriteFlags.NONE
    ) -> None:
        self.data[offset : offset + length] = bytes(length)
        self.calls.append(("zero", offset, length, flags))

    def write_compressed(self, requests: Sequence[WriteRequest]) -> None:
        self.calls.append(("compressed", len(requests)))

    def _discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))

    def _flush(self) -> None:
        self.calls.append(("flush",))

    def extents(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA, self, offset)]

    def truncate(
        self,
        size: int,
        preallocation: Preallocation = Preallocation.OFF,
        *,
        exact: bool = True,
        zeroed: bool = False,
    ) -> None:
        perm, _ = self.cumulative_permissions()
        assert perm & Perm.RESIZE
        self.data = self.data[:size].ljust(size, b"\0")

    def apply_permissions(self, perm: Perm, shared: Perm) -> None:
        self.applied.append((perm, shared))


READ_WRITE = Perm.CONSISTENT_READ | Perm.WRITE


def backend(*, writethrough: bool = False, perm: Perm = READ_WRITE, **options: object) -> Backend:
    settled = NodeOptions(**{"read_only": False, "unmap": True, **options})
    return Backend(Recorder(settled), perm=perm, writethrough=writethrough)


def calls(one: Backend) -> list[tuple[object, ...]]:
    assert isinstance(one.node, Recorder)
    return one.node.calls


# -- ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (4096, 1), (4090, 7), (0, 4097), (1 << 70, 1)]
)
def test_nothing_reaches_the_node_from_behind_the_end(offset: int, length: int) -> None:
    one = backend()
    buffer = memoryview(bytearray(length))
    for request in (
        lambda: one.readv([(0, memoryview(bytearray(1))), (offset, buffer)]),
        lambda: one.read(offset, length),
        lambda: one.writev([(0, b"x"), (offset, buffer)]),
        lambda: one.write_zeroes(offset, length),
        lambda: one.discard(offset, length),
        lambda: one.write_compressed([(offset, buffer)]),
        lambda: one.extents(offset, length),
    ):
        with pytest.raises(StorageError) as caught:
            request()
        assert caught.value.errno == errno.EIO
        assert str(caught.value) == "Input/output error"
    assert calls(one) == []


def test_the_end_itself_is_inside() -> None:
    one = backend()
    one.write(4095, b"x")
    assert one.read(4094, 2) == b"\0x"
    assert one.read(4096, 0) == b""
    one.truncate(5000)
    assert one.size == 5000
    one.write(4999, b"y")


# -- permissions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("perm", "read_only"), [(Perm.CONSISTENT_READ, False), (Perm.CONSISTENT_READ, True)]
)
def test_who_only_reads_cannot_write(perm: Perm, read_only: bool) -> None:
    one = backend(perm=perm, read_only=read_only)
    assert one.read_only
    for request in (
        lambda: one.write(0, b"x"),
        lambda: one.write_zeroes(0, 1),
        lambda: one.discard(0, 1),
        lambda: one.write_compressed([(0, b"x")]),
    ):
        with pytest.raises(Refused, match="Block node is read-only"):
            request()
    assert calls(one) == []


def test_a_read_only_node_has_no_writers() -> None:
    with pytest.raises(Refused, match="Block node is read-only"):
        backend(read_only=True)
    one = backend(read_only=True, perm=Perm.CONSISTENT_READ)
    with pytest.raises(Refused, match="Image is read-only"):
        one.truncate(0)


def test_users_must_tolerate_each_other() -> None:
    one = backend(node_name="n")
    with pytest.raises(Busy) as caught:
        Backend(one.node, shared=Perm.CONSISTENT_READ)
    assert str(caught.value) == (
        "Permission conflict on node 'n': permissions 'write' are both required by an unnamed "
        "block device (uses node 'n' as 'root' child) and unshared by an unnamed block device "
        "(uses node 'n' as 'root' child)."
    )
    assert len(one.node.users) == 1
    other = Backend(one.node, shared=Perm.ALL & ~Perm.RESIZE)
    with pytest.raises(Busy):
        one.truncate(0)
    assert one.size == 4096
    one.close()
    assert not other.node.closed
    other.close()
    assert other.node.closed


def test_permissions_reach_the_storage_and_resizing_is_temporary() -> None:
    one = backend()
    assert isinstance(one.node, Recorder)
    one.truncate(1000)
    assert one.node.applied == [
        (READ_WRITE, Perm.ALL),
        (READ_WRITE | Perm.RESIZE, Perm.ALL),
        (READ_WRITE, Perm.ALL),
    ]


def test_reopening() -> None:
    one = backend()
    one.reopen(writable=False)
    with pytest.raises(Refused):
        one.write(0, b"x")
    one.reopen(writable=True, writethrough=True)
    one.write(0, b"x")
    assert calls(one) == [("flush",), ("write", 0, 1, WriteFlags.FUA)]


# -- cache modes and zeroes ------------------------------------------------------------------------


def test_writethrough_makes_every_write_durable() -> None:
    one = backend(writethrough=True)
    one.write(0, b"x")
    one.write_zeroes(0, 512, WriteFlags.MAY_UNMAP)
    one.write_compressed([(0, b"x")])
    assert calls(one) == [
        ("write", 0, 1, WriteFlags.FUA),
        ("zero", 0, 512, WriteFlags.FUA | WriteFlags.MAY_UNMAP),
        ("compressed", 1),
        ("flush",),
    ]


@pytest.mark.parametrize(
    ("word", "flags"), [("on", WriteFlags.NONE), ("unmap", WriteFlags.MAY_UNMAP)]
)
def test_zeroes_are_detected(word: str, flags: WriteFlags) -> None:
    one = backend(detect_zeroes=word)
    one.writev([(0, bytes(512)), (512, b"x" * 512), (1024, bytes(100))])
    assert calls(one) == [
        ("zero", 0, 512, flags),
        ("zero", 1024, 100, flags),
        ("write", 512, 512, WriteFlags.NONE),
    ]
    plain = backend()
    plain.write(0, bytes(512))
    assert calls(plain) == [("write", 0, 512, WriteFlags.NONE)]


@given(st.integers(0, 200_000), st.integers(0, 200_000))
def test_what_zeroes_are(length: int, position: int) -> None:
    data = bytearray(length)
    assert is_zero(data)
    assert is_zero(memoryview(bytes(data)))
    if position < length:
        data[position] = 1
        assert not is_zero(data)


# -- guessed formats -------------------------------------------------------------------------------

QCOW2 = b"QFI\xfb\0\0\0\x03"


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("d").write_bytes(bytes(4096))
    return "d"


def test_a_guessed_raw_image_must_stay_one(disk: str) -> None:
    said: list[str] = []
    with Backend.open(disk, session=Session(warn=said.append), writable=True) as one:
        assert said == [
            "WARNING: Image format was not specified for 'd' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write "
            "operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions."
        ]
        one.write(0, QCOW2[:7])
        for offset, data in ((0, QCOW2), (7, b"\x03" + bytes(600)), (4, b"\0\0\0\x02")):
            with pytest.raises(Refused, match="Operation not permitted"):
                one.write(offset, data)
        # Both halves may be innocent: what counts is what they make together.
        one.write(0, bytes(8))
        with pytest.raises(Refused, match="Operation not permitted"):
            one.writev([(0, b"conec"), (5, b"tix")])
        one.write(512, QCOW2)
        assert one.read(0, 8) == bytes(8)


@pytest.mark.parametrize("how", [{"format": "raw"}, {"writable": False}])
def test_no_warning_where_there_is_no_danger(disk: str, how: dict[str, object]) -> None:
    said: list[str] = []
    session = Session(warn=said.append)
    with Backend.open(disk, session=session, **{"writable": True, **how}) as one:
        if not one.read_only:
            one.write(0, QCOW2)
    assert said == []


# -- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "direct", "no_flush", "writethrough"),
    [
        ("writeback", False, False, False),
        ("writethrough", False, False, True),
        ("unsafe", False, True, False),
        ("none", True, False, False),
        ("directsync", True, False, True),
    ],
)
def test_cache_modes(cache: str, direct: bool, no_flush: bool, writethrough: bool) -> None:
    with Backend.open(
        "null-co://", session=Session(warn=print), format="raw", cache=cache, writable=True
    ) as one:
        for node in (one.node, one.node.file):
            assert (node.options.direct, node.options.no_flush) == (direct, no_flush)
        assert one._writethrough is writethrough


def test_a_wrong_cache_mode() -> None:
    with pytest.raises(UsageError, match="Invalid cache option: foo"):
        Backend.open("null-co://", session=Session(), cache="foo")


def test_force_share_only_reads(disk: str) -> None:
    with pytest.raises(UsageError, match="force-share=on can only be used with read-only images"):
        Backend.open(disk, session=Session(), force_share=True, writable=True)


def test_what_a_node_cannot_do_stays_an_error() -> None:
    with Backend.open(
        "null-co://", session=Session(), format="raw", writable=True
    ) as one, pytest.raises(ImageUnsupported):
        one.write_compressed([(0, b"x")])


# -- copy on read ----------------------------------------------------------------------------------


def test_copy_on_read_keeps_what_it_reads(disk: str) -> None:
    session = Session(warn=print)
    create_image("top", "qcow2", session=session, backing_file=disk, backing_format="raw")
    for copies in (False, True):
        with Backend.open("top", session=session, writable=True, copy_on_read=copies) as one:
            assert one.read(1000, 24) == bytes(24)
            kinds = {extent.kind for extent in one.node.unfiltered.extents(0, one.size)}
            assert (Kind.BELOW in kinds) is not copies
    with (
        # The guess does not become a certainty by having a filter on top.
        Backend.open(disk, session=session, writable=True, copy_on_read=True) as one,
        pytest.raises(Refused),
    ):
        one.write(0, QCOW2)


def test_copy_on_read_needs_to_write(disk: str) -> None:
    with pytest.raises(UsageError, match="Can't use copy-on-read on read-only device"):
        Backend.open(disk, session=Session(), copy_on_read=True)


# -- options of open nodes -------------------------------------------------------------------------


def test_options_change_while_the_image_is_open(disk: str) -> None:
    session = Session(warn=print)
    with Backend.open(disk, session=session, format="raw", writable=True) as one:
        one.write(512, b"here")
        one.reopen_with({"offset": "512", "size": 1024})
        assert (one.size, one.read(0, 4)) == (1024, b"here")
        one.reopen_with({"driver": "raw", "size": 2048, "file": {"filename": disk}})
        assert (one.size, one.read(0, 4)) == (2048, b"here")
        one.reopen_with({"discard": "unmap", "detect-zeroes": "unmap"}, writethrough=True)
        assert one.node.options.unmap
        one.write(0, bytes(4))
        one.reopen_with({"read-only": True})
        assert one.node.file.read_only
        with pytest.raises(Refused):
            one.write(0, b"x")
        one.reopen_with({"read-only": "off", "offset": 0, "file.cache.no-flush": "on"})
        assert one.node.file.options.no_flush
        one.write(0, b"x")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"foo": 1}, "Cannot change the option 'foo'"),
        ({"driver": "qcow2"}, "Cannot change the option 'driver'"),
        ({"node-name": "x"}, "Cannot change the option 'node-name'"),
        ({"file.filename": "x"}, "Cannot change the option 'filename'"),
        ({"file.locking": "off"}, "Cannot change the option 'locking'"),
        ({"file.foo": 1}, "Cannot change the option 'foo'"),
        ({"cache.direct": "on"}, "Cannot change the option 'cache.direct'"),
        ({"cache.foo": "on"}, "Cannot change the option 'cache.foo'"),
        ({"discard": "foo"}, "Invalid discard option"),
        ({"read-only": "foo"}, "Parameter 'read-only' expects 'on' or 'off'"),
        ({"offset": "2M"}, "Offset (2097152) cannot be greater than size of the containing file "
         "(4096)"),
        ({"size": "1000"}, "Specified size is not multiple of 512"),
        ({"read-only": "on", "size": "1000"}, "Specified size is not multiple of 512"),
    ],
)
def test_options_that_cannot_change(disk: str, options: dict[str, object], error: str) -> None:
    with Backend.open(disk, session=Session(), format="raw", writable=True) as one:
        with pytest.raises(UsageError) as caught:
            one.reopen_with(options)
        assert str(caught.value) == error
        assert one.size == 4096
        one.write(0, b"x")
