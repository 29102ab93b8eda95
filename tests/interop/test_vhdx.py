"""VHDX between us, QEMU, and two readers for what QEMU cannot open: libvhdi and dissect."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from lamina.block.backend import Backend
from lamina.block.creation import create_image
from lamina.block.extents import Kind
from lamina.block.session import Session
from lamina.formats.vhdx.layout import HEADER_OFFSETS, parse_header
from lamina.testing.crash import CrashFile, GuestLog, power_cuts
from lamina.testing.memory import MemoryFile
from lamina.tools import img
from lamina.tools.tool import Tool
from lamina.units import KIB, MIB
from tests.interop.samples import sample
from tests.unit.vhdx.images import READ_ONLY, logged, make, open_image

pytestmark = pytest.mark.peer

SIZE = 20 * MIB + 512 * 24


@pytest.fixture
def session() -> Session:
    return Session(warn=lambda text: None)


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def lamina_img(*words: object) -> None:
    assert Tool("lamina-img").run(img.run, [str(word) for word in words]) == 0


def qemu_says_it_is_whole(image: Path) -> None:
    assert run("qemu-img", "check", "-f", "vhdx", image) == "No errors were found on the image.\n"


def exercise(disk: Backend, content: bytearray, rng: random.Random, step: int) -> None:
    for _ in range(40):
        offset = rng.randrange(0, SIZE - 1, step)
        length = min(rng.randrange(1, 300_000), SIZE - offset)
        payload = rng.choice([rng.randbytes(length), bytes(length)])
        content[offset : offset + length] = payload
        disk.write(offset, payload)
    start = rng.randrange(8) * 2 * MIB
    disk.write_zeroes(start, 2 * MIB)
    content[start : start + 2 * MIB] = bytes(2 * MIB)


CREATED: list[tuple[str, dict[str, str]]] = [
    ("us", {"block_size": "1M"}),
    ("us", {"block_size": "2M", "block_state_zero": "off", "log_size": "3M"}),
    ("us", {"block_size": "2M", "subformat": "fixed"}),
    ("qemu", {"block_size": "1M"}),
    ("qemu", {"block_size": "4M", "subformat": "fixed"}),
    ("qemu", {"block_size": "2M", "subformat": "fixed", "block_state_zero": "off"}),
]


@pytest.mark.parametrize(("maker", "options"), CREATED)
def test_both_ways(
    tmp_path: Path, session: Session, maker: str, options: dict[str, str]
) -> None:
    image, raw = tmp_path / "image.vhdx", tmp_path / "out.raw"
    if maker == "us":
        create_image(str(image), "vhdx", session=session, options=options, size=SIZE)
    else:
        given = ",".join(f"{key}={value}" for key, value in options.items())
        run("qemu-img", "create", "-q", "-f", "vhdx", "-o", given, image, SIZE)
    content = bytearray(SIZE)
    rng = random.Random(str(options))
    before = image.stat().st_size

    def check() -> None:
        qemu_says_it_is_whole(image)
        run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", image, raw)
        assert raw.read_bytes() == content

    with Backend.open(str(image), session=session, format="vhdx", writable=True) as disk:
        exercise(disk, content, rng, 1)
        assert disk.read(0, SIZE) == content
    check()
    writes = []
    for _ in range(20):
        offset = rng.randrange(0, SIZE - 70_000, 512)
        length = rng.randrange(512, 60_000, 512)
        pattern = rng.randrange(1, 256)
        content[offset : offset + length] = bytes([pattern]) * length
        writes += ["-c", f"write -P {pattern} {offset} {length}"]
    run("qemu-io", "-f", "vhdx", *writes, image)
    with Backend.open(str(image), session=session, format="vhdx", writable=True) as disk:
        assert disk.read(0, SIZE) == content
        exercise(disk, content, rng, 512)
    check()
    if options.get("subformat") == "fixed" and maker == "us":
        assert image.stat().st_size == before, "a fixed image has room for all of its blocks"


@pytest.mark.parametrize("size", ["1M", "1000", "3G", "200G", "40T"])
@pytest.mark.parametrize("options", ["", "block_size=2M,log_size=2500k", "block_state_zero=off"])
def test_same_layout_as_qemu(tmp_path: Path, session: Session, size: str, options: str) -> None:
    """Everything is where QEMU puts it; GUIDs, and what depends on them, are nobody's."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    given = dict(pair.split("=") for pair in options.split(",") if pair)
    create_image(str(ours), "vhdx", session=session, options={**given, "size": size})
    words = ["-o", options] if options else []
    run("qemu-img", "create", "-q", "-f", "vhdx", *words, theirs, size)
    assert ours.stat().st_size == theirs.stat().st_size
    one, other = (_without_guids(path) for path in (ours, theirs))
    assert one == other


