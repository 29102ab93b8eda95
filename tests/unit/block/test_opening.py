"""Graphs out of names and options, with files that are really there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from lamina.block import registry
from lamina.block.backend import Backend
from lamina.block.driver import Driver
from lamina.block.info import NodeInfo
from lamina.block.node import Node, NodeOptions
from lamina.block.opening import open_node
from lamina.block.options import Type, option
from lamina.block.permissions import Perm
from lamina.block.policy import Policy
from lamina.block.session import Session
from lamina.errors import LaminaError, Refused, UsageError
from lamina.formats.raw import RawNode
from lamina.records import dataclass


@dataclass(frozen=True)
class ToyOptions:
    tune: int = option("tune", Type.NUMBER, 0)


class ToyNode(RawNode):
    """A format that begins with the name of its backing file, one line, maybe empty."""

    driver = "toy"

    def info(self) -> NodeInfo:
        return NodeInfo(self.filename, "toy", self.size)

    def child_permissions(self, role: str, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return Node.child_permissions(self, role, perm, shared)


class ToyDriver(Driver):
    name = "toy"
    Options = ToyOptions
    is_format = True
    supports_backing = True
    strong_options = ()
    opened: list[Any] = []

    def open(self, options: ToyOptions, context: Any) -> Node:
        file = context.open_child("file")
        lists = context.take_options("list.")
        line, _, driver = file.read(0, min(file.size, 512)).partition(b"\n")[0].partition(b"|")
        if line == b"broken":
            raise UsageError("This toy is broken")
        backing = context.open_named(
            "backing",
            line.decode("utf-8", "surrogateescape"),
            driver=driver.decode() or None,
            relative_to=file,
        )
        node = ToyNode(context.node_options, file, 0, None)
        node.attach("file", file)
        if backing is not None:
            node.attach("backing", backing)
        self.opened.append((options, lists, context))
        return node


DRIVER = ToyDriver()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(registry._loaded, "toy", DRIVER)
    registry.register("toy", f"{__name__}:DRIVER")
    registry._loaded["toy"] = DRIVER
    DRIVER.opened.clear()
    yield tmp_path
    del registry._targets["toy"]
    assert open_files(tmp_path) == []


def open_files(home: Path) -> list[str]:
    """What this process has open below ``home``."""
    fds = Path("/proc/self/fd")
    if not fds.exists():
        return []
    names = [os.readlink(fd) for fd in fds.iterdir() if fd.is_symlink()]
    return sorted(name for name in names if name.startswith(str(home)))


def toy(name: str, backing: str = "", format: str = "") -> None:
    line = f"{backing}|{format}\n".encode()
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(line.ljust(1024, b"\0"))


def opened(reference: str | Mapping[str, Any], **how: Any) -> Backend:
    how.setdefault("session", Session(warn=lambda text: None))
    return Backend.open(reference, **how)


# -- children and options --------------------------------------------------------------------------


def test_options_reach_the_driver_and_lists_are_taken() -> None:
    toy("a")
    options = {"driver": "toy", "tune": "0x10", "list": ["x", {"y": 1}], "file.filename": "a"}
    with opened(options) as backend:
        (settled, lists, context), = DRIVER.opened
        assert settled.tune == 16
        assert lists == {"0": "x", "1.y": 1}
        assert context.image_option["list.1.y"] == 1
        assert backend.node.filename == "a"


def test_children_inherit_generic_options() -> None:
    toy("a", "b", "toy")
    toy("b")
    generic = {"cache.no-flush": True, "discard": "unmap", "detect-zeroes": "on"}
    with opened({"driver": "toy", "file.filename": "a", **generic}, writable=True) as backend:
        top, file, below = backend.node, backend.node.file, backend.node.backing
        assert below is not None
        assert (top.options.unmap, top.options.detect_zeroes) == (True, "on")
        for node in (file, below, below.file):
            assert node.options.no_flush
            assert node.options.detect_zeroes == "off"
        assert not file.read_only
        assert file.options.unmap
        assert below.read_only
        assert below.file.read_only


def test_a_child_says_otherwise() -> None:
    toy("a")
    options = {"driver": "toy", "file.filename": "a", "file.discard": "off", "file.read-only": True}
    with opened({**options}) as backend:
        assert not backend.node.file.options.unmap


def test_nodes_are_named_and_referred_to() -> None:
    toy("a")
    session = Session(warn=lambda text: None)
    with opened({"driver": "file", "filename": "a", "node-name": "f"}, session=session) as file:
        with opened({"driver": "toy", "file": "f"}, session=session) as backend:
            assert backend.node.file is file.node
        assert not file.node.closed
        with pytest.raises(UsageError, match="Duplicate nodes with node-name='f'"):
            opened({"driver": "file", "filename": "a", "node-name": "f"}, session=session)
    with pytest.raises(UsageError, match="Cannot find device='f' nor node-name='f'"):
        opened({"driver": "toy", "file": "f"}, session=session)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"driver": "toy"}, 'A block device must be specified for "file"'),
        ({"file.foo": 1}, "Must specify either driver or file"),
        ({"driver": "toy", "file.filename": "a", "foo": 1}, "Block format 'toy' does not support "
         "the option 'foo'"),
        ({"driver": "toy", "file.filename": "a", "file.foo": 1}, "Block protocol 'file' doesn't "
         "support the option 'foo'"),
        ({"driver": "raw", "file.filename": "a", "backing.driver": "raw"},
         "Driver doesn't support backing files"),
        ({"driver": "toy", "file.filename": "a", "tune": "x"}, "Parameter 'tune' expects a number"),
        ({"driver": "toy", "file": "x", "file.filename": "a"}, "Cannot reference an existing block "
         "device with additional options or a new filename"),
        ({"driver": "toy", "file.filename": "broken"}, "This toy is broken"),
    ],
)
def test_nothing_stays_open_after_an_error(options: dict[str, Any], error: str) -> None:
    toy("a")
    toy("broken", "broken")
    with pytest.raises(UsageError) as caught:
        opened(options)
    assert str(caught.value) == error


def test_third_parties_are_found_by_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_third_party", lambda: {"theirs": f"{__name__}:DRIVER"})
    assert registry.is_known("theirs")
    assert registry.driver("theirs").name == "toy"
    registry._loaded.pop("theirs")
    with pytest.raises(UsageError, match="Unknown driver 'nobody'"):
        registry.driver("nobody")


# -- backing files ---------------------------------------------------------------------------------


def test_backing_files_are_found_beside_their_overlay() -> None:
    toy("dir/top", "mid", "toy")
    toy("dir/mid", "../base", "raw")
    toy("base")
    with opened("dir/top", format="toy") as backend:
        mid = backend.node.backing
        assert mid is not None
        assert mid.filename == "dir/mid"
        assert mid.backing is not None
        assert (mid.backing.filename, mid.backing.driver) == ("dir/../base", "raw")


def test_without_a_format_the_backing_file_is_probed() -> None:
    toy("top", "base")
    toy("base")
    with opened("top", format="toy") as backend:
        assert backend.node.backing is not None
        assert backend.node.backing.driver == "raw"
        assert backend.node.backing.options.probed


def test_among_options_a_name_is_that_of_a_file_whatever_it_looks_like() -> None:
    toy("odd:top", "base", "raw")
    toy("base")
    with opened({"driver": "toy", "file.filename": "odd:top"}) as backend:
        assert backend.node.filename == "odd:top"
        assert backend.node.backing is not None
        assert backend.node.backing.filename == "base"
    with opened("file:odd:top", format="toy") as backend:
        assert backend.node.filename == "./odd:top"


def test_a_stored_name_may_be_json() -> None:
    toy("top", "json:{'driver':'raw','size':512,'file.filename':'base'}")
    toy("base")
    with opened("top", format="toy") as backend:
        assert backend.node.backing is not None
        assert backend.node.backing.size == 512


def test_the_user_decides_about_the_backing_file() -> None:
    toy("top", "base", "toy")
    toy("base")
    toy("other")
    named = {"driver": "toy", "file.filename": "top"}
    with opened({**named, "backing": None}) as backend:
        assert backend.node.backing is None
    with opened("top", format="toy", backing=False) as backend:
        assert backend.node.backing is None
    with opened("top", format="toy", inspect=True) as backend:
        assert backend.node.backing is None
    with opened({**named, "backing.file.filename": "other", "backing.driver": "raw"}) as backend:
        assert backend.node.backing is not None
        assert backend.node.backing.filename == "other"
    with opened({**named, "backing.driver": "raw", "backing.node-name": "b"}) as backend:
        assert backend.node.backing is not None
        assert (backend.node.backing.driver, backend.node.backing.name) == ("raw", "b")
        assert backend.node.backing.filename == "base"


def test_errors_say_that_it_was_the_backing_file() -> None:
    toy("top", "mid", "toy")
    toy("mid", "nowhere", "raw")
    with pytest.raises(LaminaError) as caught:
        opened("top", format="toy")
    assert str(caught.value) == (
        "Could not open backing file: Could not open backing file: "
        "Could not open 'nowhere': No such file or directory"
    )


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_loops_end(names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        toy(name, "./" + names[(number + 1) % len(names)], "toy")
    with pytest.raises(UsageError, match=r"Backing file '(\./)+a' creates an infinite loop.$"):
        opened("a", format="toy")


def test_long_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 300
    toy("0")
    for number in range(1, depth + 1):
        toy(str(number), str(number - 1), "toy")
    with opened(str(depth), format="toy", writable=True) as backend:
        node, count = backend.node, 0
        while node.backing is not None:
            node, count = node.backing, count + 1
        assert (node.filename, count) == ("0", depth)
        backend.flush()
    assert node.closed
    monkeypatch.setattr("lamina.block.opening.MAX_CHAIN", 200)
    with pytest.raises(UsageError, match="The backing chain is longer than 200 images"):
        opened(str(depth), format="toy")


def test_nesting_is_bounded() -> None:
    toy("a")
    for depth, fits in ((60, True), (200, False), (1000, False)):
        text = "{'driver':'raw','file':" * depth + "{'driver':'file','filename':'a'}" + "}" * depth
        if fits:
            opened("json:" + text).close()
        else:
            with pytest.raises(UsageError, match="The options are nested too deep"):
                opened("json:" + text)


NASTY = ["a\0b", "\udcff\udcfe", "x" * 300, "x/" * 5000, "new\nline", "\u202e", "~", "%s%n", "."]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("policy", Policy)
def test_nasty_names_are_errors_like_any_other(name: str, policy: Policy) -> None:
    toy("top")
    session = Session(None, policy, print)
    for prefix in ("", "file:", "./"):
        with pytest.raises(LaminaError):
            opened(prefix + name, session=session)
        stored = name.encode("utf-8", "surrogateescape")[:500]
        Path("top").write_bytes(prefix.encode() + stored + b"|raw\n" + bytes(512))
        if b"\n" not in stored:
            with pytest.raises(LaminaError):
                opened("top", format="toy", session=session)


# -- the opening policy ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "beside"),
    [
        ("near", True),
        ("sub/near", True),
        ("../far", False),
        ("near-link", True),
        ("far-link", False),
        ("null-co://", False),
        ("json:{'driver':'raw','file':{'driver':'file','filename':'dir/near'}}", True),
        ("json:{'driver':'raw','offset':512,'file.filename':'dir/near'}", True),
        ("json:{'driver':'file','filename':'dir/near'}", True),
        ("json:{'driver':'raw','file':{'driver':'null-co'}}", False),
        ("json:{'driver':'toy','file.filename':'dir/near','backing.file.filename':'far'}", False),
        ("json:{'driver':'raw','file.filename':'dir/near','file.locking':'off'}", False),
        ("json:{'driver':'raw','file':{'driver':'raw','file':{'driver':'file',"
         "'filename':'dir/near'}}}", False),
    ],
)
def test_names_stored_in_images_pass_the_gate(home: Path, stored: str, beside: bool) -> None:
    for name in ("dir/near", "dir/sub/near", "far"):
        toy(name)
    Path("dir/near-link").symlink_to("near")
    Path("dir/far-link").symlink_to("../far")
    toy("dir/top", stored, "" if stored.startswith("json:") else "raw")

    def try_it(policy: Policy) -> bool:
        try:
            opened("dir/top", format="toy", session=Session(None, policy, print)).close()
        except Refused:
            return False
        return True

    assert try_it(Policy.ALLOW)
    assert try_it(Policy.BESIDE) is beside
    assert not try_it(Policy.DENY)


def test_a_stored_driver_must_be_a_format_when_the_gate_is_not_open(home: Path) -> None:
    toy("top", "near", "blkdebug")
    toy("near")
    opened("top", format="toy").close()
    with pytest.raises(Refused, match="The driver 'blkdebug' of the backing file 'near' is no"):
        opened("top", format="toy", session=Session(None, Policy.BESIDE, print))


def test_the_gate_is_for_names_in_images_not_for_those_of_the_user() -> None:
    toy("dir/top", "../far", "raw")
    toy("far")
    options = {"driver": "toy", "file.filename": "dir/top", "backing.file.filename": "far"}
    with opened({**options, "backing.driver": "raw"}, session=Session(None, Policy.DENY)) as top:
        assert top.node.backing is not None


def test_node_options_of_the_caller_are_the_defaults() -> None:
    toy("a")
    defaults = NodeOptions(read_only=False, no_flush=True)
    session = Session(warn=lambda text: None)
    node = open_node("a", session=session, defaults=defaults, protocol=True)
    assert (node.driver, node.read_only, node.options.no_flush) == ("file", False, True)
    node.close()
