"""Many clients of one export at once, each with everything it can ask for; a program of its own,
for the Python that has libnbd: ``nbd_load.py URI CLIENTS SECONDS SEED CONTENT``.

The units of the disk belong to the clients in turn, so that all of them meet in every cluster, but
none changes what another one has. Each knows what its units contain, compares what it reads, and at
the end all that it has; what the whole disk has to be then is written to the file CONTENT. Prints
the number of requests."""

from __future__ import annotations

import random
import sys
import threading
import time

import nbd  # type: ignore[import-not-found]

UNIT = 16 << 10
SECTOR = 512


class Client:
    def __init__(self, uri: str, units: list[int], seed: int) -> None:
        self.content = {unit: bytearray(UNIT) for unit in units}
        self.requests = 0
        self._units = units
        self._dice = random.Random(seed)
        self._handle = nbd.NBD()
        self._handle.add_meta_context("base:allocation")
        self._handle.set_request_structured_replies(self._dice.random() < 0.8)
        self._handle.connect_uri(uri)
        self._actions = (
            [self._write] * 6
            + [self._read] * 6
            + [self._write_many, self._read_many, self._zero, self._trim]
            + [self._flush, self._cache, self._status]
        )

    def act(self) -> None:
        self._dice.choice(self._actions)()
        self.requests += 1

    def close(self) -> None:
        self._handle.flush()
        self._handle.shutdown()

    def _place(self) -> tuple[int, int, int]:
        """A unit, and a part of it: where it begins and ends."""
        unit, align = self._dice.choice(self._units), self._dice.choice((1, SECTOR, 4096))
        first = self._dice.randrange(0, UNIT, align)
        return unit, first, self._dice.randrange(first + 1, UNIT + 1)

    def _write(self) -> None:
        unit, first, end = self._place()
        data = self._dice.randbytes(end - first)
        flags = nbd.CMD_FLAG_FUA if self._dice.random() < 0.05 else 0
        self._handle.pwrite(data, unit * UNIT + first, flags)
        self.content[unit][first:end] = data

    def _read(self) -> None:
        unit, first, end = self._place()
        found = self._handle.pread(end - first, unit * UNIT + first)
        assert found == self.content[unit][first:end], (unit, first, end)

    def _write_many(self) -> None:
        units = self._dice.sample(self._units, 8)
        pending = set()
        for unit in units:
            self.content[unit][:] = self._dice.randbytes(UNIT)
            data = nbd.Buffer.from_bytearray(self.content[unit])
            pending.add(self._handle.aio_pwrite(data, unit * UNIT))
        self._wait_for(pending)

    def _read_many(self) -> None:
        units = self._dice.sample(self._units, 8)
        buffers = {unit: nbd.Buffer(UNIT) for unit in units}
        self._wait_for({self._handle.aio_pread(buffers[unit], unit * UNIT) for unit in units})
        for unit in units:
            assert buffers[unit].to_bytearray() == self.content[unit], unit

    def _wait_for(self, pending: set[int]) -> None:
        while pending:
            self._handle.poll(-1)
            pending = {one for one in pending if not self._handle.aio_command_completed(one)}

    def _zero(self) -> None:
        unit, first, end = self._place()
        flags = nbd.CMD_FLAG_NO_HOLE if self._dice.random() < 0.5 else 0
        self._handle.zero(end - first, unit * UNIT + first, flags)
        self.content[unit][first:end] = bytes(end - first)

    def _trim(self) -> None:
        """Each sector has what it had or zeroes, and goes on having it."""
        unit = self._dice.choice(self._units)
        self._handle.trim(UNIT, unit * UNIT)
        found = self._handle.pread(UNIT, unit * UNIT)
        for at in range(0, UNIT, SECTOR):
            sector, old = found[at : at + SECTOR], self.content[unit][at : at + SECTOR]
            assert sector in (old, bytes(SECTOR)), (unit, at)
        self.content[unit][:] = found

    def _flush(self) -> None:
        self._handle.flush()

    def _cache(self) -> None:
        self._handle.cache(UNIT, self._dice.choice(self._units) * UNIT)

    def _status(self) -> None:
        """Whatever is said to be zeroes is."""
        if not self._handle.can_meta_context("base:allocation"):
            return
        unit = self._dice.choice(self._units)
        found: list[int] = []
        self._handle.block_status(
            UNIT, unit * UNIT, lambda _, __, entries, ___: found.extend(entries)
        )
        at = 0
        for length, flags in zip(found[::2], found[1::2], strict=True):
            end = min(at + length, UNIT)
            if flags & nbd.STATE_ZERO:
                assert not any(self.content[unit][at:end]), (unit, at, end)
            at = end


def main(uri: str, clients: int, seconds: float, seed: int, content: str) -> None:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    size = handle.get_size()
    units = range(size // UNIT)
    end = time.monotonic() + seconds
    running = [
        Client(uri, list(units[number::clients]), seed * 1000 + number) for number in range(clients)
    ]
    failures: list[BaseException] = []

    def run(client: Client) -> None:
        try:
            while time.monotonic() < end and not failures:
                client.act()
            client.close()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(client,)) for client in running]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    with open(content, "wb") as file:
        for unit in units:
            expected = running[unit % clients].content[unit]
            assert handle.pread(UNIT, unit * UNIT) == expected, unit
            file.write(expected)
    handle.shutdown()
    print(sum(client.requests for client in running))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
