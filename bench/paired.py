"""Time and memory of two commands, run in turns so that a noisy machine is noisy for both."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Command = Sequence[str]

LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""In between, because the memory of the process that forks counts as the child's."""


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mib: float
    """Resident memory at its highest."""


@dataclass(frozen=True)
class Pair:
    """Medians of several runs of each side."""

    ours: Run
    theirs: Run

    @property
    def ratio(self) -> float:
        """Above 1 we are faster."""
        return self.theirs.seconds / self.ours.seconds


def run(command: Command, *, measures: bool = False) -> Run:
    """``measures``: the command says by itself what it took, as the launcher does.

    Raises RuntimeError if the command fails.
    """
    if not measures:
        command = [sys.executable, "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    seconds, peak = done.stderr.splitlines()[-1].split()
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Run(float(seconds), int(peak) / scale)


def pair(
    ours: Command,
    theirs: Command,
    *,
    repeats: int,
    before: Callable[[], None] = lambda: None,
    measure: bool = False,
) -> Pair:
    """``before`` is called before every run, outside of the measured time.

    ``measure``: the commands do that themselves.
    """
    results: tuple[list[Run], list[Run]] = ([], [])
    for number in range(repeats + 1):
        for side, command in zip(results, (ours, theirs), strict=True):
            before()
            result = run(command, measures=measure)
            if number:  # the first round warms the page cache
                side.append(result)
    return Pair(*(_median(side) for side in results))


def _median(runs: list[Run]) -> Run:
    return Run(
        statistics.median(run.seconds for run in runs), max(run.peak_mib for run in runs)
    )
