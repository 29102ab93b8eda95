"""Bundles: DiskDescriptor.xml, the images it names, and the snapshots they make."""

from __future__ import annotations

import contextlib
import random

import pytest

import lamina
from lamina.block.extents import Kind
from lamina.block.node import NodeOptions
from lamina.block.opening import open_node
from lamina.block.policy import Policy
from lamina.block.probing import probe
from lamina.block.registry import driver
from lamina.block.session import Session
from lamina.errors import ImageCorrupt, ImageUnsupported, LaminaError, Refused
from lamina.formats.parallels.descriptor import NOBODY, TOP, parse_descriptor
from lamina.testing.memory import MemoryFile
from lamina.testing.readers import ReaderConformance
from tests.unit.parallels.images import empty_image, open_image

SIZE = 64 << 10
UNIT = 1024
ROOT = "{11111111-2222-3333-4444-555555555555}"
MIDDLE = "{aaaaaaaa-2222-3333-4444-555555555555}"


def descriptor(
    images: list[tuple[str, str, str]],
    shots: list[tuple[str, str]],
    *,
    size: int = SIZE,
    top: str | None = None,
    extra: str = "",
) -> str:
    sectors = size // 512
    named = "".join(
        f"<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{name}</File></Image>"
        for guid, kind, name in images
    )
    tree = "".join(
        f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"
        for guid, parent in shots
    )
    tops = f"<TopGUID>{top}</TopGUID>" if top else ""
    return (
        "<?xml version='1.0' encoding='UTF-8'?>\n<Parallels_disk_image Version=\"1.0\">"
        f"<Disk_Parameters><Disk_size>{sectors}</Disk_size><Cylinders>1</Cylinders>"
        f"<Heads>1</Heads><Sectors>{sectors}</Sectors><Padding>0</Padding></Disk_Parameters>"
        f"<StorageData><Storage><Start>0</Start><End>{sectors}</End>"
        f"<Blocksize>{UNIT // 512}</Blocksize>{named}</Storage></StorageData>"
        f"<Snapshots>{tops}{tree}</Snapshots>{extra}</Parallels_disk_image>"
    )


def write_image(path, content: bytes, blocks, *, by_cluster: bool = True) -> None:
    """An image that holds these blocks of the content."""
    file = MemoryFile(empty_image(len(content), by_cluster=by_cluster))
    disk = open_image(file)
    for block in blocks:
        start = block * UNIT
        if start < len(content):
            disk.write(start, content[start : start + UNIT])
    disk.close()
    path.write_bytes(file.content)


class Bundle:
    """Three images: each overlay changes some blocks of what is below it."""

    def __init__(self, home, size: int = SIZE) -> None:
        rng = random.Random(size)
        self.home = home
        blocks = size // UNIT
        states = [bytearray(size) for _ in range(3)]
        for number, share in enumerate((0.6, 0.3, 0.2)):
            if number:
                states[number][:] = states[number - 1]
            changed = [block for block in range(blocks) if rng.random() < share]
            for block in changed:
                states[number][block * UNIT : (block + 1) * UNIT] = rng.randbytes(UNIT)
            write_image(home / f"{number}.hds", bytes(states[number]), changed,
                        by_cluster=number != 1)
        self.states = [bytes(state) for state in states]
        images = [(ROOT, "Compressed", "0.hds"), (MIDDLE, "Compressed", "1.hds")]
        images.append((TOP, "Compressed", "2.hds"))
        shots = [(ROOT, NOBODY), (MIDDLE, ROOT), (TOP, MIDDLE)]
        self.path = home / "DiskDescriptor.xml"
        self.path.write_text(descriptor(images, shots, size=size))

    def open(self, **options):
        defaults = NodeOptions(read_only=True)
        return open_node(str(self.path), session=Session(), defaults=defaults, **options)