def _without_guids(path: Path) -> list[object]:
    with open(path, "rb") as file:

        def at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        found: list[object] = [at(0, 8)]
        for offset in HEADER_OFFSETS:
            header = parse_header(at(offset, 4096))
            assert header is not None
            found += [header.log_offset, header.log_length, header.log_guid, header.log_version]
        # Entries without the flag "required", which QEMU does not set, and the checksum.
        for offset in (192 * KIB, 256 * KIB):
            table = at(offset, 64 * KIB)
            found.append(table[:4] + table[8:44] + table[48:76] + table[80:])
        bat, bat_length = (int.from_bytes(table[at : at + 4], "little") for at in (32, 40))
        metadata = int.from_bytes(table[64:68], "little")
        found.append(at(bat, min(bat_length, 4 * MIB)))
        items = at(metadata, 65 * KIB)
        found.append(items[: 64 * KIB + 16] + items[64 * KIB + 32 :])
        return found


# -- logs ------------------------------------------------------------------------------------------


def test_qemu_replays_our_logs(tmp_path: Path) -> None:
    """After a power cut QEMU finds what we find, also where one change of metadata took several
    entries."""
    size = 32 << 30

    def workload(file: CrashFile, guest: GuestLog) -> None:
        disk = open_image(file)
        for number in range(2):
            guest.write(disk, number * MIB, b"x" * 512)
            guest.flush(disk)
        disk.write_zeroes(8 * MIB, size - 8 * MIB)
        guest.write(disk, 5 * MIB, b"y" * 512)
        guest.flush(disk)
        guest.discard(disk, 0, MIB)
        guest.flush(disk)
        disk.truncate(2 * size)
        disk.close()

    initial = make(size, block_state_zero=False)
    head = 6 * MIB
    replayed = 0
    for cut in power_cuts(workload, initial=initial, guest_content=bytes(head), subsets=0):
        if not open_image(MemoryFile(cut.content), node_options=READ_ONLY).mapping.image.replayed:
            continue
        found = compare_replays(cut.content, tmp_path / "cut.vhdx", head)
        cut.verify(found)
        replayed += 1
    assert replayed > 10


def compare_replays(content: bytes, image: Path, length: int) -> bytes:
    """Have QEMU and us carry out a log; what the disk then reads as."""
    image.write_bytes(content)
    run("qemu-img", "check", "-q", "-r", "all", "-f", "vhdx", image)
    qemu_says_it_is_whole(image)
    theirs = image.read_bytes()
    disk = open_image(MemoryFile(content), node_options=READ_ONLY)
    found = disk.read(0, length)
    file = MemoryFile(content)
    open_image(file).close()
    # All but the headers, which have other GUIDs, and the log, which is not needed any more.
    assert file.content[192 * KIB : MIB] == theirs[192 * KIB : MIB]
    ours = bytes(file.content[2 * MIB :])
    # QEMU does not make the file longer for what the entry says but does not need.
    assert ours == theirs[2 * MIB :].ljust(len(ours), b"\0")
    assert open_image(MemoryFile(theirs), node_options=READ_ONLY).read(0, length) == found
    return found


