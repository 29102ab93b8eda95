"""The long run: ``python -m tests.fuzz.million [HEADERS [IMAGES [SEED]]]``.

A million headers and tables, ten thousand whole images, a seed by the clock unless one is given.
"""

from __future__ import annotations

import sys
import time

from tests.fuzz.headers import fuzz_headers, fuzz_tables
from tests.fuzz.images import fuzz_images
from tests.fuzz.nbd import fuzz_negotiation, fuzz_replies, fuzz_requests

NBD = (fuzz_negotiation, fuzz_requests, fuzz_replies)


def main(arguments: list[str]) -> None:
    numbers = [1_000_000, 10_000, time.time_ns() & 0xFFFFFFFF]
    numbers[: len(arguments)] = [int(value) for value in arguments]
    headers, images, seed = numbers
    print(f"seed {seed}")
    start = time.perf_counter()
    accepted = fuzz_headers(headers, seed)
    print(f"{headers} headers, {accepted} accepted: {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    fuzz_tables(headers, seed)
    print(f"{headers} tables: {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    reached = fuzz_images(images, seed)
    print(f"{images} images, {reached}: {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    understood = [fuzz(headers // 10, seed) for fuzz in NBD]
    print(f"{headers // 10} of each in NBD, {understood}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