class TestBundle(ReaderConformance):
    def make(self, content):
        write_image(self.path / "top.hds", content, range(0, len(content) // UNIT, 2))
        write_image(self.path / "below.hds", content, range(1, len(content) // UNIT, 2))
        images = [(ROOT, "Compressed", "below.hds"), (TOP, "Compressed", "top.hds")]
        text = descriptor(images, [(TOP, ROOT), (ROOT, NOBODY)], size=len(content))
        (self.path / "DiskDescriptor.xml").write_text(text)
        defaults = NodeOptions(read_only=True)
        path = str(self.path / "DiskDescriptor.xml")
        return open_node(path, session=Session(), defaults=defaults)

    def test_info(self):
        info = self.node.info()
        assert info.virtual_size == self.size
        assert [one.id for one in info.snapshots] == [ROOT]


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path)


def test_snapshots(bundle):
    node = bundle.open()
    assert node.driver == "parallels"
    assert [one.name for one in node.info().snapshots] == [ROOT, MIDDLE]
    assert node.read(0, SIZE) == bundle.states[2]
    for guid, state in ((MIDDLE, 1), (ROOT, 0), (TOP, 2)):
        driver("parallels").load_snapshot(node, guid)
        assert node.read(0, SIZE) == bundle.states[state]
    with pytest.raises(ImageUnsupported, match="Can't find snapshot"):
        driver("parallels").load_snapshot(node, "something")
    node.close()


def test_a_plain_root_that_is_short(tmp_path):
    content = random.Random(1).randbytes(SIZE - 5000)
    (tmp_path / "root.raw").write_bytes(content)
    write_image(tmp_path / "top.hds", b"t" * SIZE, [3, 9])
    images = [(ROOT, "Plain", "root.raw"), (MIDDLE, "Compressed", "top.hds")]
    text = descriptor(images, [(ROOT, NOBODY), (MIDDLE, ROOT)], top=MIDDLE)
    (tmp_path / "DiskDescriptor.xml").write_text(text)
    defaults = NodeOptions(read_only=True)
    node = open_node(
        str(tmp_path / "DiskDescriptor.xml"), session=Session(), defaults=defaults
    )
    expected = bytearray(content.ljust(SIZE, b"\0"))
    for block in (3, 9):
        expected[block * UNIT : (block + 1) * UNIT] = b"t" * UNIT
    assert node.read(0, SIZE) == expected
    assert node.extents(SIZE - 4096, 4096)[-1].kind is Kind.ZERO
    node.close()


def test_inspecting_opens_no_image(bundle):
    for name in ("0.hds", "1.hds", "2.hds"):
        (bundle.home / name).unlink()
    info = lamina.inspect(bundle.path)
    assert (info.virtual_size, info.format) == (SIZE, "parallels")
    with pytest.raises(LaminaError, match="No such file"):
        bundle.open()


def test_not_for_writing(bundle):
    defaults = NodeOptions(read_only=False)
    with pytest.raises(Refused, match="Image is read-only"):
        open_node(str(bundle.path), session=Session(), defaults=defaults)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.hds", "link.hds"])
def test_names_pass_the_policy(tmp_path, name):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "outside.hds").write_bytes(empty_image(SIZE))
    (home / "link.hds").symlink_to(tmp_path / "outside.hds")
    path = home / "DiskDescriptor.xml"
    path.write_text(descriptor([(TOP, "Plain", name)], [(TOP, NOBODY)]))
    for policy in (Policy.BESIDE, Policy.DENY):
        with pytest.raises(Refused):
            open_node(
                str(path), session=Session(policy=policy), defaults=NodeOptions(read_only=True)
            )


@pytest.mark.parametrize("name", ["nbd:unix:/x", "json:{}", "nbd://host/disk"])
def test_names_of_other_protocols(name):
    with pytest.raises(ImageCorrupt, match="File names no local file"):
        parse_descriptor(descriptor([(TOP, "Plain", name)], [(TOP, NOBODY)]).encode())


ONE = [(TOP, "Compressed", "top.hds")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<Parallels_disk_image/>", "Disk_Parameters are missing"),
        ("<Other><Parallels_disk_image/></Other>", "The root element is not Parallels_disk_image"),
        (descriptor([], []).replace(f"<Disk_size>{SIZE // 512}<", "<Disk_size>x<"),
         "Disk_size is no sensible number"),
        (descriptor([], []).replace(f"<Disk_size>{SIZE // 512}<", "<Disk_size>-1<"),
         "Disk_size is no sensible number"),
        (descriptor([], []).replace(f"<Disk_size>{SIZE // 512}<", f"<Disk_size>{'9' * 30}<"),
         "Disk_size is no sensible number"),
        (descriptor([], []).replace("<Padding>0", "<Padding>1"), "Padded disks are not supported"),
        (descriptor([], []).replace("<Start>0", "<Start>5"), "The storage is not the whole disk"),
        (descriptor([], []).replace("</StorageData>", "<Storage/></StorageData>"),
         "Split images are not supported"),
        (descriptor([("x", "Plain", "a")], []), "GUID of Image is no GUID"),
        (descriptor([(TOP, "Other", "a")], []), "Image type 'Other' is not supported"),
        (descriptor(ONE, [("x", "y")]), "GUID of Shot is no GUID"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + descriptor(ONE, [])[39:],
         "The XML defines entities, which are not expanded"),
    ],
)
def test_descriptors(text, message):
    with pytest.raises(LaminaError) as caught:
        parse_descriptor(text.encode())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("images", "shots", "message"),
    [
        ([], [], f"There is no image {TOP}"),
        (ONE, [(TOP, ROOT)], f"There is no image {ROOT}"),
        (ONE, [(TOP, TOP)], "The snapshots lead back to themselves"),
        (
            [(TOP, "Plain", "a"), (ROOT, "Compressed", "b")],
            [(TOP, ROOT)],
            "An overlay is a plain image",
        ),
    ],
)
def test_chains(images, shots, message):
    found = parse_descriptor(descriptor(images, shots).encode())
    with pytest.raises(ImageCorrupt) as caught:
        found.chain(found.top)
    assert str(caught.value) == message


def test_an_image_of_another_size(bundle):
    (bundle.home / "1.hds").write_bytes(empty_image(SIZE * 2))
    with pytest.raises(ImageCorrupt, match="The image and the disk descriptor differ in size"):
        bundle.open()


def test_probing():
    head = descriptor(ONE, []).encode()[:512]
    for name in ("DiskDescriptor.xml", "/some/where/disk.hdd/DiskDescriptor.xml"):
        assert probe(head, name) == "parallels"
        assert probe(b"something else", name) == "raw"
    # A guest may write anything onto its disk.
    for name in ("disk.raw", "xDiskDescriptor.xml", ""):
        assert probe(head, name) == "raw"


def test_fuzz(bundle):
    rng = random.Random(1)
    text = bundle.path.read_bytes()
    opened = 0
    for _ in range(400):
        changed = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(changed))
            changed[at : at + rng.randrange(3)] = rng.choice((b"<", b"9", b"", rng.randbytes(1)))
        bundle.path.write_bytes(changed)
        with contextlib.suppress(LaminaError):
            defaults = NodeOptions(read_only=True)
            session = Session(policy=Policy.BESIDE)
            with open_node(str(bundle.path), session=session, defaults=defaults) as node:
                node.read(0, min(node.size, SIZE))
                opened += 1
    assert opened > 20
