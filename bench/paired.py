"""Time and memory of two commands, run in turns so that a noisy machine is noisy for both."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Command = Sequence[str]


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


def run(command: Command) -> Run:
    """Raises RuntimeError if the command fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {complaint.decode().strip()}")
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Run(elapsed, usage.ru_maxrss / scale)


def pair(
    ours: Command, theirs: Command, *, repeats: int, before: Callable[[], None] = lambda: None
) -> Pair:
    """``before`` is called before every run, outside of the measured time."""
    results: tuple[list[Run], list[Run]] = ([], [])
    for number in range(repeats + 1):
        for side, command in zip(results, (ours, theirs), strict=True):
            before()
            result = run(command)
            if number:  # the first round warms the page cache
                side.append(result)
    return Pair(*(_median(side) for side in results))


def _median(runs: list[Run]) -> Run:
    return Run(
        statistics.median(run.seconds for run in runs), max(run.peak_mib for run in runs)
    )
