"""What every node promises, as tests to inherit: protocols, formats and filters, also of others.

A test module names its node and says what it can do; pytest does the rest:

    class TestMyProtocol(NodeConformance):
        grows_by_writing = True

        def make(self, size: int) -> Node:      # writable, ``size`` bytes long, all zeroes
            return open_mine(self.path / "disk", size)

        def reopen(self, node: Node) -> Node:   # closed, and opened again
            …

Each test keeps a bytearray beside the node and holds the two against each other.
"""

from __future__ import annotations

import mmap
import random
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.extents import Extent, Kind
from lamina.block.limits import Preallocation, WriteFlags
from lamina.block.node import Node
from lamina.block.permissions import Perm
from lamina.errors import ImageUnsupported, LaminaError, Refused, StorageError, UsageError
from lamina.hints import Any, ClassVar
from lamina.units import round_up

SIZE = 1 << 20
"""Bytes, of the disk in most tests."""


class NodeConformance:
    """Inherit, implement ``make`` and ``reopen``, and say what differs from these defaults."""

    grows_by_writing: ClassVar[bool] = False
    """A protocol: writing behind the end makes it longer."""
    resizes: ClassVar[bool] = True
    """``truncate`` works, both ways."""
    shrinks: ClassVar[bool] = True
    discards_to_zero: ClassVar[bool] = False
    """What was discarded reads as zeroes: all whole blocks of ``discard_unit`` bytes."""
    discard_unit: ClassVar[int] = 4096
    granularity: ClassVar[int] = 1
    """Offsets and lengths of requests are multiples of this."""
    rounds: ClassVar[int] = 300
    """Operations of a random run."""

    path: Path
    """A directory of the test's own."""

    def make(self, size: int) -> Node:
        """A new writable node, ``size`` bytes long, that reads as zeroes."""
        raise NotImplementedError

    def reopen(self, node: Node) -> Node:
        """Close the node, and open again, writable, what it wrote to."""
        raise NotImplementedError

    # -- what the tests use ----------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _own_directory(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path
        self._open: list[Node] = []
        yield
        for node in self._open:
            node.close()

    def disk(self, size: int = SIZE) -> Node:
        """A node in use by somebody who writes and resizes."""
        return self._used(self.make(size))

    def disk_again(self, node: Node) -> Node:
        return self._used(self.reopen(node))

    def _used(self, node: Node) -> Node:
        self._open.append(node)
        perm = Perm.CONSISTENT_READ | Perm.WRITE | Perm.RESIZE
        node.used_by(None, "test", perm, Perm.ALL)
        return node

    def ranges(self, dice: random.Random, size: int, count: int) -> Iterator[tuple[int, int]]:
        """Offsets and lengths that meet at the edges of blocks, where mistakes live."""
        step = self.granularity
        for _ in range(count):
            unit = dice.choice((step, 512, 4096, 65536))
            offset = round_up(dice.randrange(size // unit) * unit, step)
            offset += dice.choice((0, 0, step, -step))
            length = dice.choice((1, 2, 3, dice.randrange(1, 30))) * dice.choice((step, 512, 4096))
            length = round_up(length + dice.choice((0, 0, step, -step)), step)
            offset = min(max(offset, 0), size - step)
            yield offset, max(min(length, size - offset), step)

    # -- reading and writing ---------------------------------------------------------------------

    def test_new_disk_reads_as_zeroes(self) -> None:
        node = self.disk()
        assert node.size == SIZE
        assert node.read(0, SIZE) == bytes(SIZE)

    def test_small_writes_leave_the_rest_alone(self) -> None:
        node = self.disk()
        node.write(0, b"\xff" * SIZE)
        model = bytearray(b"\xff" * SIZE)
        step = self.granularity
        for offset, length in ((0, step), (4096 - step, 2 * step), (SIZE - step, step)):
            node.write(offset, b"\x01" * length)
            model[offset : offset + length] = b"\x01" * length
        assert node.read(0, SIZE) == model

    @pytest.mark.parametrize("seed", range(4))
    def test_random_requests_agree_with_a_bytearray(self, seed: int) -> None:
        dice = random.Random(seed)
        node = self.disk()
        model = bytearray(SIZE)
        for offset, length in self.ranges(dice, SIZE, self.rounds):
            end = offset + length
            what = dice.choice(("write", "write", "read", "read", "zero", "unmap", "flush"))
            if what == "write":
                data = dice.randbytes(length)
                node.write(offset, data)
                model[offset:end] = data
            elif what == "read":
                assert node.read(offset, length) == model[offset:end], f"{offset}+{length}"
            elif what == "flush":
                node.flush()
            else:
                flags = WriteFlags.MAY_UNMAP if what == "unmap" else WriteFlags.NONE
                node.write_zeroes(offset, length, flags)
                model[offset:end] = bytes(length)
        assert node.read(0, SIZE) == model
        node = self.disk_again(node)
        assert node.read(0, SIZE) == model

    @pytest.mark.parametrize("seed", range(2))
    def test_batches_agree_with_a_bytearray(self, seed: int) -> None:
        dice = random.Random(seed)
        node = self.disk()
        model = bytearray(SIZE)
        for _ in range(self.rounds // 10):
            batch = self._apart(dice)
            writes = [(offset, dice.randbytes(length)) for offset, length in batch]
            node.writev([(offset, memoryview(data)) for offset, data in writes])
            for offset, data in writes:
                model[offset : offset + len(data)] = data
            reads = [(offset, bytearray(length)) for offset, length in self._apart(dice)]
            node.readv([(offset, memoryview(buffer)) for offset, buffer in reads])
            for offset, buffer in reads:
                assert buffer == model[offset : offset + len(buffer)]
        assert node.read(0, SIZE) == model

    def _apart(self, dice: random.Random) -> list[tuple[int, int]]:
        """Ranges that do not overlap, many of them neighbours, in no order."""
        step = self.granularity
        found: list[tuple[int, int]] = []
        offset = 0
        while len(found) < 40:
            offset += dice.choice((0, 0, 0, step, 4096, 20000 // step * step))
            length = dice.choice((step, 512, 4096, 6000 // step * step or step))
            length = round_up(length, step)
            if offset + length > SIZE:
                break
            found.append((offset, length))
            offset += length
        dice.shuffle(found)
        return found

    def test_batch_of_more_requests_than_one_call_takes(self) -> None:
        node = self.disk()
        step = round_up(128, self.granularity)
        count = min(3000, SIZE // step)
        data = random.Random(7).randbytes(count * step)
        node.writev([(at, memoryview(data)[at : at + step]) for at in range(0, count * step, step)])
        buffer = bytearray(count * step)
        node.readv(
            [(at, memoryview(buffer)[at : at + step]) for at in range(0, count * step, step)]
        )
        assert buffer == data

    def test_empty_requests_do_nothing(self) -> None:
        node = self.disk()
        node.readv([])
        node.writev([])
        node.readv([(0, memoryview(bytearray()))])
        node.writev([(0, b"")])
        assert node.read(0, SIZE) == bytes(SIZE)

    @pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "mmap", "array", "odd"])
    def test_any_buffer_will_do(self, kind: str) -> None:
        node = self.disk()
        data = random.Random(1).randbytes(8192)
        node.write(4096, _as_buffer(kind, data))
        assert node.read(4096, 8192) == data

    def test_buffers_are_given_back(self) -> None:
        """A bytearray that somebody still holds on to cannot be resized."""
        node = self.disk()
        for offset, length in ((0, 4096), (512, 512), (4096 - 512, 8192)):
            buffer = bytearray(length)
            with memoryview(buffer) as view:
                node.readv([(offset, view)])
            buffer.append(0)
            del buffer[-1]
            with memoryview(buffer) as view:
                node.writev([(offset, view)])
            buffer.append(0)

    def test_forced_writes(self) -> None:
        node = self.disk()
        node.writev([(4096, b"durable!" * 512)], WriteFlags.FUA)
        node.write_zeroes(8192 - 1024, 1024, WriteFlags.FUA)
        assert node.read(4096, 3072) == b"durable!" * 384
        assert node.read(8192 - 1024, 1024) == bytes(1024)

    def test_what_was_written_is_there_later(self) -> None:
        node = self.disk()
        node.write(SIZE // 2, b"remember" * 1024)
        node.flush()
        again = self.disk_again(node)
        assert again.size == SIZE
        assert again.read(SIZE // 2, 8192) == b"remember" * 1024

    # -- zeroes and discards ---------------------------------------------------------------------

    def test_quick_zeroes_or_none(self) -> None:
        node = self.disk()
        node.write(0, b"x" * SIZE)
        try:
            node.write_zeroes(65536, 131072, WriteFlags.NO_FALLBACK | WriteFlags.MAY_UNMAP)
        except ImageUnsupported:
            assert node.read(0, SIZE) == b"x" * SIZE
        else:
            assert node.read(65536, 131072) == bytes(131072)
        assert node.read(0, 65536) == b"x" * 65536
        assert node.read(65536 + 131072, 65536) == b"x" * 65536

    def test_discards_touch_nothing_else(self) -> None:
        node = self.disk()
        node.write(0, b"x" * SIZE)
        step = self.granularity
        start, end = 65536 + step, 393216 - step
        node.discard(start, end - start)
        assert node.read(0, start) == b"x" * start
        assert node.read(end, SIZE - end) == b"x" * (SIZE - end)
        inside = node.read(start, end - start)
        assert set(inside) <= {0, ord("x")}
        if self.discards_to_zero:
            first = round_up(start, self.discard_unit)
            last = end // self.discard_unit * self.discard_unit
            assert node.read(first, last - first) == bytes(last - first)

    def test_discarded_space_can_be_written_again(self) -> None:
        node = self.disk()
        node.write(0, b"x" * 262144)
        node.discard(0, 262144)
        node.write(65536, b"y" * 65536)
        assert node.read(65536, 65536) == b"y" * 65536

    # -- extents ---------------------------------------------------------------------------------

    def test_extents_tell_the_truth(self) -> None:
        node = self.disk()
        model = bytearray(SIZE)
        dice = random.Random(3)
        for offset, length in self.ranges(dice, SIZE, 30):
            if dice.random() < 0.7:
                data = dice.randbytes(length)
                node.write(offset, data)
                model[offset : offset + length] = data
            else:
                node.write_zeroes(offset, length, WriteFlags.MAY_UNMAP)
                model[offset : offset + length] = bytes(length)
            for start, count in ((0, SIZE), *self.ranges(dice, SIZE, 2)):
                self._check_extents(node.extents(start, count), start, count, model)

    def _check_extents(
        self, found: list[Extent], offset: int, length: int, model: bytearray
    ) -> None:
        assert sum(one.length for one in found) == length
        for one in found:
            assert one.guest_offset == offset
            assert one.length > 0
            content = model[offset : offset + one.length]
            if one.kind is Kind.ZERO:
                assert not any(content)
            elif one.kind is Kind.DATA and one.cipher is None:
                assert one.node is not None
                step = one.node.limits.request_alignment
                if not (one.host_offset | one.length) % step:
                    assert one.node.read(one.host_offset, one.length) == content
            offset += one.length

    def test_columns_are_the_same_as_extents(self) -> None:
        node = self.disk()
        node.write(65536, b"x" * 65536)
        node.write(262144, b"x" * 4096)
        rows: list[tuple[int, int, int]] = []
        for piece in node.columns(0, SIZE):
            columns = (piece.guest_offset, piece.length, piece.kind)
            rows += zip(*(column.tolist() for column in columns), strict=True)
        found = [(one.guest_offset, one.length, int(one.kind)) for one in node.extents(0, SIZE)]
        assert _merged(rows) == _merged(found)

    # -- length ----------------------------------------------------------------------------------

    def test_grown_space_reads_as_zeroes(self) -> None:
        node = self.disk(SIZE)
        if not self.resizes:
            pytest.skip("does not resize")
        node.write(SIZE - 4096, b"x" * 4096)
        node.truncate(2 * SIZE)
        assert node.size == 2 * SIZE
        assert node.read(SIZE - 4096, 8192) == b"x" * 4096 + bytes(4096)
        assert node.read(SIZE, SIZE) == bytes(SIZE)

    def test_cut_space_does_not_come_back(self) -> None:
        if not (self.resizes and self.shrinks):
            pytest.skip("does not shrink")
        node = self.disk(SIZE)
        node.write(0, b"x" * SIZE)
        node.truncate(SIZE // 2)
        assert node.size == SIZE // 2
        node.truncate(SIZE)
        assert node.read(0, SIZE) == b"x" * (SIZE // 2) + bytes(SIZE // 2)

    @pytest.mark.parametrize("mode", list(Preallocation))
    def test_growing_with_preallocation(self, mode: Preallocation) -> None:
        if not self.resizes:
            pytest.skip("does not resize")
        node = self.disk(SIZE)
        node.write(0, b"x" * SIZE)
        try:
            node.truncate(SIZE + 262144, mode)
        except (ImageUnsupported, UsageError):
            assert node.size == SIZE
        else:
            assert node.size == SIZE + 262144
            assert node.read(SIZE, 262144) == bytes(262144)
        assert node.read(0, SIZE) == b"x" * SIZE

    def test_writing_behind_the_end(self) -> None:
        if not self.grows_by_writing:
            pytest.skip("does not grow by being written")
        node = self.disk(SIZE)
        node.write(SIZE + 65536, b"x" * 4096)
        node.write_zeroes(SIZE + 131072, 65536)
        assert node.size == SIZE + 196608
        expected = bytes(65536) + b"x" * 4096 + bytes(196608 - 65536 - 4096)
        assert node.read(SIZE, 196608) == expected
        node.flush()
        again = self.disk_again(node)
        assert again.size == SIZE + 196608
        assert again.read(SIZE, 196608) == expected

    # -- many at once ----------------------------------------------------------------------------

    def test_threads_on_neighbouring_bytes(self) -> None:
        """Writes that share blocks but not bytes must not undo each other."""
        node = self.disk()
        step = round_up(192, self.granularity)
        count, rounds = 8, 12
        span = count * step

        def write(number: int) -> None:
            for turn in range(rounds):
                node.write(turn * span + number * step, bytes([number + 1]) * step)

        _together(write, count)
        row = b"".join(bytes([number + 1]) * step for number in range(count))
        assert node.read(0, rounds * span) == row * rounds

    def test_threads_of_all_kinds(self) -> None:
        """Each thread has a region of its own and holds it against its own model."""
        node = self.disk()
        count = 6
        region = SIZE // count // 4096 * 4096

        def work(number: int) -> None:
            dice = random.Random(number)
            base = number * region
            model = bytearray(region)
            for offset, length in self.ranges(dice, region, self.rounds // 4):
                end = offset + length
                what = dice.choice(("write", "read", "zero", "flush", "extents"))
                if what == "write":
                    data = dice.randbytes(length)
                    node.write(base + offset, data)
                    model[offset:end] = data
                elif what == "read":
                    assert node.read(base + offset, length) == model[offset:end]
                elif what == "zero":
                    node.write_zeroes(base + offset, length, WriteFlags.MAY_UNMAP)
                    model[offset:end] = bytes(length)
                elif what == "flush":
                    node.flush()
                else:
                    assert sum(one.length for one in node.extents(base, region)) == region
            assert node.read(base, region) == model

        _together(work, count)

    # -- users and life --------------------------------------------------------------------------

    def test_info_agrees(self) -> None:
        node = self.disk()
        about = node.info()
        assert about.virtual_size == node.size
        assert about.format == node.driver

    def test_requests_outside_are_refused(self) -> None:
        node = self.make(SIZE)
        with Backend(node, perm=Perm.CONSISTENT_READ | Perm.WRITE) as user:
            step = self.granularity
            for offset, length in ((SIZE, step), (SIZE - step, 2 * step), (-step, step)):
                with pytest.raises(StorageError):
                    user.read(offset, length)
                with pytest.raises(StorageError):
                    user.write(offset, bytes(length))
            assert user.size == SIZE

    def test_who_does_not_write_cannot(self) -> None:
        node = self.make(SIZE)
        with Backend(node) as user:
            with pytest.raises(Refused):
                user.write(0, bytes(4096))
            with pytest.raises(Refused):
                user.write_zeroes(0, 4096)

    def test_the_last_user_closes(self) -> None:
        node = self.make(SIZE)
        first, second = Backend(node), Backend(node)
        first.close()
        assert not node.closed
        assert second.read(0, 4096) == bytes(4096)
        second.close()
        assert node.closed
        node.close()

    def test_reading_only_and_back(self) -> None:
        node = self.disk()
        node.write(0, b"x" * 4096)
        attachment = node.users[0]
        attachment.change(Perm.CONSISTENT_READ, Perm.ALL)
        node.reopen(read_only=True)
        assert node.read_only
        assert node.read(0, 4096) == b"x" * 4096
        with pytest.raises(LaminaError):
            attachment.change(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        node.reopen(read_only=False)
        attachment.change(Perm.CONSISTENT_READ | Perm.WRITE, Perm.ALL)
        node.write(4096, b"y" * 4096)
        assert node.read(0, 8192) == b"x" * 4096 + b"y" * 4096


def _as_buffer(kind: str, data: bytes) -> Any:
    if kind == "bytes":
        return data
    if kind == "bytearray":
        return bytearray(data)
    if kind == "array":
        return memoryview(array("B", data))
    if kind == "mmap":
        area = mmap.mmap(-1, len(data))
        area[:] = data
        return memoryview(area)
    padding = 1 if kind == "odd" else 0  # at an address that suits nobody
    return memoryview(bytearray(bytes(padding) + data))[padding:]


def _merged(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one kind as one."""
    merged: list[tuple[int, int, int]] = []
    for start, length, kind in rows:
        if merged and merged[-1][2] == kind:
            first, so_far, _ = merged.pop()
            merged.append((first, so_far + length, kind))
        else:
            merged.append((start, length, kind))
    return merged


def _together(work: Callable[[int], None], count: int) -> None:
    """Run ``work(0)`` … ``work(count - 1)`` on threads at once; raises what one of them raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
