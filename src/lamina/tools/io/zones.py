"""zone_report and its family: for zoned devices, which no driver here serves."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from lamina.hints import TYPE_CHECKING
from lamina.tools.io.commands import CommandFailed
from lamina.tools.io.numbers import number

if TYPE_CHECKING:
    from lamina.tools.io.shell import Shell


def _refusal(what: str) -> Callable[[Shell, Sequence[str]], None]:
    def refuse(shell: Shell, arguments: Sequence[str]) -> None:
        for text in arguments:
            number(text)
        raise CommandFailed(f"zone {what} failed: {os.strerror(errno.ENOTSUP)}")

    return refuse


run_zone_append = _refusal("append")
run_zone_close = _refusal("close")
run_zone_finish = _refusal("finish")
run_zone_open = _refusal("open")
run_zone_report = _refusal("report")
run_zone_reset = _refusal("reset")
