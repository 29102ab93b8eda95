"""Who may open an image that somebody else has open: the same as among QEMU's tools."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.permissions import Perm
from lamina.block.session import Session
from lamina.errors import Busy, LaminaError

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(sys.platform != "linux", reason="open file description locks"),
    pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io"),
]


class User(NamedTuple):
    """A way of having an image open."""

    format: str
    writable: bool
    force_share: bool = False

    @property
    def flags(self) -> list[str]:
        flags = [] if self.writable else ["-r"]
        return [*flags, "-U"] if self.force_share else flags


USERS = [
    User("raw", True),
    User("raw", False),
    User("raw", False, True),
    User("qcow2", True),
    User("qcow2", False),
    User("qcow2", False, True),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("locks") / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


@contextmanager
def theirs(image: Path, user: User) -> Iterator[None]:
    """A qemu-io that has the image open."""
    command = ["qemu-io", "-f", user.format, *user.flags, str(image)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            holder.stdin.write("length\n")
            holder.stdin.flush()
            assert "iB" in holder.stdout.readline()
            yield
        finally:
            holder.stdin.close()


@contextmanager
def ours(image: Path, user: User) -> Iterator[Backend]:
    backend = Backend.open(
        str(image),
        session=Session(),
        format=user.format,
        writable=user.writable,
        force_share=user.force_share,
    )
    with backend:
        yield backend


HOLDERS = {"theirs": theirs, "ours": ours}


def try_theirs(image: Path, user: User) -> str:
    command = ["qemu-io", "-f", user.format, *user.flags, "-c", "length", str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.removeprefix(f"qemu-io: can't open device {image}: ").strip()


def try_ours(image: Path, user: User) -> str:
    try:
        with ours(image, user):
            return ""
    except LaminaError as error:
        return "\n".join(filter(None, (str(error), error.hint)))


def locked_bytes(image: Path) -> set[int]:
    inode = str(image.stat().st_ino)
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        match = re.search(r"OFDLCK\s+\S+\s+READ\s+\S+\s+\S+:\S+:(\d+)\s+(\d+)\s+(\d+)", line)
        if match and match[1] == inode:
            found.update(range(int(match[2]), int(match[3]) + 1))
    return found


@pytest.mark.parametrize("user", USERS, ids=str)
def test_the_same_bytes_are_locked(image: Path, user: User) -> None:
    with theirs(image, user):
        expected = locked_bytes(image)
    assert expected
    with ours(image, user):
        assert locked_bytes(image) == expected
    assert locked_bytes(image) == set()


@pytest.mark.parametrize("first", USERS, ids=str)
def test_second_users_hear_the_same(image: Path, first: User) -> None:
    with theirs(image, first):
        expected = [try_theirs(image, second) for second in USERS]
        assert [try_ours(image, second) for second in USERS] == expected
    with ours(image, first):
        assert [try_theirs(image, second) for second in USERS] == expected
        assert [try_ours(image, second) for second in USERS] == expected


def test_some_pairs_do_exclude_each_other(image: Path) -> None:
    """Lest the comparison above compares nothing with nothing."""
    with ours(image, User("qcow2", True)):
        assert 'Failed to get "write" lock' in try_theirs(image, User("qcow2", True))
        assert 'Failed to get shared "write" lock' in try_theirs(image, User("qcow2", False))
        assert try_theirs(image, User("qcow2", False, True)) == ""


@pytest.mark.parametrize("holder", ["theirs", "ours"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_creating_over_an_image_in_use(
    image: Path, tmp_path: Path, holder: str, format: str
) -> None:
    target = tmp_path / "busy"
    shutil.copy(image, target)
    content = target.read_bytes()
    with HOLDERS[holder](target, User("qcow2", True)):
        done = subprocess.run(
            ["qemu-img", "create", "-q", "-f", format, target, "2M"], capture_output=True, text=True
        )
        assert done.returncode == 1
        with pytest.raises(Busy) as caught:
            create_image(str(target), format, session=Session(), size=2 << 20)
        message = f"qemu-img: {target}: {caught.value}\n{caught.value.hint}\n"
        assert message == done.stderr
        assert target.read_bytes() == content


def test_locking_off(image: Path) -> None:
    options = f"driver=raw,file.driver=file,file.filename={image},file.locking=off"
    with theirs(image, User("qcow2", True)):
        before = locked_bytes(image)
        with Backend.open(options, image_opts=True, session=Session(), writable=True):
            assert locked_bytes(image) == before


def test_a_node_of_this_process_counts_as_another_user(image: Path) -> None:
    with ours(image, User("qcow2", True)):
        assert 'Failed to get "write" lock' in try_ours(image, User("qcow2", True))


def test_locks_follow_a_reopened_file(image: Path) -> None:
    writer, reader = User("raw", True), User("raw", False)
    with theirs(image, reader):
        reading = locked_bytes(image)
    with theirs(image, writer):
        writing = locked_bytes(image)
    with ours(image, reader) as backend:
        backend.reopen(writable=True)
        assert locked_bytes(image) == writing
        backend.write(0, backend.read(0, 512))
        backend.reopen(writable=False)
        assert locked_bytes(image) == reading


def test_a_writer_that_is_not_welcome_stays_a_reader(image: Path) -> None:
    with ours(image, User("raw", False)) as backend, theirs(image, User("qcow2", False)):
        with pytest.raises(Busy):
            backend.reopen(writable=True)
        assert backend.read_only
        assert backend.read(0, 4) == b"QFI\xfb"
        assert locked_bytes(image) == {100, 201, 203}


def test_a_failed_change_leaves_the_locks_alone(image: Path) -> None:
    with ours(image, User("raw", False)) as backend, theirs(image, User("raw", True)):
        before = locked_bytes(image)
        with pytest.raises(Busy, match='Failed to get shared "write" lock'):
            backend.change_permissions(Perm.CONSISTENT_READ, Perm.CONSISTENT_READ)
        assert locked_bytes(image) == before


def test_descriptors_are_not_inherited(image: Path) -> None:
    """A child process would keep the locks alive."""
    with ours(image, User("raw", False)) as backend:
        backend.reopen(writable=True)
        for name in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{name}") == str(image):
                    assert not os.get_inheritable(int(name))
            except FileNotFoundError:
                pass
