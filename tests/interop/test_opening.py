"""What is opened, what it is called, and what is said when it is not: as qemu-img has it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.session import Session
from lamina.errors import LaminaError

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("images")
    before = os.getcwd()
    os.chdir(home)

    def create(*arguments: str) -> None:
        subprocess.run(["qemu-img", "create", "-q", *arguments], check=True)

    create("-f", "raw", "a.raw", "1M")
    create("-f", "raw", "b.raw", "3000")
    create("-f", "qcow2", "a.qcow2", "1M")
    create("-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2")
    create("-f", "qcow2", "-b", "a.raw", "-F", "raw", "on-raw.qcow2")
    Path("empty").touch()
    create("-f", "raw", "./odd:name", "1M")
    Path("dir").mkdir()
    create("-f", "qcow2", "-u", "-b", "a.qcow2", "-F", "qcow2", "dir/lost.qcow2", "1M")
    yield home
    os.chdir(before)


def theirs(reference: str, image_opts: bool, format: str | None) -> str:
    """The name that qemu-img shows, or its error without the prefix that names the argument."""
    # map opens backing files as well; its own output does not matter.
    command = ["map", "--max-length=512", "--output=json"]
    arguments = ["--image-opts"] if image_opts else []
    if format:
        arguments += ["-f", format]
    done = subprocess.run(
        ["qemu-img", *command, *arguments, reference], capture_output=True, text=True
    )
    if done.returncode:
        return done.stderr.strip().removeprefix(f"qemu-img: Could not open '{reference}': ")
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", *arguments, reference],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return shape(found["filename"], found["format"], found["virtual-size"])


def shape(filename: str, format: str, size: int) -> str:
    if filename.startswith("json:"):
        filename = "json:" + json.dumps(json.loads(filename[5:]))
    return f"{filename} {format} {size}"


def ours(reference: str, image_opts: bool, format: str | None) -> str:
    said: list[str] = []
    try:
        with Backend.open(
            reference, session=Session(warn=said.append), image_opts=image_opts, format=format
        ) as backend:
            return shape(backend.node.filename, backend.node.driver, backend.size)
    except LaminaError as error:
        return "\n".join([str(error), *([error.hint] if error.hint else [])])


PLAIN = [
    "a.raw",
    "b.raw",
    "empty",
    "./a.raw",
    "file:a.raw",
    "a.qcow2",
    "top.qcow2",
    "on-raw.qcow2",
    "dir/lost.qcow2",
    "nonexistent",
    "dir",
    "",
    "unknown:x",
    "a:b",
    "null-co://",
    "null-co:",
    "null-aio://",
    "file:odd:name",
    "./odd:name",
    "odd:name",
    "file:file:a.raw",
    "file:",
    "blkdebug::file:a.raw",
    "blkdebug::odd:name",
    "blkdebug::a.qcow2",
    "blkdebug::a.raw",
    "blkdebug::top.qcow2",
    "blkdebug:",
    "blkdebug:x",
    "blkdebug:nonexistent:a.raw",
    "blkdebug::nonexistent",
    "json:{bad}",
    "json:[1]",
    "json:",
    'json:{"driver":"qcow2","file.filename":"a.qcow2"}',
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}',
    'json:{"file.filename":"a.qcow2"}',
    'json:{"filename":"a.qcow2"}',
    'json:{"driver":"file","filename":"a.qcow2"}',
    'json:{"driver":"raw","offset":512,"file.filename":"a.raw"}',
    'json:{"driver":"raw","offset":512,"size":1024,"file":{"driver":"file","filename":"a.raw"}}',
    'json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"a.raw"}}}',
    'json:{"driver":"qcow2","file.filename":"top.qcow2","backing":null}',
    'json:{"driver":"qcow2","file.filename":"top.qcow2","backing":"nobody"}',
    'json:{"driver":"qcow2","file.filename":"top.qcow2","backing.foo":1}',
    'json:{"driver":"qcow2","file.filename":"nonexistent"}',
    'json:{"driver":"nope"}',
    'json:{"driver":null}',
    'json:{"driver":"null-co","read-zeroes":true,"size":512}',
]
OPTIONS = [
    "",
    "a.raw",
    "filename=a.raw",
    "driver=raw,filename=a.raw",
    "driver=raw",
    "driver=nope,file.filename=a.raw",
    "driver=raw,file.filename=a.raw",
    "driver=raw,file.driver=file,file.filename=a.raw,file.locking=off",
    "driver=raw,file.filename=a.raw,foo=1",
    "driver=raw,file.filename=a.raw,file.foo=1",
    "driver=raw,file.filename=a.raw,foo.bar=1",
    "driver=raw,file.filename=a.raw,backing.driver=raw",
    "driver=raw,file.filename=a.raw,cache.writeback=off",
    "driver=raw,file.filename=a.raw,cache.no-flush=on,node-name=x,discard=unmap",
    "driver=raw,file.filename=a.raw,read-only=foo",
    "driver=raw,file.filename=a.raw,discard=foo",
    "driver=raw,file.filename=a.raw,detect-zeroes=foo",
    "driver=raw,file.filename=a.raw,detect-zeroes=unmap",
    "driver=raw,file.filename=a.raw,node-name=1x",
    "driver=raw,file.filename=a.raw,node-name=x,file.node-name=x",
    "driver=raw,file.filename=a.raw,node-name=" + 40 * "x",
    "driver=raw,offset=2M,file.filename=a.raw",
    "driver=raw,offset=512k,size=1M,file.filename=a.raw",
    "driver=raw,size=1000,file.filename=a.raw",
    "driver=raw,offset=100,file.filename=a.raw",
    "driver=raw,file.driver=file",
    "driver=raw,file=nobody",
    "driver=raw,file=nobody,file.filename=a.raw",
    "driver=file,filename=a.qcow2",
    "driver=qcow2,file.driver=raw,file.file.filename=a.qcow2",
    "file.driver=raw,file.file.filename=a.qcow2",
    "driver=qcow2,file.filename=a.raw",
    "driver=null-co,size=5M,read-zeroes=on",
    "driver=null-co,latency-ns=-1",
    "driver=null-co,latency-ns=5",
    "driver=raw,file.driver=null-co",
    "driver=qcow2,file.driver=blkdebug,file.opt-discard=512,file.image.filename=a.qcow2",
    "driver=raw,file.driver=null-co,file.size=1M",
    "driver=raw,file.filename=a,,b",
    "driver=raw,file.filename=odd:name",
    "driver=raw,file.driver=file,file.filename=odd:name",
    "driver=raw,file.filename=file:a.raw",
    "driver=raw,file.filename=null-co://",
    "driver=raw,file.driver=raw,file.file.filename=odd:name",
    "driver=blkdebug,image.filename=file:a.raw",
    "driver=qcow2,file.driver=blkdebug,file.image.filename=top.qcow2",
    "driver=qcow2,file.driver=blkdebug,file.align=512,file.image.filename=top.qcow2",
    "driver=blkdebug,image.filename=a.raw",
    "driver=blkdebug",
    "driver=blkdebug,image.filename=a.raw,foo=1",
    "driver=preallocate,file.filename=a.raw",
    "driver=preallocate,file.filename=a.raw,foo=1",
    "driver=preallocate,file.filename=top.qcow2",
    "driver=preallocate",
    "file.driver=preallocate,file.file.filename=top.qcow2",
    "driver=qcow2,file.driver=preallocate,file.file.filename=top.qcow2",
    "driver=qcow2,file.driver=preallocate,file.prealloc-size=1M,file.file.filename=top.qcow2",
    "driver=preallocate,prealloc-align=100,file.filename=a.raw",
]


@pytest.mark.parametrize("reference", PLAIN)
def test_names(reference: str) -> None:
    assert ours(reference, False, None) == theirs(reference, False, None)


@pytest.mark.parametrize("reference", OPTIONS)
def test_options(reference: str) -> None:
    assert ours(reference, True, None) == theirs(reference, True, None)


@pytest.mark.parametrize(
    ("format", "reference"),
    [
        ("raw", "a.qcow2"),
        ("qcow2", "a.raw"),
        ("nope", "a.raw"),
        ("file", "a.raw"),
        ("file", "file:a.raw"),
        ("raw", "odd:name"),
        ("null-co", "null-co://"),
        ("null-co", "a.raw"),
        ("raw", "nonexistent"),
        ("blkdebug", "blkdebug::a.raw"),
        ("blkdebug", "a.raw"),
        ("preallocate", "a.raw"),
        ("raw", 'json:{"driver":"qcow2","file.filename":"a.qcow2"}'),
    ],
)
def test_formats(format: str, reference: str) -> None:
    assert ours(reference, False, format) == theirs(reference, False, format)


@pytest.mark.parametrize(
    "backing",
    [
        "backing.driver=qcow2",
        "backing.driver=nope",
        "backing.file.filename=a.qcow2",
        "backing.file.filename=nonexistent",
        "backing.driver=raw,backing.file.filename=a.raw",
        "backing.driver=qcow2,backing.file.filename=a.raw",
        "backing.driver=qcow2,backing.file.filename=a.qcow2,backing.foo=1",
        "backing=nobody",
    ],
)
def test_backing_files_of_the_users_choice(backing: str) -> None:
    """``info`` opens no backing file, and so refuses what is said about one."""
    reference = f"driver=qcow2,file.filename=top.qcow2,{backing}"
    mapped = subprocess.run(
        ["qemu-img", "map", "--image-opts", reference], capture_output=True, text=True
    )
    expected = mapped.stderr.strip().removeprefix(f"qemu-img: Could not open '{reference}': ")
    opened = ours(reference, True, None)
    assert opened.startswith(expected or ("top.qcow2", "json:"))
    said = subprocess.run(
        ["qemu-img", "info", "--image-opts", reference], capture_output=True, text=True
    )
    if said.returncode:
        with pytest.raises(LaminaError) as caught:
            Backend.open(reference, session=Session(), image_opts=True, inspect=True)
        assert said.stderr.strip().endswith(str(caught.value))
