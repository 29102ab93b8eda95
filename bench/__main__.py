"""Measure Lamina against qemu-img: ``python -m bench [ROW…] [--quick]``.

Each row is run in turns with its peer; the ratio is the peer's time by ours, so above 1 we are
ahead. The rows ``info`` and ``create`` are measured against ``python -c pass`` instead.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from bench.paired import pair
from bench.rows import NAMES, Workbench, rows
from lamina.units import parse_size


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small images, three repeats")
    parser.add_argument("--size", type=parse_size, help="of disks that are converted (4G)")
    parser.add_argument("--tables", type=parse_size, help="of disks whose tables are walked (1T)")
    parser.add_argument("--repeats", type=int, help="runs of each side (7)")
    parser.add_argument("--dir", type=Path, help="where images go (a temporary directory)")
    given = parser.parse_args()
    unknown = set(given.rows) - set(NAMES)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    repeats = given.repeats or (3 if given.quick else 7)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.dir) as directory:
        bench = Workbench(
            Path(directory),
            given.size or (256 << 20 if given.quick else 1 << 32),
            given.tables or (1 << 36 if given.quick else 1 << 40),
        )
        titles = ("row", "ratio", "goal", "ours", "peer", "MiB", "peer")
        print("{:22} {:>6} {:>6}  {:>9} {:>9}  {:>5} {:>5}".format(*titles))
        missed = 0
        for name, make_row in zip(NAMES, rows(bench), strict=True):
            if given.rows and name not in given.rows:
                continue
            row = make_row()

            def before(target: Path | None = row.target) -> None:
                if target is not None:
                    with contextlib.suppress(FileNotFoundError):
                        target.unlink()

            times = min(repeats, 3) if row.slow else repeats
            result = pair(
                row.ours, row.theirs, repeats=times, before=before, measure=row.measure
            )
            bench.remove(row.own_image)
            verdict = "" if result.ratio >= row.goal else "  below its goal"
            missed += bool(verdict)
            print(
                f"{name:22} {result.ratio:6.2f} {row.goal:6.2f}  {result.ours.seconds:8.3f}s "
                f"{result.theirs.seconds:8.3f}s  {result.ours.peak_mib:5.0f} "
                f"{result.theirs.peak_mib:5.0f}{verdict}",
                flush=True,
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
