# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading a sealed segment, which may be damaged or hostile: every part is checked before it is used, and no read,
allocation or decompression goes by the word of a length alone. It writes nothing.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Iterator
from hashlib import sha256
from itertools import zip_longest
from typing import NamedTuple, Self

import zstandard
from eventsourcing.persistence import InterfaceError, Notification, OperationalError, StoredEvent

from eventstore.merkle import Frontier, leaf_hash
from eventstore.records import originator_id
from eventstore.segment_format import (
    FOOT,
    FOOT_HASHED,
    HEADER_BYTES_MAX,
    Chunk,
    Header,
    IndexBuilder,
    Stream,
    Tail,
    unpack_footer,
    unpack_header,
    unpack_streams,
    unpack_tail,
)
from eventstore.segment_records import (
    CanonicalParts,
    PackedRecord,
    SegmentError,
    check_of,
    decompress,
    split_canonical,
    unpack_block,
)

_READ_BYTES = 1 << 20


class SegmentInfo(NamedTuple):
    """What a segment says of itself. ``frontier_before`` is the tree's of ``first - 1`` leaves, ``root`` the root of
    its ``last`` leaves; ``record_bytes`` what all blocks decompress to.
    """

    path: str
    origin: str
    label: str
    first: int
    last: int
    frontier_before: tuple[bytes, ...]
    root: bytes
    checkpoint: str
    blocks: int
    streams: int
    record_bytes: int
    file_bytes: int
    sha256: bytes

    @property
    def size_before(self) -> int:
        """The size of the tree before the first record."""
        return self.first - 1


