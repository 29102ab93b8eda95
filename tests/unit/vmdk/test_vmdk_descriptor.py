"""Descriptors: read, changed and written again, without a word of others being lost."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import LaminaError
from lamina.formats.vmdk.descriptor import (
    MAX_SIZE,
    NO_PARENT,
    ExtentLine,
    check_stand_alone,
    compose,
    parse,
    parse_bytes,
)

FROM_VMWARE = (
    "# Disk DescriptorFile\r\nversion=1\r\nencoding=\"UTF-8\"\r\nCID=fffffffe\r\n"
    "parentCID=12ab34cd\r\nisNativeSnapshot=\"no\"\r\ncreateType=\"twoGbMaxExtentSparse\"\r\n"
    "parentFileNameHint=\"base dir/b\u00e4se.vmdk\"\r\n"
    "# Extent description\r\nRW 4192256 SPARSE \"disk-s001.vmdk\"\r\n"
    "RW 2048 SPARSE \"disk-s002.vmdk\"\r\n\r\n# The Disk Data Base \r\n#DDB\r\n\r\n"
    "ddb.adapterType = \"lsilogic\"\r\nddb.geometry.cylinders = \"261\"\r\n"
    "ddb.geometry.heads = \"255\"\r\nddb.geometry.sectors = \"63\"\r\n"
    "ddb.uuid = \"60 00 C2 93\"\r\n"
)

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters='"\r\n\0', exclude_categories=["Cs"]),
    min_size=1,
    max_size=60,
)
LENGTHS = st.integers(1, 1 << 40).map(lambda n: n * 512)
RUNS = LENGTHS.map(lambda length: ExtentLine("RW", length, "ZERO"))
FILES = st.tuples(st.sampled_from(["RW", "RDONLY"]), LENGTHS, st.just("SPARSE"), NAMES)
WINDOWS = st.tuples(
    st.just("RW"), LENGTHS, st.just("FLAT"), NAMES, st.integers(0, 99).map(lambda n: n * 512)
)
LINES = st.lists(
    RUNS | FILES.map(lambda found: ExtentLine(*found)) | WINDOWS.map(ExtentLine._make),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(LINES, st.none() | st.tuples(NAMES, st.integers(0, NO_PARENT)))
def test_round_trip(lines: list[ExtentLine], parent: tuple[str, int] | None) -> None:
    if parent is not None:
        parent = (parent[0].strip() or "x", parent[1])
    made = compose("twoGbMaxExtentSparse", lines, parent=parent)
    again = parse_bytes(made.encoded() + b"\0\0")
    assert again == made
    assert list(again.extents) == lines
    assert (again.parent_name, again.parent_cid) == (parent or (None, NO_PARENT))
    check_stand_alone(again)


def test_one_of_vmware() -> None:
    found = parse_bytes(FROM_VMWARE.encode())
    assert (found.cid, found.parent_cid) == (0xFFFFFFFE, 0x12AB34CD)
    assert found.parent_name == "base dir/b\u00e4se.vmdk"
    assert [line.name for line in found.extents] == ["disk-s001.vmdk", "disk-s002.vmdk"]
    changed = found.with_cid(0xABC).with_parent_cid(0xDEF)
    assert changed.text == FROM_VMWARE.replace("=fffffffe", "=00000abc").replace(
        "12ab34cd", "00000def"
    )
    line = ExtentLine("RW", 16065 * 512, "SPARSE", "other.vmdk")
    other = found.with_extents([line])
    assert other.extents == (line,)
    assert 'ddb.geometry.cylinders = "1"\r\n' in other.text
    assert 'RW 16065 SPARSE "other.vmdk"\r\n\r\n# The Disk' in other.text
    assert other.text.count("\n") == FROM_VMWARE.count("\n") - 1


@pytest.mark.parametrize(
    ("adapter", "heads", "cylinders"), [("ide", 16, 20805), ("lsilogic", 255, 1305)]
)
def test_geometry(adapter: str, heads: int, cylinders: int) -> None:
    line = ExtentLine("RW", 10 << 30, "FLAT", "a-flat.vmdk")
    text = compose("monolithicFlat", [line], adapter=adapter).text
    assert f'ddb.geometry.cylinders = "{cylinders}"\nddb.geometry.heads = "{heads}"\n' in text


def _described(line: str, kind: str = "monolithicFlat") -> str:
    return f'version=1\nCID=1\nparentCID=ffffffff\ncreateType="{kind}"\n{line}\n'


@pytest.mark.parametrize(
    "line",
    [
        'RW 2048 FOO "ext.raw" 0',
        'RW 2048 FLAT "ext.raw"',
        'RW 2048 FLAT "ext.raw" -1',
        'RW 2048 FLAT "" 0',
        'RW 0 FLAT "ext.raw" 0',
        'RW -1 FLAT "ext.raw" 0',
        'RW 0x400 FLAT "ext.raw" 0',
        'RW 2048 VMFS "ext.raw" 0',
        "RW 2048 VMFS ext.raw",
        'RW 99999999999999999999 FLAT "ext.raw" 0',
        'RW 2048 FLAT "ext.raw" 99999999999999999999',
        'RW 2048 VMFSRDM "ext.raw"',
        f'RW 2048 SPARSE "{"n" * 512}"',
        "RW",
    ],
)
def test_lines_that_make_no_sense(line: str) -> None:
    with pytest.raises(LaminaError) as caught:
        check_stand_alone(parse(_described(line)))
    assert str(caught.value).startswith(("Invalid extent line: RW", "invalid VMDK image"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid VMDK image descriptor"),
        ("\0version=1", "invalid VMDK image descriptor"),
        ('version=1\nCID=1\nRW 2048 FLAT "a" 0\n', "invalid VMDK image descriptor"),
        (_described("# no extents"), "invalid VMDK image descriptor"),
        (_described("RW 1 ZERO", "custom"), "Unsupported image type 'custom'"),
        (_described("RW 1 ZERO", "monolithicSparse"), "Unsupported image type 'monolithicSparse'"),
        (_described('RW 9223372036854775 FLAT "a" 0\n' * 2100), "File too large"),
    ],
)
def test_descriptors_of_nothing(text: str, message: str) -> None:
    with pytest.raises(LaminaError) as caught:
        check_stand_alone(parse_bytes(text.encode()))
    assert str(caught.value) == message


def test_long_descriptors_take_no_time() -> None:
    start = time.process_time()
    for line in ("RW 1 ZERO", "", "x" * 100, "RW " + " " * 1000, "CID" + " " * 1000):
        text = _described((line + "\n") * (MAX_SIZE // (len(line) + 1)))
        with suppress(LaminaError):
            check_stand_alone(parse_bytes(text.encode()))
    with suppress(LaminaError):
        parse_bytes(b" " * MAX_SIZE)
    assert time.process_time() - start < 3


@settings(deadline=None)
@given(st.text(max_size=300))
def test_no_text_is_a_problem(text: str) -> None:
    for whole in (text, _described(text), _described("RW " + text), FROM_VMWARE[:200] + text):
        with suppress(LaminaError):
            check_stand_alone(parse_bytes(whole.encode("utf-8", "surrogatepass")))