ENTRIES = {
    "one": [(0, 1, 0)],
    "somewhere": [(40960, 7, 40960)],
    "over the end": [(MIB - 8192, 1, MIB - 8192)],
    "several": [(0, 5, 0), (12288, 6, 0), (24576, 7, 0)],
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_logs_of_others(tmp_path: Path, kind: str) -> None:
    """Entries of two data descriptors and one for zeroes, where we do not write them."""
    content = logged(make(4 << 30), ENTRIES[kind])
    compare_replays(content, tmp_path / "log.vhdx", MIB)


def unpacked(name: str, tmp_path: Path) -> Path:
    path = tmp_path / f"{name}.vhdx"
    path.write_bytes(sample(f"{name}.vhdx"))
    return path


@pytest.mark.parametrize("name", ["iotest-dynamic-1G", "test-disk2vhd"])
def test_samples_of_others(tmp_path: Path, session: Session, name: str) -> None:
    """Written by Hyper-V and by disk2vhd."""
    image = unpacked(name, tmp_path)
    raw = tmp_path / "theirs.raw"
    run("qemu-img", "convert", "-O", "raw", image, raw)
    with Backend.open(str(image), session=session) as disk, open(raw, "rb") as expected:
        assert disk.node.driver == "vhdx"
        for extent in disk.node.extents(0, disk.size):
            if extent.kind is not Kind.DATA:
                continue
            for offset in range(extent.guest_offset, extent.end, 8 * MIB):
                length = min(8 * MIB, extent.end - offset)
                expected.seek(offset)
                assert disk.read(offset, length) == expected.read(length)
    run("qemu-img", "compare", "-f", "vhdx", "-F", "raw", image, raw)


def test_dirty_sample(tmp_path: Path, session: Session) -> None:
    """A log that QEMU left behind: read in memory, then carried out as QEMU does it."""
    ours = unpacked("iotest-dirtylog-10G-4M", tmp_path)
    theirs = tmp_path / "theirs.vhdx"
    shutil.copy(ours, theirs)
    before = ours.read_bytes()
    with Backend.open(str(ours), session=session) as disk:
        in_memory = disk.read(0, 16 * MIB)
    assert ours.read_bytes() == before
    with Backend.open(str(ours), session=session, writable=True) as disk:
        assert disk.read(0, 16 * MIB) == in_memory
    run("qemu-img", "check", "-q", "-r", "all", theirs)
    one, other = ours.read_bytes(), theirs.read_bytes()
    # Sequence numbers and GUIDs differ.
    assert one[: 64 * KIB] == other[: 64 * KIB]
    assert one[192 * KIB :] == other[192 * KIB :]


# -- differencing images and large sectors ---------------------------------------------------------


@pytest.mark.parametrize("sector", [512, 4096])
def test_differencing(tmp_path: Path, session: Session, sector: int) -> None:
    """QEMU opens neither differencing images nor large sectors: two others read them.

    To libvhdi a block of zeroes above a parent is the parent's: there it is not asked. Dissect
    reads nothing at all where a parent with large sectors has a block of zeroes.
    """
    rng = random.Random(sector)
    size = 9 * MIB
    content = bytearray(size)
    names = [tmp_path / f"{name}.vhdx" for name in ("base", "middle", "top")]
    zeroed: list[int] = []
    for number, path in enumerate(names):
        if number:
            below = names[number - 1].name
            options = {"block_size": "1M", "backing_file": below, "backing_fmt": "vhdx"}
        else:
            options = {"block_size": "1M", "logical_sector_size": str(sector), "size": str(size)}
        create_image(str(path), "vhdx", session=session, options=options)
        with Backend.open(str(path), session=session, writable=True) as disk:
            for _ in range(25):
                offset = rng.randrange(size - 1)
                length = min(rng.choice([1, 600, 5000, 70_000, MIB]), size - offset)
                payload = rng.randbytes(length)
                content[offset : offset + length] = payload
                disk.write(offset, payload)
            start = rng.randrange(8) * MIB
            disk.write_zeroes(start, MIB)
            content[start : start + MIB] = bytes(MIB)
            zeroed += [start] if number else []
            assert disk.read(0, size) == content
        expected = _blank(content, zeroed)
        assert _blank(_by_libvhdi(names[: number + 1], size), zeroed) == expected
        if sector == 512 or not number:
            assert _by_dissect(path, size) == content
    # Without any parent, nothing is left that these readers get wrong.
    lamina_img("rebase", "-b", "", names[-1])
    for name in names[:-1]:
        name.unlink()
    assert _by_libvhdi(names[-1:], size) == content
    assert _by_dissect(names[-1], size) == content
    with Backend.open(str(names[-1]), session=session) as disk:
        assert disk.node.info().backing_filename is None
    if sector == 512:
        qemu_says_it_is_whole(names[-1])
        raw = tmp_path / "raw"
        raw.write_bytes(content)
        run("qemu-img", "compare", "-f", "vhdx", "-F", "raw", names[-1], raw)


def _blank(content: bytes | bytearray, blocks: list[int]) -> bytes:
    copy = bytearray(content)
    for start in blocks:
        copy[start : start + MIB] = bytes(MIB)
    return bytes(copy)


def _by_dissect(path: Path, size: int) -> bytes:
    from dissect.hypervisor.disk.vhdx import VHDX

    disk = VHDX(path)
    assert disk.size == size
    found = []
    for offset in range(0, size, 4 * KIB):
        # Longer reads over many runs of sectors come out shifted.
        disk.seek(offset)
        found.append(disk.read(4 * KIB))
    return b"".join(found)


def _by_libvhdi(chain: list[Path], size: int) -> bytes:
    import pyvhdi

    parent = None
    for path in chain:
        disk = pyvhdi.file()
        disk.open(str(path))
        if parent is not None:
            assert disk.get_parent_identifier() == parent.get_identifier()
            disk.set_parent(parent)
        parent = disk
    assert parent is not None
    assert parent.get_media_size() == size
    data: bytes = parent.read_buffer_at_offset(size, 0)
    return data


# -- conversions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["raw", "qcow2"])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_conversions(tmp_path: Path, other: str, subformat: str) -> None:
    first, ours, back = (tmp_path / name for name in ("first", "image.vhdx", "back"))
    rng = random.Random(other)
    with open(tmp_path / "raw", "wb") as file:
        file.truncate(SIZE)
        for _ in range(6):
            file.seek(rng.randrange(SIZE - MIB))
            file.write(rng.randbytes(rng.randrange(MIB)))
    run("qemu-img", "convert", "-f", "raw", "-O", other, tmp_path / "raw", first)
    to = ["-O", "vhdx", "-o", f"subformat={subformat}"]
    lamina_img( "convert", "-f", other, *to, first, ours)
    qemu_says_it_is_whole(ours)
    run("qemu-img", "compare", "-f", other, "-F", "vhdx", first, ours)
    # Blocks are written as far as there is data in them.
    assert ours.stat().st_blocks * 512 < (tmp_path / "raw").stat().st_blocks * 512 + 2 * MIB
    lamina_img( "convert", "-f", "vhdx", "-O", other, ours, back)
    run("qemu-img", "compare", "-f", other, "-F", other, first, back)
    theirs = tmp_path / "theirs.vhdx"
    run("qemu-img", "convert", "-f", other, *to, first, theirs)
    lamina_img( "compare", "-f", other, "-F", "vhdx", first, theirs)


# -- what the tools say ----------------------------------------------------------------------------

COMMANDS = [
    "create -f vhdx x.vhdx 1G",
    "create -f vhdx x.vhdx",
    "create -f vhdx x.vhdx 65T",
    "create -f vhdx -o subformat=fixed,block_state_zero=off x.vhdx 20M",
    "create -f vhdx -o subformat=foo x.vhdx 1G",
    "create -f vhdx -o block_size=3M x.vhdx 1G",
    "create -f vhdx -o block_size=1000,log_size=1000 x.vhdx 1G",
    "create -f vhdx -o block_size=512M x.vhdx 1G",
    "create -f vhdx -o log_size=5G x.vhdx 1G",
    "create -f vhdx -o block_state_zero=maybe x.vhdx 1G",
    "create -f vhdx -o foo=1 x.vhdx 1G",
    "info new.vhdx",
    "info used.vhdx --output json",
    "check used.vhdx",
    "check used.vhdx --output json",
    "check -r all used.vhdx",
    "compare used.vhdx used.vhdx",
    "snapshot -l used.vhdx",
    "snapshot -c one used.vhdx",
    "amend -o size=2G used.vhdx",
    "convert -c -O vhdx used.vhdx x.vhdx",
    "commit used.vhdx",
]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gallery")
    run("qemu-img", "create", "-q", "-f", "vhdx", home / "new.vhdx", "1G")
    run("qemu-img", "create", "-q", "-f", "vhdx", home / "used.vhdx", "1G")
    run("qemu-io", "-f", "vhdx", "-c", "write 0 1M", "-c", "write 500M 64k", home / "used.vhdx")
    return home


@pytest.mark.parametrize("line", COMMANDS)
def test_same_words_as_qemu(
    line: str,
    gallery: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = []
    for who in ("theirs", "ours"):
        folder = tmp_path / who
        folder.mkdir()
        subprocess.run(["cp", "--sparse=always", *gallery.iterdir(), folder], check=True)
        monkeypatch.chdir(folder)
        words = line.split()
        if who == "theirs":
            done = subprocess.run(["qemu-img", *words], capture_output=True, text=True)
            said.append((done.returncode, done.stdout, done.stderr))
        else:
            capfd.readouterr()
            code = Tool("/usr/local/bin/qemu-img").run(img.run, words)
            said.append((code, *capfd.readouterr()))
    assert said[1] == said[0]
