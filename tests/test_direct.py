# SPDX-License-Identifier: AGPL-3.0-or-later
"""Appending past the page cache: whatever the pieces, the file is what was appended."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator import direct, durable
from replicator.direct import BLOCK, Appender, Staging

NOISE = random.Random(7).randbytes(3 << 20)
SIZE = 1 << 20
#: Lengths on both sides of what is worth a direct write, and of what the memory holds.
LENGTHS = st.one_of(
    st.integers(0, 3 * BLOCK),
    st.integers(direct._WORTH - BLOCK, direct._WORTH + 3 * BLOCK),
    st.sampled_from([SIZE, SIZE + 1, SIZE - BLOCK, SIZE + 3 * BLOCK]),
)


@pytest.fixture
def path() -> Iterator[Path]:
    """In a file system of a disk: one in memory has no direct writes."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder) / "stream"


def piece(start: int, length: int) -> bytes:
    at = start % (len(NOISE) - length)
    return NOISE[at : at + length]


@settings(max_examples=40)
@given(
    begun=st.integers(0, 2 * BLOCK),
    steps=st.lists(st.tuples(LENGTHS, st.sampled_from(["", "flush", "sync", "again"])), max_size=6),
)
def test_the_file_is_what_was_appended(begun: int, steps: list[tuple[int, str]]) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        wanted = bytearray(piece(5, begun))
        path = Path(folder) / "stream"
        path.write_bytes(wanted)
        with durable.DurableFile(path) as file:
            staging = Staging(SIZE)
            appender = Appender(file, begun, staging)
            for length, then in steps:
                added = piece(len(wanted), length)
                appender.append(memoryview(added))
                wanted += added
                assert appender.end == len(wanted)
                assert len(wanted) - BLOCK < appender.written <= len(wanted)
                assert path.read_bytes()[: appender.written] == wanted[: appender.written]
                if then:
                    appender.flush()
                    assert appender.written == len(wanted)
                    assert path.read_bytes() == wanted
                if then == "sync":
                    file.sync()
                if then == "again":  # as a process that takes up what another one left
                    appender.close()
                    appender = Appender(file, len(wanted), staging)
            appender.flush()
            appender.close()
        assert path.read_bytes() == wanted


def test_large_pieces_go_past_the_page_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through: list[int] = []
    write_at = durable.DurableFile.write_at

    def noted(self: durable.DurableFile, data: bytes | bytearray | memoryview, at: int) -> None:
        through.append(len(data))
        write_at(self, data, at)

    monkeypatch.setattr(durable.DurableFile, "write_at", noted)
    with durable.DurableFile(path, create=True) as file:
        appender = Appender(file, 0, Staging(SIZE))
        for _ in range(4):
            appender.append(piece(0, 700_001))
        appender.flush()
        appender.close()
    assert path.stat().st_size == 4 * 700_001
    assert sum(through) < BLOCK


def test_a_file_system_that_cannot_gets_it_through_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(name, flags, mode)

    with durable.DurableFile(path, create=True) as file:
        monkeypatch.setattr(os, "open", refuse)
        appender = Appender(file, 0, Staging(SIZE))
        for _ in range(2):
            appender.append(piece(0, 700_001))
            assert appender.written == appender.end
        monkeypatch.undo()
    assert path.read_bytes() == piece(0, 700_001) * 2


def test_a_full_disk_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with durable.DurableFile(path, create=True) as file:
        appender = Appender(file, 0, Staging(SIZE))
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            appender.append(piece(0, 700_001))
        monkeypatch.undo()
        appender.close()
