"""Which files something opens: images must not make us open what nobody asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from lamina.errors import LaminaError


def opened_files(action: Callable[[], object]) -> list[str]:
    """The files that ``action`` opens, and what else it reaches for: "socket.connect"."""
    names: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if active and event == "open" and isinstance(arguments[0], (str, bytes)):
            names.append(os.fsdecode(arguments[0]))
        elif active and event in ("socket.connect", "subprocess.Popen"):
            names.append(event)

    sys.addaudithook(hook)
    try:
        action()
    except LaminaError:
        pass
    finally:
        active = False
    return [name for name in names if not name.endswith((".py", ".pyc", ".so"))]
