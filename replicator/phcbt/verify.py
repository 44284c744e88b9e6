# SPDX-License-Identifier: AGPL-3.0-or-later
"""The full check of a stored delta: goes on past damage and says where it lies. Blocking: for
worker threads.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from replicator.durable import StrPath
from replicator.errors import PhcbtError
from replicator.phcbt.format import (
    END_SIZE,
    ENTRY_SIZE,
    HEAD_SIZE,
    EncodedRecord,
    IndexEntry,
    Kind,
    RecordHead,
    StreamHeader,
)
from replicator.phcbt.payload import damaged_grains, unpack
from replicator.phcbt.scan import pread_exact, read_block, read_header, read_index
from replicator.phcbt.track import EndFields, StreamState, decode_end


@dataclass(frozen=True, slots=True)
class Finding:
    """Damage in a stored delta. ``disk_offset`` and ``length`` say which disk bytes it costs, where
    that is known.
    """

    path: str
    stream_offset: int
    disk_offset: int | None
    length: int
    reason: str


def verify_file(path: StrPath) -> Iterator[Finding]:
    """Read all of a stored delta and yield what is damaged, in stream order; nothing if it is
    whole.

    A damaged payload costs its grains, a damaged head one block if the index leads past it, a
    damaged index nothing but itself. What the end record cannot vouch for is a finding. OSError
    only if the file cannot be opened.
    """
    path = os.fspath(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        try:
            header = read_header(fd, size)
        except (PhcbtError, OSError) as error:
            yield Finding(path, 0, None, 0, f"header: {_reason(error)}")
            return
        yield from _Verifier(path, fd, size, header).run()
    finally:
        os.close(fd)


def _reason(error: PhcbtError | OSError) -> str:
    return error.reason if isinstance(error, PhcbtError) else f"cannot be read: {error.strerror}"


class _Verifier:
    """One pass over a file. ``_state`` follows the stream until the first jump; then only local
    rules are left.
    """

    def __init__(self, path: str, fd: int, size: int, header: StreamHeader) -> None:
        self._path = path
        self._fd = fd
        self._size = size
        self._header = header
        self._at = len(header.encode())
        self._limit = size
        self._disk_end = 0
        self._state: StreamState | None = StreamState(header)
        self._end: EndFields | None = None
        self._chain: array[int] | None = None

    def run(self) -> Iterator[Finding]:
        """All findings."""
        try:
            at = max(self._size - END_SIZE, 0)
            self._end = decode_end(pread_exact(self._fd, END_SIZE, at), at)
            self._limit = at
        except (PhcbtError, OSError) as error:
            yield self._finding(self._size, f"end: {_reason(error)}")
        while self._at < self._limit:
            try:
                yield from self._record()
            except (PhcbtError, OSError) as error:
                yield from self._jump(_reason(error))
        state, end = self._state, self._end
        if state is None or end is None:
            return
        expected = EndFields(state.counts, state.last_index, state.root)
        if state.pending:
            yield self._finding(self._limit, "no index record before the end")
        elif end != expected:
            yield self._finding(self._limit, "end record does not fit the records before it")

    def _finding(
        self, at: int, reason: str, disk_offset: int | None = None, length: int = 0
    ) -> Finding:
        return Finding(self._path, at, disk_offset, length, reason)

    def _record(self) -> Iterator[Finding]:
        """Check the record at ``_at``, go past it. PhcbtError, OSError if its extent is unknown."""
        at, state, end = self._at, self._state, self._end
        if state is not None and state.pending:
            fills = at + HEAD_SIZE + state.pending * ENTRY_SIZE == self._limit
            at_last = end is not None and at == end.last_index and fills
            if state.index_due or at_last:
                yield from self._due_index(state)
                return
        raw = pread_exact(self._fd, min(HEAD_SIZE, self._limit - at), at)
        if len(raw) < HEAD_SIZE:
            raise PhcbtError(at, "the file ends inside a record's head")
        if RecordHead.decode(raw, at).kind is not Kind.INDEX:
            yield from self._block()
            return
        head, entries = read_index(self._fd, self._limit, at)
        if state is not None:
            state.check(head)
            if head.raw + entries != state.index_record():
                raise PhcbtError(at, "index record does not list the blocks before it")
            state.add_index()
        self._at += HEAD_SIZE + head.payload_length

    def _due_index(self, state: StreamState) -> Iterator[Finding]:
        """An index must stand here, and its length follows from the blocks: step over a damaged
        one.
        """
        at, expected = self._at, state.index_record()
        state.add_index()
        self._at = state.position
        try:
            found = pread_exact(self._fd, len(expected), at)
        except (PhcbtError, OSError) as error:
            yield self._finding(at, f"index record: {_reason(error)}")
            return
        if found != expected:
            yield self._finding(at, "index record does not list the blocks before it")

    def _block(self) -> Iterator[Finding]:
        at = self._at
        head, digests = read_block(self._fd, self._limit, self._header, at)
        if head.offset < self._disk_end:
            raise PhcbtError(at, f"block at disk byte {head.offset} after {self._disk_end}")
        if self._state is not None:
            self._state.check(head)
            self._state.add_block(head, digests)
        self._at += HEAD_SIZE + len(digests) + head.payload_length
        self._disk_end = head.end
        if head.kind is Kind.DATA:
            yield from self._payload(at, head, digests)

    def _payload(self, at: int, head: RecordHead, digests: bytes) -> Iterator[Finding]:
        """Damaged grains of a data block, neighbours as one finding."""
        try:
            payload = pread_exact(self._fd, head.payload_length, at + HEAD_SIZE + len(digests))
            plain = unpack(EncodedRecord(head, digests, payload), at)
        except (PhcbtError, OSError) as error:
            yield self._finding(at, _reason(error), head.offset, head.length)
            return
        grain = self._header.grain
        found = self._header.algorithm.digest_grains(plain, grain)
        bad = damaged_grains(self._header, found, digests)
        for _, run in groupby(enumerate(bad), key=lambda pair: pair[1] - pair[0]):
            grains = [number for _, number in run]
            start = head.offset + grains[0] * grain
            end = min(head.offset + (grains[-1] + 1) * grain, head.end)
            first = head.offset // grain + grains[0]
            reason = f"{len(grains)} grain(s) from grain {first} on do not have their digest"
            yield self._finding(at, reason, start, end - start)

    def _jump(self, reason: str) -> Iterator[Finding]:
        """Report what is at ``_at`` and go to the next record that is known to start somewhere."""
        self._state = None
        lost, after = self._entries_around(self._at)
        where = self._limit if after is None else after
        if lost is not None:
            yield self._finding(self._at, reason, lost.offset, lost.length)
        elif after is None:
            yield self._finding(self._at, f"{reason}; where the next record starts is not known")
        else:
            yield self._finding(self._at, f"{reason}; the check goes on at byte {after}")
        self._at = where

    def _entries_around(self, at: int) -> tuple[IndexEntry | None, int | None]:
        """The entry of the block at a stream position, and where a record after it starts, if
        known.
        """
        chain = self._index_chain()
        which = bisect_right(chain, at)
        if which == len(chain):
            if self._end is None:
                return None, None
            last = self._end.last_index
            return None, last if at < last < self._limit else self._limit
        _, entries = read_index(self._fd, self._limit, chain[which])
        lost: IndexEntry | None = None
        for start in range(0, len(entries), ENTRY_SIZE):
            entry = IndexEntry.decode(entries, start, chain[which])
            if entry.position == at:
                lost = entry
            elif at < entry.position < chain[which]:
                return lost, entry.position
        return lost, chain[which]

    def _index_chain(self) -> array[int]:
        """Positions of the index records that the end leads to, ascending. Walked once."""
        if self._chain is None:
            chain = array("Q")
            at = self._end.last_index if self._end is not None else 0
            limit = self._limit
            while 0 < at < limit:
                try:
                    head, entries = read_index(self._fd, limit, at)
                    for start in range(0, len(entries), ENTRY_SIZE):
                        IndexEntry.decode(entries, start, at)
                except (PhcbtError, OSError):
                    break  # the pass reports it when it comes to it
                chain.append(at)
                at, limit = head.offset, at
            chain.reverse()
            self._chain = chain
        return self._chain
