"""Run the tests of QEMU that must pass: ``python -m tests.iotests [FORMAT [TEST…]]``.

``passing.txt`` holds them, a line per test, with its format (``raw``; ``raw/nbd`` over another
protocol than file); what is added there stays there. The runner and the way to fetch QEMU's tests
live beside this checkout, in ``../shared/iotests``; without that folder, or without root (the tests
need namespaces), this says so and does nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT.parent / "shared" / "iotests"
SOURCE = ROOT / ".peers" / "iotests"
PASSING = Path(__file__).with_name("passing.txt")
UNBUILT = ("qemu-storage-daemon",)
"""The runner wants all four tools. No test in ``passing.txt`` calls these."""


def passing() -> dict[str, list[str]]:
    tests: dict[str, list[str]] = {}
    for line in PASSING.read_text().splitlines():
        if line and not line.startswith("#"):
            format, test = line.split()
            tests.setdefault(format, []).append(test)
    return tests


def fetch() -> None:
    """Once, however many tests ask for it at the same time."""
    import fcntl

    SOURCE.parent.mkdir(exist_ok=True)
    with open(SOURCE.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (SOURCE / "tests" / "qemu-iotests" / "check").exists():
            subprocess.run(["apt-get", "-qq", "update"], check=False)
            subprocess.run([RUNNER / "fetch-iotests", SOURCE], check=True)


def tools(directory: Path) -> Path:
    """The four names that QEMU's tests call."""
    bin = Path(sys.executable).parent
    for name in ("img", "io", "nbd"):
        (directory / f"qemu-{name}").symlink_to(bin / f"lamina-{name}")
    for name in UNBUILT:
        tool = directory / name
        tool.write_text(f"#!/bin/sh\necho '{name}: not built' >&2\nexit 1\n")
        tool.chmod(0o755)
    return directory


def environment() -> dict[str, str]:
    """Without this environment's programs: QEMU's lint would try those that it finds there."""
    own = Path(sys.executable).parent
    words = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(word for word in words if Path(word) != own)
    return {**os.environ, "PATH": path}


def main(arguments: list[str]) -> int:
    if not RUNNER.exists() or os.geteuid() != 0:
        print("QEMU's own tests: not run (they need root and ../shared/iotests)")
        return 0
    wanted = passing()
    if arguments:
        wanted = {arguments[0]: arguments[1:] or wanted[arguments[0]]}
    fetch()
    passed = failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        directory = tools(Path(scratch))
        for format, tests in wanted.items():
            missing = failing(directory, format, tests, jobs=2)
            if missing:
                # Some of them allow a server a fifth of a second to start, whoever else is at work.
                print("Once more, one at a time:")
                missing = failing(directory, format, missing, jobs=1)
            failed += len(missing)
            passed += len(tests) - len(missing)
    print(f"QEMU's own tests: {passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def failing(directory: Path, format: str, tests: list[str], *, jobs: int) -> list[str]:
    """Those of the tests that do not pass."""
    result = directory / "result.json"
    name, _, protocol = format.partition("/")
    command = [RUNNER / "run-iotests", "--tools", directory, "--iotests", SOURCE]
    command += ["--format", name, "--proto", protocol or "file"]
    command += ["--target", "--diff", f"-j{jobs}", "--json", result, *tests]
    subprocess.run(command, env=environment(), check=False)
    results = json.loads(result.read_text())["results"]
    passed = {each["test"] for each in results if each["status"] == "pass"}
    return [test for test in tests if test not in passed]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
