# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random access to a stored delta through its index. Blocking and thread-safe: every read is a
pread.

Memory is 16 bytes for each 1024 records and a few cached blocks. What is read is verified: heads by
their check, grains by their digests. Errors name the file.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Self

from replicator.disk import Extent
from replicator.durable import StrPath
from replicator.errors import DamageError, PhcbtError
from replicator.phcbt.format import (
    END_SIZE,
    ENTRY_SIZE,
    HEAD_SIZE,
    INDEX_EVERY,
    Codec,
    EncodedRecord,
    GrainRun,
    IndexEntry,
    Kind,
    RecordHead,
    StreamHeader,
    grain_run,
)
from replicator.phcbt.payload import plain_bytes, verify_grains
from replicator.phcbt.scan import pread_exact, read_block, read_header, read_index
from replicator.phcbt.track import EndFields, StreamState, decode_end
from replicator.phcbt.verify import Finding, verify_file

_GROUPS_CACHED = 4
_PLAIN_CACHED = 2
_INDEX_SIZE = HEAD_SIZE + INDEX_EVERY * ENTRY_SIZE


class StoredDelta:
    """A whole delta in a file that does not change.

    Opening reads header, end and the index chain. If the chain is damaged the heads are walked
    instead, once, and ``index_damage`` says so. Raises PhcbtError if neither gives every record: a
    delta of which that is not known must not be read from, since what it seems not to cover would
    be taken from an older one. OSError if it cannot be opened.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = os.fspath(path)
        self.index_damage: PhcbtError | None = None
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._named():
                self._open()
        except BaseException:
            self.close()
            raise
        self._group = lru_cache(_GROUPS_CACHED)(self._load_group)
        self._plain = lru_cache(_PLAIN_CACHED)(self._load_plain)

    def _open(self) -> None:
        size = os.fstat(self._fd).st_size
        self.size = size
        self.header: StreamHeader = read_header(self._fd, size)
        self._start = len(self.header.encode())
        self._limit = size - END_SIZE
        if self._limit < self._start:
            raise PhcbtError(size, "the file ends before its end record")
        record = pread_exact(self._fd, END_SIZE, self._limit)
        self.end: EndFields = decode_end(record, self._limit)
        self._groups = -(-self.end.counts.records // INDEX_EVERY)
        if self.end.counts.records * HEAD_SIZE > size:
            raise PhcbtError(self._limit, f"{self.end.counts.records} records in {size} bytes")
        try:
            self._indexes, self._firsts = self._walk_chain()
        except PhcbtError as error:
            self.index_damage = error
            self._indexes, self._firsts = self._walk_heads()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; calling it again does nothing. No other call may be under way."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    @property
    def root(self) -> bytes:
        """The stream root that the end record states. ``runs`` and ``verify`` hold the stream
        against it.
        """
        return self.end.root

    def find(self, offset: int) -> IndexEntry | None:
        """The block that covers disk byte ``offset``, or None. Raises PhcbtError."""
        entry = self.find_next(offset)
        return entry if entry is not None and entry.offset <= offset else None

    def find_next(self, offset: int) -> IndexEntry | None:
        """The block that covers disk byte ``offset`` or else the next one after it, or None. Raises
        PhcbtError.
        """
        with self._named():
            return self._find_next(offset)

    def entries(self) -> Iterator[IndexEntry]:
        """Every block, in disk order. Raises PhcbtError."""
        with self._named():
            for number in range(self._groups):
                group = self._group(number)
                for at in range(0, len(group), ENTRY_SIZE):
                    yield self._entry(group, at, number)

    def extents(self) -> Iterator[Extent]:
        """What the delta covers, in disk order, one extent for each block. Raises PhcbtError."""
        for entry in self.entries():
            yield Extent(entry.offset, entry.length, entry.kind is Kind.ZERO)

    def record(self, entry: IndexEntry) -> EncodedRecord:
        """The block of an entry as it is stored; its payload is not verified. Raises PhcbtError."""
        with self._named():
            return self._record(entry)

    def plain(self, entry: IndexEntry) -> bytes | memoryview:
        """All plain bytes of a data block, verified. Raises PhcbtError, DamageError."""
        with self._named():
            return plain_bytes(self.header, self._record(entry), entry.position)

    def read(self, offset: int, length: int) -> list[tuple[int, bytes | int]]:
        """What the delta holds of a range of the disk: (disk offset, bytes), or (disk offset,
        number of zero bytes).

        In disk order, one for each block; what is not covered is not in the list. Every grain
        touched is verified. Raises PhcbtError or DamageError naming file, record and grain;
        ValueError if the range is not inside the disk.
        """
        if offset < 0 or length < 0 or offset + length > self.header.disk_size:
            raise ValueError(f"{length} bytes at {offset} on a disk of {self.header.disk_size}")
        end = offset + length
        pieces: list[tuple[int, bytes | int]] = []
        with self._named():
            at = offset
            while at < end:
                entry = self._find_next(at)
                if entry is None or entry.offset >= end:
                    break
                start, stop = max(at, entry.offset), min(end, entry.end)
                zero = entry.kind is Kind.ZERO
                pieces.append((start, stop - start if zero else self._part(entry, start, stop)))
                at = stop
        return pieces

    def digests(self, grain: int) -> bytes | None:
        """The digest of one grain, or None if the delta does not cover it. Raises PhcbtError."""
        with self._named():
            entry = self._find_next(grain * self.header.grain)
            if entry is None or entry.offset > grain * self.header.grain:
                return None
            if entry.kind is Kind.ZERO:
                return bytes(self.header.digest_size)
            _, digests = self._head(entry)
            at = (grain - entry.offset // self.header.grain) * self.header.digest_size
            return digests[at : at + self.header.digest_size]

    def runs(self) -> Iterator[GrainRun]:
        """The grains that the delta sets, ascending: heads and digests only, read in order, held
        against the root.

        PhcbtError at the first damage, or after the last run if the whole does not have the root.
        """
        state = StreamState(self.header)
        with self._named():
            for _ in range(self.end.counts.records):
                head, digests = read_block(self._fd, self._limit, self.header, state.position)
                state.check(head)
                state.add_block(head, digests)
                if state.index_due:
                    state.add_index()
                yield grain_run(head, digests, self.header)
            if (state.root, state.counts) != (self.end.root, self.end.counts):
                raise PhcbtError(self._limit, "the stream does not have the root of its end record")

    def verify(self) -> Iterator[Finding]:
        """Everything that is damaged, payloads included; goes on past damage. See
        ``verify.verify_file``.
        """
        return verify_file(self.path)

    # Private methods raise errors that do not name the file; the public ones do.

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except PhcbtError as error:
            raise PhcbtError(error.offset, f"{self.path}: {error.reason}") from error
        except DamageError as error:
            raise DamageError(f"{self.path}: {error}") from error
        except OSError as error:
            raise DamageError(f"{self.path} cannot be read: {error.strerror}") from error

    def _walk_chain(self) -> tuple[array[int], array[int]]:
        """Position and first disk offset of every index record, from the last back to the first.
        PhcbtError.
        """
        indexes, firsts = array("Q"), array("Q")
        at, limit = self.end.last_index, self._limit
        expected = self.end.counts.records - (self._groups - 1) * INDEX_EVERY
        for _ in range(self._groups):
            if not self._start < at < limit:
                raise PhcbtError(at, "the index chain leads nowhere")
            # Whole, with its check: a wrong first offset would send look-ups past what is covered.
            head, entries = read_index(self._fd, limit, at)
            if head.length != expected:
                raise PhcbtError(at, f"index of {head.length} entries where {expected} are due")
            indexes.append(at)
            firsts.append(_entry_offset(entries, 0))
            at, limit, expected = head.offset, at, INDEX_EVERY
        if at:
            raise PhcbtError(at, "the index chain is longer than the stream")
        indexes.reverse()
        firsts.reverse()
        if any(firsts[i] >= firsts[i + 1] for i in range(len(firsts) - 1)):
            raise PhcbtError(self.end.last_index, "the index records do not ascend")
        return indexes, firsts

    def _walk_heads(self) -> tuple[array[int], array[int]]:
        """The same from the blocks alone. PhcbtError if they do not lead from the header to the
        end.
        """
        indexes, firsts = array("Q"), array("Q")
        position, disk_end = self._start, 0
        for number in range(self._groups):
            count = self._count(number)
            for at, head in self._blocks(position, count, disk_end):
                if len(firsts) == number:
                    firsts.append(head.offset)
                position, disk_end = at, head.end
            indexes.append(position)
            position += HEAD_SIZE + count * ENTRY_SIZE
        if position != self._limit:
            raise PhcbtError(position, "the blocks do not lead to the end record")
        return indexes, firsts

    def _blocks(self, position: int, count: int, disk_end: int) -> Iterator[tuple[int, RecordHead]]:
        """The next ``count`` blocks: the position after each, and its head. PhcbtError."""
        for _ in range(count):
            head, digests = read_block(self._fd, self._limit, self.header, position)
            if head.offset < disk_end:
                raise PhcbtError(position, f"block at disk byte {head.offset} after {disk_end}")
            disk_end = head.end
            position += HEAD_SIZE + len(digests) + head.payload_length
            yield position, head

    def _count(self, number: int) -> int:
        """How many blocks index record ``number`` lists."""
        return min(INDEX_EVERY, self.end.counts.records - number * INDEX_EVERY)

    def _load_group(self, number: int) -> bytes:
        """The entries of index record ``number``; from the blocks themselves if it is damaged."""
        at, count = self._indexes[number], self._count(number)
        try:
            head, entries = read_index(self._fd, self._limit, at)
            if head.length != count:
                raise PhcbtError(at, f"index of {head.length} entries where {count} are due")
        except PhcbtError as error:
            self.index_damage = error
            return self._group_from_blocks(number)
        return entries

    def _group_from_blocks(self, number: int) -> bytes:
        start = self._indexes[number - 1] + _INDEX_SIZE if number else self._start
        entries = bytearray()
        position = start
        for after, head in self._blocks(start, self._count(number), self._firsts[number]):
            entry = IndexEntry(head.offset, position, head.length, head.kind, head.codec)
            entries += entry.encode()
            position = after
        if position != self._indexes[number]:
            raise PhcbtError(position, "the blocks do not lead to their index record")
        return bytes(entries)

    def _entry(self, group: bytes, at: int, number: int) -> IndexEntry:
        return IndexEntry.decode(group, at, self._indexes[number])

    def _find_next(self, offset: int) -> IndexEntry | None:
        number = max(bisect_right(self._firsts, offset) - 1, 0)
        if number >= self._groups:
            return None
        group = self._group(number)
        count = len(group) // ENTRY_SIZE
        which = bisect_right(range(count), offset, key=lambda i: _entry_offset(group, i)) - 1
        if which >= 0:
            entry = self._entry(group, which * ENTRY_SIZE, number)
            if entry.end > offset:
                return entry
        if which + 1 < count:
            return self._entry(group, (which + 1) * ENTRY_SIZE, number)
        if number + 1 < self._groups:
            return self._entry(self._group(number + 1), 0, number + 1)
        return None

    def _head(self, entry: IndexEntry) -> tuple[RecordHead, bytes]:
        """Head and digests of an entry's block, which must be what the entry says."""
        head, digests = read_block(self._fd, self._limit, self.header, entry.position)
        found = (head.offset, head.length, head.kind, head.codec)
        if found != (entry.offset, entry.length, entry.kind, entry.codec):
            raise PhcbtError(entry.position, "the block is not what the index says")
        return head, digests

    def _record(self, entry: IndexEntry) -> EncodedRecord:
        head, digests = self._head(entry)
        start = entry.position + HEAD_SIZE + len(digests)
        payload = pread_exact(self._fd, head.payload_length, start) if head.payload_length else b""
        return EncodedRecord(head, digests, payload)

    def _load_plain(self, entry: IndexEntry) -> bytes | memoryview:
        return plain_bytes(self.header, self._record(entry), entry.position)

    def _part(self, entry: IndexEntry, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the disk, inside one data block. Reads only the grains touched if
        it can.
        """
        if entry.codec is not Codec.NONE:
            return bytes(self._plain(entry)[start - entry.offset : stop - entry.offset])
        head, digests = self._head(entry)
        grain, size = self.header.grain, self.header.digest_size
        first = (start - entry.offset) // grain
        last = -(-(stop - entry.offset) // grain)
        lower, upper = first * grain, min(last * grain, head.length)
        payload_at = entry.position + HEAD_SIZE + len(digests)
        plain = pread_exact(self._fd, upper - lower, payload_at + lower)
        number = entry.offset // grain + first
        verify_grains(
            self.header, plain, digests[first * size : last * size], number, entry.position
        )
        skip = start - entry.offset - lower
        return plain[skip : skip + stop - start]


def _entry_offset(group: bytes, which: int) -> int:
    return int.from_bytes(group[which * ENTRY_SIZE : which * ENTRY_SIZE + 8], "big")
