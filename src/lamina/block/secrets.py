"""Secrets (``--object secret``): passphrases and keys under a name."""

from __future__ import annotations

from lamina.errors import UsageError


class Secrets:
    """The secret objects of one process or one tool run."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def lookup(self, name: str) -> bytes:
        """The raw bytes. Raises UsageError if there is none of that name."""
        try:
            return self._values[name]
        except KeyError:
            raise UsageError(f"No secret with id '{name}'") from None

    def require(self, name: str | None, key: str) -> bytes:
        """The same for the value of option ``key``, which may not be missing."""
        if name is None:
            raise UsageError(f"Parameter '{key}' is required for cipher", field=key)
        return self.lookup(name)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def add(self, name: str, value: bytes) -> None:
        """Keep ``value`` under ``name``; an older one of that name is replaced."""
        self._values[name] = value
