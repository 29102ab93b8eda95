"""The table of internal snapshots that ``info`` and ``snapshot -l`` show."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from lamina.hints import TYPE_CHECKING, Any
from lamina.units import size_to_str

if TYPE_CHECKING:
    from lamina.block.info import SnapshotInfo

_NSEC_PER_MSEC = 1_000_000


def lines(snapshots: Iterable[SnapshotInfo]) -> Iterator[str]:
    """A header and a line each; dates in local time."""
    yield (
        f"{'ID':<7} {'TAG':<16} {'VM_SIZE':>8} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}"
    )
    for one in snapshots:
        size = size_to_str(one.vm_state_size)
        icount = "--" if one.icount is None else str(one.icount)
        yield f"{one.id:<7} {one.name:<16} {size:>8} {_date(one)} {_clock(one):>15} {icount:>10}"


def _date(one: SnapshotInfo) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.date_sec))
    except (OverflowError, ValueError, OSError):  # no year that a calendar has
        return f"@{one.date_sec}"


def _clock(one: SnapshotInfo) -> str:
    """Time that the machine had run, as hours (four digits), minutes and seconds."""
    minutes, seconds = divmod(one.vm_clock_sec, 60)
    hours, minutes = divmod(minutes, 60)
    milliseconds = one.vm_clock_nsec // _NSEC_PER_MSEC
    return f"{hours:04}:{minutes:02}:{seconds:02}.{milliseconds:03}"


def json_values(snapshots: Iterable[SnapshotInfo]) -> list[dict[str, Any]]:
    return [_json_value(one) for one in snapshots]


def _json_value(one: SnapshotInfo) -> dict[str, Any]:
    value: dict[str, Any] = {} if one.icount is None else {"icount": one.icount}
    return value | {
        "vm-clock-nsec": one.vm_clock_nsec,
        "name": one.name,
        "date-sec": one.date_sec,
        "date-nsec": one.date_nsec,
        "vm-clock-sec": one.vm_clock_sec,
        "id": one.id,
        "vm-state-size": one.vm_state_size,
    }
