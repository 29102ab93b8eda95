"""The few kinds of error, each with the context that a person needs to act on it.

``str(error)`` is the sentence that QEMU's tools print for the same trouble, without the name of the
tool and without "Could not open …" prefixes, which belong to whoever was opening something.
"""

from __future__ import annotations

import errno as _errno
import os


class LaminaError(Exception):
    """Base of every error that Lamina raises on purpose.

    ``path``, ``format``, ``structure``, ``field`` and ``offset`` (bytes, in the file named by
    ``path``) say where the trouble is, as far as is known; ``hint`` is a second sentence that tells
    the user what to try; ``errno`` is the nearest POSIX number.
    """

    default_errno = _errno.EINVAL

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        format: str | None = None,
        structure: str | None = None,
        field: str | None = None,
        offset: int | None = None,
        errno: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.format = format
        self.structure = structure
        self.field = field
        self.offset = offset
        self.errno = self.default_errno if errno is None else errno
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    @property
    def where(self) -> str:
        """The context as one phrase, for logs: ``a.qcow2: qcow2 header, field l1_size, at 36``."""
        structure = " ".join(part for part in (self.format, self.structure) if part)
        parts = [structure] if structure else []
        if self.field:
            parts.append(f"field {self.field}")
        if self.offset is not None:
            parts.append(f"at {self.offset}")
        phrase = ", ".join(parts)
        return f"{self.path}: {phrase}" if self.path and phrase else self.path or phrase

    def in_context(self, prefix: str) -> LaminaError:
        """The same error with ``prefix`` put before its sentence: ``"Could not open 'x': " …``."""
        self.message = prefix + self.message
        self.args = (self.message,)
        return self


class UsageError(LaminaError):
    """The caller asked for something that makes no sense: an unknown option, a bad value."""


class ImageCorrupt(LaminaError):
    """An image breaks the rules of its format."""

    default_errno = _errno.EIO


class ImageUnsupported(LaminaError):
    """The image or the request is valid, but this driver does not serve it."""

    default_errno = _errno.ENOTSUP


class Refused(LaminaError):
    """A policy or a permission forbids it: a read-only node, the opening gate, a probed sector."""

    default_errno = _errno.EPERM


class Busy(LaminaError):
    """Somebody else holds the image: another node of this process, or another process's locks."""

    default_errno = _errno.EAGAIN


class StorageError(LaminaError):
    """The storage underneath failed; ``errno`` says how. The message is the text of the errno."""

    default_errno = _errno.EIO

    @classmethod
    def from_os_error(cls, error: OSError, *, path: str | None = None) -> StorageError:
        number = error.errno or _errno.EIO
        return cls(os.strerror(number), errno=number, path=path)

    @classmethod
    def from_errno(cls, number: int, *, path: str | None = None) -> StorageError:
        return cls(os.strerror(number), errno=number, path=path)
