"""blkdebug: what fails, what stops and what is refused, as with qemu-io, command for command."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-io"),
]

OURS = [sys.executable, "-c", "import sys; from lamina.tools.io import main; sys.exit(main())"]
THEIRS = ["qemu-io"]

TOP = "driver=blkdebug,image.driver=file,image.filename=disk"
BELOW_RAW = "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=disk"


@pytest.fixture(autouse=True)
def _disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open("disk", "wb") as file:
        file.truncate(1 << 20)


def run(tool: list[str], arguments: list[str], stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [*tool, *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )
    shown = "\n".join(
        line.replace("qemu-io> ", "")
        for line in done.stdout.splitlines()
        if not re.search(r"\d ops;", line)
    )
    return (
        done.returncode,
        shown,
        done.stderr.replace("lamina-io", "qemu-io").replace("-c: ", "qemu-io: "),
    )


def compare(arguments: list[str], stdin: str = "") -> tuple[int, str, str]:
    ours = run(OURS, arguments, stdin)
    assert ours == run(THEIRS, arguments, stdin)
    return ours


def commands(*each: str) -> list[str]:
    return [part for one in each for part in ("-c", one)]


def inject(number: int, **options: object) -> str:
    return "".join(f",inject-error.{number}.{key}={value}" for key, value in options.items())


def set_state(number: int, **options: object) -> str:
    return "".join(f",set-state.{number}.{key}={value}" for key, value in options.items())


SECTOR_READS = ("read 0 512", "read 512 512", "read 0 1k")
ALL_KINDS = ("read 0 512", "write 0 512", "write -z 0 4k", "discard 0 4k", "read 4k 512")
WRITES = ("write 0 512",) * 4


@pytest.mark.parametrize(
    ("rules", "each"),
    [
        (inject(0, event="none"), ALL_KINDS),
        (inject(0, event="none", once="on"), ALL_KINDS),
        (inject(0, event="none", errno=28), ALL_KINDS),
        (inject(0, event="none", errno=0), ALL_KINDS),
        (inject(0, event="none", immediately="on"), ALL_KINDS),
        *((inject(0, event="none", iotype=kind), ALL_KINDS)
          for kind in ("read", "write", "write-zeroes", "discard", "block-status")),
        (inject(0, event="none", sector=1), (*SECTOR_READS, *ALL_KINDS)),
        (inject(0, event="none", sector=1, once="on"), (*SECTOR_READS, *ALL_KINDS)),
        (inject(0, event="none", sector=-5), ALL_KINDS),
        (inject(0, event="none", state=2), ALL_KINDS),
        (inject(0, event="pwritev"), ALL_KINDS),
        (inject(0, event="pwritev", once="on"), ALL_KINDS),
        (inject(0, event="pwritev_done"), ALL_KINDS),
        (inject(0, event="pwritev_done", once="on"), ALL_KINDS),
        (inject(0, event="pwritev_zero", once="on"), ALL_KINDS),
        (inject(0, event="pwritev", iotype="read", once="on"), (*WRITES, *ALL_KINDS)),
        (inject(0, event="none", errno=28) + inject(1, event="none", errno=13), ALL_KINDS),
        (
            inject(0, event="none", errno=28, once="on")
            + inject(1, event="none", errno=13, once="on"),
            ALL_KINDS,
        ),
        (
            inject(0, event="pwritev", state=2)
            + set_state(0, event="pwritev", state=1, new_state=2),
            WRITES,
        ),
        (
            inject(0, event="pwritev", state=1)
            + set_state(0, event="pwritev", state=1, new_state=2),
            WRITES,
        ),
        (
            set_state(0, event="pwritev", state=1, new_state=2)
            + set_state(1, event="pwritev", state=2, new_state=3)
            + inject(0, event="pwritev", state=3),
            WRITES,
        ),
        (
            set_state(0, event="pwritev", new_state=2)
            + set_state(1, event="pwritev", new_state=3)
            + inject(0, event="pwritev", state=3)
            + inject(1, event="pwritev", state=2, errno=28),
            WRITES,
        ),
        (set_state(0, event="none"), ALL_KINDS),
        (",inject-error.event=none,inject-error.errno=28", ALL_KINDS),
    ],
)  # fmt: skip
def test_what_fails(rules: str, each: tuple[str, ...]) -> None:
    compare(["--image-opts", TOP + rules, *commands(*each)])


@pytest.mark.parametrize(
    ("rules", "each"),
    [
        (
            inject(0, event="pwritev", errno=28) + inject(1, event="read_aio", errno=13),
            ("write 0 512", "discard 0 4k", "read 0 512", "discard 0 4k", "write 0 512"),
        ),
        (
            inject(0, event="pwritev", errno=28, iotype="write")
            + inject(1, event="read_aio", errno=13, iotype="discard"),
            ("write 0 512", "read 0 512", "write -z 0 512", "discard 0 4k", "write 0 512",
             "discard 0 4k"),
        ),
        (
            inject(0, event="pwritev", state=1) + set_state(0, event="read_aio", new_state=2),
            ("write 0 512", "read 0 512", "discard 0 4k", "write 0 512", "discard 0 4k"),
        ),
        (inject(0, event="write_aio", once="on"), ("write -z 0 4k", "write 0 512", "write 0 512")),
        (inject(0, event="read_aio", once="on"), ("write 0 4k", "read 0 512", "read 0 512")),
    ],
)  # fmt: skip
def test_what_fails_below_raw(rules: str, each: tuple[str, ...]) -> None:
    rules = rules.replace(",", ",file.")
    compare(["--image-opts", BELOW_RAW + rules, *commands(*each)])


@pytest.mark.parametrize(
    "options",
    [
        "inject-error.0.event=foo",
        "inject-error.0.event=",
        "inject-error.0.errno=5",
        "set-state.0.new_state=2",
        "inject-error.0.event=none,inject-error.0.iotype=foo",
        "inject-error.0.event=none,inject-error.0.errno=x",
        "inject-error.0.event=none,inject-error.0.state=x",
        "inject-error.0.event=none,inject-error.0.once=maybe",
        "inject-error.0.event=none,inject-error.0.foo=1",
        "set-state.0.event=none,set-state.0.new-state=1",
        "inject-error.7.event=none,inject-error.3.event=none",
        "inject-error.0.event=none,inject-error.foo.event=none",
        "inject-error.0.event=none,inject-error.event=none",
        "set-state.1.event=none",
        "foo=none",
        "config=nowhere",
        "take-child-perms.0=foo",
        "unshare-child-perms.0=foo",
        "align=3",
        "align=4G",
        "align=0",
        "align=1M",
        "max-transfer=3",
        "max-transfer=3G",
        "align=512,max-transfer=513",
        "align=512,opt-write-zero=513",
        "align=512,max-write-zero=513",
        "max-write-zero=10,opt-write-zero=100",
        "align=512,opt-discard=3",
        "align=512,max-discard=7",
        "opt-discard=1M,max-discard=512k",
        "opt-discard=15M,max-discard=30M",
    ],
)
def test_options_that_do_not_fit(options: str) -> None:
    compare(["--image-opts", f"{TOP},{options}", *commands("read 0 1")])


@pytest.mark.parametrize(
    "name", ["blkdebug:", "blkdebug:foo", "blkdebug::nope", "blkdebug:nope:disk",
             "blkdebug::disk", "blkdebug::blkdebug::disk"],
)  # fmt: skip
def test_file_names(name: str) -> None:
    compare(["-f", "raw", *commands("read 0 1", "length"), name])


RULE = '[inject-error]\nevent = "none"\n'


@pytest.mark.parametrize(
    "config",
    [
        RULE,
        RULE + 'once ="on"\n',
        RULE + 'once = "zz"\n',
        RULE + 'errno = "28"\nsector = "1"\nimmediately = "on"',
        RULE + 'errno = "zz"\n',
        RULE + 'iotype = "zz"\n',
        RULE + 'sector = "1k"\n',
        RULE + 'foo = "1"\n',
        RULE + 'foo="1"\n',
        RULE + 'event = "pwritev"\n',
        RULE + '[inject-error]\nevent = "none"\nerrno = "28"\n',
        RULE + "[set-state]\n",
        RULE + '[set-state]\nevent = "none"\nnew_state = "2"\nstate = "1"\n',
        '# c\n\n[inject-error]  \n  event  =   "none" # more \n',
        '[inject-error "x"]\nevent = "none"\n',
        '[inject-error "x"]\nevent = "none"\n[set-state "x"]\nevent = "none"\n',
        '[inject-error "x"]\nevent = "none"\n[inject-error "x"]\nevent = "none"\n',
        "[inject-error]\nevent = none\n",
        "[inject-error]\nevent =\n",
        '[inject-error]\nevent = "none',
        '[inject-error]\nevent "none"\n',
        '[inject-error]\nevent = "nix"\n',
        "[inject-error]\ngarbage\n",
        "[inject-error]\ngarbage =\n",
        '[inject-error]\nerrno = "5"\n',
        '[inject-error\nevent = "none"\n',
        ' [inject-error]\nevent = "none"\n',
        '[ inject-error ]\nevent = "none"\n',
        '[foo]\nevent = "none"\n',
        'event = "none"\n',
        "",
    ],
)
def test_config_files(config: str) -> None:
    Path("rules").write_text(config)
    each = commands("read 0 512", "read 0 513", "write 0 512", "read 0 1")
    compare(["-f", "raw", *each, "blkdebug:rules:disk"])


def test_probing_that_fails() -> None:
    Path("rules").write_text(RULE)
    status, _, errors = compare([*commands("read 0 1"), "blkdebug:rules:disk"])
    assert status == 1
    assert "Could not read image for determining its format: Input/output error" in errors


OPEN = "open -o driver=raw,file.align=4k blkdebug::disk"


@pytest.mark.parametrize(
    "script",
    [
        ["break foo A", "remove_break Z", "resume Z", "break none A", "remove_break A"],
        ["break pwritev A", "aio_write 0 4k", "wait_break A", "aio_write 8k 4k", "sleep 100",
         "resume A", "aio_flush", "resume A"],
        ["break pwritev A", "break pwritev B", "aio_write 0 4k", "wait_break A", "resume A",
         "length", "resume B", "aio_flush"],
        ["break pwritev A", "break pwritev B", "aio_write 0 4k", "wait_break A", "resume B",
         "length", "resume A", "aio_flush"],
        ["break pwritev A", "break pwritev A", "aio_write 0 4k", "wait_break A", "resume A",
         "length", "resume A", "aio_flush", "resume A"],
        ["break pwritev A", "break pwritev_done A", "aio_write 0 4k", "wait_break A",
         "aio_write 8k 4k", "sleep 200", "resume A", "sleep 200", "length", "resume A",
         "aio_flush"],
        ["break pwritev A", "break pwritev_done A", "aio_write 0 4k", "wait_break A",
         "remove_break A", "sleep 200", "length", "aio_write 8k 4k", "aio_flush", "resume A",
         "remove_break A"],
        ["break pwritev_rmw_head A", "aio_write 0x200 0x200", "wait_break A",
         "break pwritev_rmw_tail B", "break pwritev_rmw_after_head C",
         "break pwritev_rmw_after_tail D", "break pwritev E", "break pwritev_done F", "resume A",
         "wait_break B", "resume B", "wait_break C", "resume C", "wait_break D", "resume D",
         "wait_break E", "resume E", "wait_break F", "resume F", "aio_flush"],
        ["break pwritev_rmw_head A", "aio_write -z 0x200 0x2000", "wait_break A",
         "break pwritev_rmw_after_head B", "break pwritev_rmw_tail C",
         "break pwritev_rmw_after_tail D", "break pwritev E", "break pwritev_zero F", "resume A",
         "wait_break B", "resume B", "wait_break C", "resume C", "wait_break D", "resume D",
         "wait_break E", "resume E", "wait_break F", "resume F", "aio_flush"],
        ["break pwritev_rmw_after_tail A", "aio_write -P 10 0 512", "wait_break A",
         "aio_write -P 11 512 512", "aio_write -P 12 1024 512", "sleep 100", "resume A",
         "aio_flush", "read -P 10 0 512", "read -P 11 512 512", "read -P 12 1024 512",
         "read -P 0 1536 2560"],
        ["break read_aio A", "aio_read 0 4k", "wait_break A", "resume A", "aio_flush"],
        ["break write_aio A", "aio_write 0 4k", "wait_break A", "resume A", "aio_flush"],
    ],
)  # fmt: skip
def test_breakpoints(script: list[str]) -> None:
    compare([], "\n".join([OPEN, *script, ""]))
