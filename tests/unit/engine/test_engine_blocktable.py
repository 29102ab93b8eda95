"""The entries of a block allocation table, across chunks, in both byte orders."""

from __future__ import annotations

import struct

import pytest

from lamina.engine import blocktable
from lamina.engine.appending import Appender
from lamina.engine.blocktable import BlockTable
from lamina.engine.metadata import Metadata
from lamina.errors import StorageError
from lamina.testing.memory import MemoryFile


@pytest.mark.parametrize("code", ["I", "Q"])
@pytest.mark.parametrize("order", ["little", "big"])
def test_entries(monkeypatch: pytest.MonkeyPatch, code: str, order: str) -> None:
    monkeypatch.setattr(blocktable, "CHUNK", 64)
    packing = f"{'<' if order == 'little' else '>'}50{code}"
    values = list(range(1000, 1050))
    file = MemoryFile(bytes(512) + struct.pack(packing, *values))
    metadata = Metadata(file)
    table = BlockTable(metadata, host_offset=512, entries=50, code=code, byteorder=order)
    assert [table[index] for index in (0, 15, 16, 49)] == [1000, 1015, 1016, 1049]
    for index in (3, 17, 49):
        table[index] = values[index] = 7 + index
    found = [entry for _, run in table.runs(2, 48) for entry in run]
    assert found == values[2:]
    columns = [entry for _, run in table.columns(2, 48) for entry in run.tolist()]
    assert columns == values[2:]
    metadata.commit()
    assert struct.unpack(packing, file.content[512:]) == tuple(values)


def test_appending() -> None:
    file = MemoryFile(bytes(1000))
    appender = Appender(file, 700, limit=5000)
    # What a crash left behind the end is no zeroes.
    assert appender.take(100, 512) == (1024, True)
    assert appender.take(300) == (1124, True)
    appender.reach(1200)
    assert file.size == 1424
    appender.give_back(1124, 1424)
    assert appender.take(10, 4) == (1124, False)
    appender.give_back(1024, 1124)
    with pytest.raises(StorageError):
        appender.take(5000)
    assert appender.end == 1134
    appender.trim()
    assert file.size == 1134
