"""Creating qcow2 images from the command line: the same words, refusals and lengths as QEMU's."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.peer

START = "import lamina.tools.img, sys; sys.argv[0] = 'qemu-img'; sys.exit(lamina.tools.img.main())"
TOOLS = {"theirs": ["qemu-img"], "ours": [sys.executable, "-c", START]}

LONG = "a" * 1023
CASES = [
    *(f"-o cluster_size={size} x 1M" for size in ("0", "1", "511", "256", "1000", "3M", "2M")),
    *(f"-o refcount_bits={bits} x 1M" for bits in ("0", "1", "3", "128", "-1", "65", "64", "x")),
    *(f"-o compat={compat} x 1M" for compat in ("0.10", "1.1", "v2", "v3", "0.9", "2", "1.2")),
    "-o compat=0.10,refcount_bits=8 x 1M",
    "-o compat=0.10,refcount_bits=16 x 1M",
    "-o compat=0.10,lazy_refcounts=on x 1M",
    "-o compat=0.10,compression_type=zstd x 1M",
    "-o compat=0.10,compression_type=zlib x 1M",
    "-o compat=0.10,extended_l2=on x 1M",
    "-o compat=0.10,data_file=foo x 1M",
    "-o compat=0.10,data_file_raw=on x 1M",
    "-o extended_l2=on,cluster_size=8k x 1M",
    "-o preallocation=foo x 1M",
    "-o preallocation=metadata,lazy_refcounts=on x 1M",
    "-o compression_type=foo x 1M",
    "-o compression_type=zstd,lazy_refcounts=on,refcount_bits=1 x 1M",
    "-o data_file_raw=on x 1M",
    "-o data_file=d x 1M",
    "-o data_file= x 1M",
    "-o data_file=nodir/d x 1M",
    "-o data_file=d,data_file_raw=on,cluster_size=4k x 1000",
    "-o data_file=json:{} x 1M",
    "-o extended_l2=on x 1M",
    "-o extended_l2=on,cluster_size=16k,preallocation=metadata x 1M",
    "-o backing_file=base,backing_fmt=raw,extended_l2=on,preallocation=metadata x",
    "-o lazy_refcounts=maybe x 1M",
    "-o encryption=on x 1M",
    "-o encryption=on,encrypt.format=luks x 1M",
    "-o encrypt.format=foo x 1M",
    "-o encrypt.format=luks x 1M",
    "-o encrypt.key-secret=s x 1M",
    "-o nonsense=1 x 1M",
    *(f"x {size}" for size in ("0", "511", "1000", "2P", "2049T", "64P", "7E", "8E", "-1", "1Z")),
    *(f"-o cluster_size=512 x {size}" for size in ("1G", "129G")),
    *(f"-o cluster_size=2M x {size}" for size in ("2E", "2049P", "4E")),
    *(f"-o extended_l2=on x {size}" for size in ("1P", "1025T", "2P")),
    "-o size=1M x",
    "-o size=1M x 2M",
    "x",
    "-o backing_file=base,backing_fmt=raw x",
    "-o backing_file=base,backing_fmt=raw x 3M",
    "-o backing_file=base x",
    "-o backing_file=nope,backing_fmt=raw x",
    "-o backing_file=base,backing_fmt=raw,preallocation=metadata x",
    "-o backing_file=base,backing_fmt=raw,data_file=d,data_file_raw=on x",
    "-o backing_fmt=raw x 1M",
    "-o backing_file=base,backing_fmt=foo x",
    "-u -o backing_file=base,backing_fmt=foo x 1M",
    f"-u -o backing_file={LONG},backing_fmt=raw x 1M",
    f"-u -o backing_file={LONG}a,backing_fmt=raw x 1M",
    f"-u -o cluster_size=512,backing_file={LONG[:500]},backing_fmt=raw x 1M",
    f"-u -o cluster_size=512,backing_file={LONG[:300]},backing_fmt=raw x 1M",
]


@pytest.mark.parametrize("group", range(4))
def test_as_qemu_says(group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", "base", "1M"], check=True)
    for case in itertools.islice(CASES, group, None, 4):
        outcomes = {}
        for tool, words in TOOLS.items():
            done = subprocess.run(
                [*words, "create", "-f", "qcow2", *case.split()],
                capture_output=True,
                text=True,
                check=False,
            )
            image = Path("x")
            length = image.stat().st_size if image.exists() else None
            header = image.read_bytes()[:112] if image.exists() else None
            image.unlink(missing_ok=True)
            outcomes[tool] = (done.returncode, done.stdout, done.stderr, length, header)
        assert outcomes["ours"] == outcomes["theirs"], case