class Segment:
    """An open segment. Usable from any thread; nothing may be under way when it is closed.

    Whatever is read has passed the check of its part, so damage is a SegmentError and never a wrong record. A forger
    can make checks: only `verify`, and a signature over ``info.root``, tell a segment from a forged one.
    """

    def __init__(self, path: str, fd: int) -> None:
        self._fd = fd
        self._file_bytes = os.fstat(fd).st_size
        if self._file_bytes < FOOT.size:
            raise SegmentError(0, f"this is no segment: it has {self._file_bytes} bytes")
        self._header, header_bytes = unpack_header(
            self._read(0, min(HEADER_BYTES_MAX, self._file_bytes))
        )
        foot = self._read(self._file_bytes - FOOT.size, FOOT.size)
        offset, length, check, digest = unpack_footer(foot, self._file_bytes)
        tail = self._read(offset, length)
        if check_of(tail) != check:
            raise SegmentError(offset, "the tail does not have its check")
        self._tail = unpack_tail(tail, offset, self._header, header_bytes)
        self._dictionary = zstandard.ZstdCompressionDict(
            self._header.dictionary, dict_type=zstandard.DICT_TYPE_RAWCONTENT
        )
        self._starts = [block.first for block in self._tail.blocks]
        self.info = _info(path, self._header, self._tail, self._file_bytes, digest)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a segment and read its directories. Raises SegmentError, OperationalError if it cannot be read."""
        name = os.fspath(path)
        try:
            # Without waiting: a pipe of that name would have no end.
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise OperationalError(f"segment {name}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SegmentError(0, "this is no file")
            return cls(name, fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file. A second call does nothing; any other raises InterfaceError."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def records(
        self, start: int | None = None, stop: int | None = None
    ) -> Iterator[CanonicalParts]:
        """The records of nids ``start`` to ``stop``, both included, as far as they are here. Holds one block at a time.
        Raises SegmentError.
        """
        for packed, offset in self._range(start, stop):
            yield split_canonical(packed.record, offset)

    def notifications(
        self, start: int | None = None, stop: int | None = None
    ) -> Iterator[Notification]:
        """The same as the library's notifications."""
        for nid, key, version, topic, state in self.records(start, stop):
            yield Notification(originator_id(key), version, topic, state, nid)

    def stream(
        self, key: bytes, gt: int | None = None, lte: int | None = None
    ) -> list[StoredEvent]:
        """The events here of the aggregate of that `originator_key`, with a version over ``gt`` and up to ``lte``, in
        the order of versions. Decompresses only the blocks that hold some. Raises SegmentError.
        """
        entry = self._find(key)
        low = -1 if gt is None else gt
        if entry is None or entry.greatest <= low or (lte is not None and entry.least > lte):
            return []
        events = 0
        found: list[CanonicalParts] = []
        for number in entry.blocks:
            block = self._tail.blocks[number]
            for packed in self._block(number):
                if packed.key == key:
                    events += 1
                    if packed.version > low and (lte is None or packed.version <= lte):
                        found.append(split_canonical(packed.record, block.offset))
        if events != entry.events:
            place = self._tail.blocks[entry.blocks[0]].offset
            raise SegmentError(place, f"{events} events of a stream, its index says {entry.events}")
        found.sort(key=lambda parts: parts.version)
        name = originator_id(key)
        return [StoredEvent(name, parts.version, parts.topic, parts.state) for parts in found]

    def leaf_hashes(self, first: int, count: int) -> list[bytes]:
        """The tree's leaf hashes of ``count`` records from nid ``first``, computed from them. Raises SegmentError, also
        if some of these are not here.
        """
        last = first + count - 1
        if count < 0 or first < self._header.first or last > self._header.last:
            raise SegmentError(0, f"records {first}..{last} are not all here")
        packed = self._range(first, last) if count else ()
        return [leaf_hash(one.record) for one, _ in packed]

    def verify(self) -> None:
        """Return only if all of it is as it was sealed: the SHA-256 of the file, every record, the tree from the
        frontier before to the root after, and the index, computed anew. Holds one block, and the index. Raises
        SegmentError naming the first block or record that does not fit.
        """
        self._verify_digest()
        frontier = Frontier(self._header.first - 1, self._header.frontier)
        index = IndexBuilder()
        for number, block in enumerate(self._tail.blocks):
            leaves: list[bytes] = []
            for packed in self._block(number):
                split_canonical(packed.record, block.offset)
                index.add(packed.key, packed.version, number)
                leaves.append(leaf_hash(packed.record))
            alone = Frontier()
            alone.extend(leaves)
            if alone.root() != block.tree_hash:
                raise SegmentError(
                    block.offset,
                    f"block {number}, records {block.first}..{block.end - 1}: they are not those of its tree hash",
                )
            frontier.extend(leaves)
        if frontier.root() != self._tail.root:
            raise SegmentError(
                self._file_bytes - FOOT.size,
                f"records {self._header.first}..{self._header.last} do not lead from the frontier to the root",
            )
        self._verify_index(index)

    def _verify_digest(self) -> None:
        left = self._file_bytes - FOOT.size + FOOT_HASHED
        digest = sha256()
        at = 0
        while at < left:
            part = self._read(at, min(_READ_BYTES, left - at))
            digest.update(part)
            at += len(part)
        if digest.digest() != self.info.sha256:
            raise SegmentError(0, "the file does not have its SHA-256")

    def _verify_index(self, index: IndexBuilder) -> None:
        expected = index.streams()
        stored = (stream for chunk in self._tail.chunks for stream in self._streams(chunk))
        count = 0
        for want, have in zip_longest(expected, stored):
            if want != have:
                key = (want or have).key.hex()
                raise SegmentError(self._tail.chunks[0].offset, f"the index of {key} is not right")
            count += 1
        if count != self._tail.streams:
            raise SegmentError(self._file_bytes - FOOT.size, "the number of streams is not right")

    def _range(self, start: int | None, stop: int | None) -> Iterator[tuple[PackedRecord, int]]:
        """The records of nids ``start`` to ``stop``, each with the offset of its block."""
        first = self._header.first if start is None else max(start, self._header.first)
        last = self._header.last if stop is None else min(stop, self._header.last)
        if first > last:
            return
        for number in range(bisect_right(self._starts, first) - 1, len(self._starts)):
            block = self._tail.blocks[number]
            if block.first > last:
                return
            wanted = self._block(number)[max(first - block.first, 0) : last - block.first + 1]
            for packed in wanted:
                yield packed, block.offset

    def _block(self, number: int) -> list[PackedRecord]:
        block = self._tail.blocks[number]
        data = self._frame(block.offset, block.length, block.stored, block.check)
        return unpack_block(data, block.first, block.records, block.offset)

    def _find(self, key: bytes) -> Stream | None:
        chunks = self._tail.chunks
        number = bisect_right(chunks, key, key=lambda chunk: chunk.key) - 1
        if number < 0:
            return None
        return next((entry for entry in self._streams(chunks[number]) if entry.key == key), None)

    def _streams(self, chunk: Chunk) -> Iterator[Stream]:
        data = self._frame(chunk.offset, chunk.length, chunk.stored, chunk.check)
        first = True
        for entry in unpack_streams(data, len(self._tail.blocks), chunk.offset):
            if first and entry.key != chunk.key:
                raise SegmentError(chunk.offset, "a part of the index begins with another stream")
            first = False
            yield entry

    def _frame(self, offset: int, length: int, stored: int, check: bytes) -> bytes:
        data = self._read(offset, stored)
        if check_of(data) != check:
            raise SegmentError(offset, "stored bytes do not have their check")
        # One for each call: threads cannot share one.
        context = zstandard.ZstdDecompressor(dict_data=self._dictionary)
        return decompress(data, length, offset, context)

    def _read(self, offset: int, length: int) -> bytes:
        if self._fd < 0:
            raise InterfaceError("the segment is closed")
        if offset < 0 or length < 0 or offset + length > self._file_bytes:
            raise SegmentError(offset, f"{length} bytes reach outside of the file")
        parts: list[bytes] = []
        left = length
        while left:
            try:
                part = os.pread(self._fd, left, offset + length - left)
            except OSError as error:
                raise OperationalError(f"a segment cannot be read: {error.strerror}") from error
            if not part:
                raise SegmentError(offset, "the file has become shorter")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _info(path: str, header: Header, tail: Tail, file_bytes: int, digest: bytes) -> SegmentInfo:
    return SegmentInfo(
        path=path,
        origin=header.origin,
        label=header.label,
        first=header.first,
        last=header.last,
        frontier_before=header.frontier,
        root=tail.root,
        checkpoint=tail.checkpoint,
        blocks=len(tail.blocks),
        streams=tail.streams,
        record_bytes=tail.record_bytes,
        file_bytes=file_bytes,
        sha256=digest,
    )


__all__ = ["Segment", "SegmentInfo"]
