# SPDX-License-Identifier: AGPL-3.0-or-later
"""Many deltas into one: the newest that covers a grain wins. Blocking: for worker threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from replicator.phcbt.encode import encode_data, zero_record
from replicator.phcbt.format import EncodedRecord, IndexEntry, Kind, StreamHeader
from replicator.phcbt.read import StoredDelta


class _Cursor:
    """Goes through one delta's blocks in disk order. Holds one entry, and the plain bytes of at
    most one block.
    """

    __slots__ = ("_entries", "_header", "_plain", "delta", "end", "entry", "start")

    def __init__(self, delta: StoredDelta, header: StreamHeader) -> None:
        self.delta = delta
        self._header = header
        self._entries = delta.entries()
        self._plain: bytes | None = None
        self.entry: IndexEntry | None = None
        self.start = self.end = 0
        self.advance()

    def advance(self) -> None:
        """To the next block. What ended inside a grain on a smaller disk covers the whole grain on
        the new one.
        """
        self._plain = None
        self.entry = next(self._entries, None)
        if self.entry is not None:
            self.start = self.entry.offset
            whole = self._header.grains(self.entry.end) * self._header.grain
            self.end = min(whole, self._header.disk_size)

    def piece(self, start: int, end: int, level: int | None) -> Iterator[EncodedRecord]:
        """Records for disk bytes [start, end) of the current block: the block itself if that is all
        of it.
        """
        entry = self.entry
        assert entry is not None
        if (start, end) == (entry.offset, entry.end) and entry.length <= self._header.chunk:
            yield self.delta.record(entry)
            return
        for at in range(start, end, self._header.chunk):
            stop = min(at + self._header.chunk, end)
            if entry.kind is Kind.ZERO:
                yield zero_record(self._header, at, stop - at)
                continue
            if self._plain is None:
                # The grain digests vouch for the zeros as well: they are taken over the padded
                # grain.
                self._plain = bytes(self.delta.plain(entry)).ljust(self.end - entry.offset, b"\0")
            plain = self._plain[at - entry.offset : stop - entry.offset]
            yield encode_data(self._header, at, plain, level)


def compose(
    deltas: Sequence[StoredDelta], header: StreamHeader, level: int | None = 1
) -> Iterator[EncodedRecord]:
    """The records of one delta that equals applying ``deltas``, oldest first; for a StreamWriter
    with ``header``.

    Blocks that survive whole are relayed as stored (their payloads not verified: their digests
    travel with them); others are verified, cut on grain borders and encoded at ``level``. Memory: a
    chunk for each delta. ValueError if the deltas and the header do not belong together;
    PhcbtError, DamageError.
    """
    _check_chain(deltas, header)
    full = max((i for i, delta in enumerate(deltas) if delta.header.is_full), default=0)
    return _merge([_Cursor(delta, header) for delta in deltas[full:]], level)


def _merge(cursors: list[_Cursor], level: int | None) -> Iterator[EncodedRecord]:
    at = 0
    while True:
        live = [cursor for cursor in cursors if cursor.entry is not None]
        if not live:
            return
        at = max(at, min(cursor.start for cursor in live))
        winner = next(cursor for cursor in reversed(live) if cursor.start <= at)
        newer = live[live.index(winner) + 1 :]
        stop = min([winner.end, *(cursor.start for cursor in newer)])
        yield from winner.piece(at, stop, level)
        at = stop
        for cursor in live:
            while cursor.entry is not None and cursor.end <= at:
                cursor.advance()


def _check_chain(deltas: Sequence[StoredDelta], header: StreamHeader) -> None:
    """ValueError unless these deltas can be one with this header."""
    if not deltas:
        raise ValueError("nothing to compose")
    for delta in deltas:
        theirs = delta.header
        if (theirs.algorithm, theirs.grain) != (header.algorithm, header.grain):
            raise ValueError(f"{delta.path} has another digest algorithm or grain")
    if any(old.header.disk_size > new.header.disk_size for old, new in pairwise(deltas)):
        raise ValueError("a disk does not shrink from one delta to the next")
    if deltas[-1].header.disk_size != header.disk_size:
        raise ValueError(f"header of a disk of {header.disk_size} bytes for another size")
    if any(delta.header.is_full for delta in deltas) != header.is_full:
        raise ValueError("a full stream makes the result full, and nothing else does")
