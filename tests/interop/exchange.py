"""One image in turns: what we write QEMU reads, what QEMU writes we read."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

from lamina.block.backend import Backend
from lamina.block.session import Session


def run(*command: object, status: int = 0) -> str:
    """What a command says on both channels. It ends with ``status``."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def output(*command: object) -> tuple[int, str, str]:
    """Status and what a command says on either channel."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def both(tool: str, *words: object) -> tuple[tuple[int, str, str], tuple[int, str, str]]:
    """What our tool says, as if it had QEMU's name, and what QEMU's says."""
    ours = output(f"lamina-{tool}", *words)
    theirs = output(f"qemu-{tool}", *words)
    return (ours[0], ours[1], ours[2].replace(f"lamina-{tool}", f"qemu-{tool}")), theirs


def opened(image: Path, format: str, *, writable: bool = True, **how: Any) -> Backend:
    return Backend.open(str(image), session=Session(), format=format, writable=writable, **how)


def exercise(
    image: Path, format: str, content: bytearray, rng: random.Random, requests: int = 40
) -> None:
    """Random writes of ours, to the image and to ``content``, which it then reads as."""
    size = len(content)
    with opened(image, format) as disk:
        assert disk.size == size
        for _ in range(requests):
            offset = rng.randrange(0, size - 1)
            length = min(rng.randrange(1, 90_000), size - offset)
            payload = bytes(length)
            if rng.random() < 0.3:
                disk.write_zeroes(offset, length)
            else:
                payload = rng.randbytes(length)
                disk.write(offset, payload)
            content[offset : offset + length] = payload
        assert disk.read(0, size) == content


def exercise_theirs(
    image: Path, format: str, content: bytearray, rng: random.Random, requests: int = 30
) -> None:
    """The same with qemu-io."""
    commands: list[str] = []
    for _ in range(requests):
        offset = rng.randrange(0, len(content) - 70_000, 512)
        length = rng.randrange(512, 60_000, 512)
        pattern = rng.randrange(0, 256)
        content[offset : offset + length] = bytes([pattern]) * length
        zero = "-z" if pattern == 0 else f"-P {pattern}"
        commands += ["-c", f"write {zero} {offset} {length}"]
    run("qemu-io", "-f", format, *commands, image)


def same(image: Path, format: str, content: bytearray) -> None:
    """QEMU reads ``content`` too."""
    raw = image.with_suffix(".raw")
    raw.write_bytes(content)
    run("qemu-img", "compare", "-f", format, "-F", "raw", image, raw)


def sound(image: Path, format: str) -> None:
    """QEMU's check finds nothing."""
    assert "No errors were found" in run("qemu-img", "check", "-f", format, image)
