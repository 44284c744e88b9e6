# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing PHCBT01. ``encode_*`` and ``split_chunk`` are pure and meant for worker threads;
``StreamWriter`` is cheap.

No input or output: bytes go back to the caller.
"""

from __future__ import annotations

import threading  # noqa: TID251  a cache for each thread; no thread is made here
from collections.abc import Iterable

import zstandard

from replicator.disk import Extent
from replicator.errors import PhcbtError
from replicator.phcbt.format import (
    GRAIN_MAX,
    Buffer,
    Codec,
    EncodedRecord,
    Kind,
    RecordHead,
    StreamHeader,
)
from replicator.phcbt.track import Counts, StreamState

#: Shorter runs of zero grains stay inside data: a record of their own costs more than zeros
#: compressed.
ZERO_RUN_MIN = 4

_ZEROS = bytes(GRAIN_MAX)


class _Compressors(threading.local):
    """One compressor for each thread and level: contexts are dear to make and not thread-safe."""

    def __init__(self) -> None:
        self._by_level: dict[int, zstandard.ZstdCompressor] = {}

    def get(self, level: int) -> zstandard.ZstdCompressor:
        found = self._by_level.get(level)
        if found is None:
            found = zstandard.ZstdCompressor(
                level=level, write_content_size=True, write_checksum=False, write_dict_id=False
            )
            self._by_level[level] = found
        return found


_compressors = _Compressors()


def encode_data(
    header: StreamHeader,
    offset: int,
    plain: Buffer,
    level: int | None,
    digests: bytes | None = None,
) -> EncodedRecord:
    """A data record for ``plain`` at disk byte ``offset``: digests, and zstd at ``level`` (None:
    never).

    What zstd does not make 1/16 smaller goes plain; zstd itself gives up on random data at several
    GB/s, so nothing is sampled first. ``plain`` is kept, not copied: it must not change afterwards.
    ``digests``: what ``plain`` should have; if it has others, reading the record fails.
    ValueError if it cannot be a record. CPU-bound, 1 to 10 ms for 1 MiB; zstd works without the
    interpreter's lock.
    """
    if digests is None:
        digests = header.algorithm.digest_grains(plain, header.grain)
    codec = Codec.NONE
    payload: bytes | memoryview = plain if isinstance(plain, bytes) else memoryview(plain)
    if level is not None:
        packed = _compressors.get(level).compress(plain)
        if len(packed) < len(plain) - len(plain) // 16:
            codec, payload = Codec.ZSTD, packed
    head = RecordHead.build(
        Kind.DATA, codec, len(payload), offset=offset, length=len(plain), guarded=digests
    )
    return _checked(header, EncodedRecord(head, digests, payload))


def zero_record(header: StreamHeader, offset: int, length: int) -> EncodedRecord:
    """A record saying that ``length`` bytes (at most a chunk) are zeros. ValueError if it cannot be
    one.
    """
    head = RecordHead.build(Kind.ZERO, Codec.NONE, 0, offset=offset, length=length, guarded=b"")
    return _checked(header, EncodedRecord(head, b"", b""))


def _checked(header: StreamHeader, record: EncodedRecord) -> EncodedRecord:
    fault = record.head.block_fault(header)
    if fault is not None:
        raise ValueError(fault)
    return record


def split_chunk(
    plain: Buffer, offset: int, header: StreamHeader, *, start: int = 0, end: int | None = None
) -> list[Extent]:
    """Cut what was read at disk byte ``offset`` (a grain border) into data and zero extents, in
    order; of it only the bytes from ``start`` (a grain border) to ``end``.

    Grains are tested whole; runs of zeros shorter than four grains stay inside data unless all of
    it is zeros. Extents are in disk bytes. Best given ``bytes`` or a ``bytearray``: anything else is copied once.
    """
    if not isinstance(plain, bytes | bytearray):
        plain = bytes(plain)
    first, size = start, len(plain) if end is None else end
    grain = header.grain
    whole = _ZEROS[:grain]
    result: list[Extent] = []
    data_start = zero_start = at = first
    while True:
        # [data_start, zero_start) is data, [zero_start, at) the zeros found after it.
        if at < size and _grain_is_zero(plain, at, size, whole):
            at = min(at + grain, size)
            continue
        everything = zero_start == first and at == size
        if at > zero_start and (everything or at - zero_start > (ZERO_RUN_MIN - 1) * grain):
            if zero_start > data_start:
                result.append(Extent(offset + data_start, zero_start - data_start))
            result.append(Extent(offset + zero_start, at - zero_start, zero=True))
            data_start = at
        if at == size:
            break
        at = zero_start = min(at + grain, size)
    if data_start < size:
        result.append(Extent(offset + data_start, size - data_start))
    return result


def _grain_is_zero(plain: bytes | bytearray, at: int, end: int, whole: bytes) -> bool:
    left = end - at
    return plain.startswith(whole if left >= len(whole) else whole[:left], at)


def encode_chunk(
    header: StreamHeader,
    offset: int,
    plain: bytes | bytearray,
    level: int | None,
    *,
    start: int = 0,
    end: int | None = None,
) -> list[EncodedRecord]:
    """``split_chunk``, then a record for each part: all that a worker thread does with a chunk it
    has read. ``plain`` is kept, not copied, by records that are not compressed.
    """
    view = memoryview(plain)
    return [
        zero_record(header, extent.offset, extent.length)
        if extent.zero
        else encode_data(
            header, extent.offset, view[extent.offset - offset : extent.end - offset], level
        )
        for extent in split_chunk(plain, offset, header, start=start, end=end)
    ]


class StreamWriter:
    """Puts records into a stream: hands back the bytes to send, adds index records when due, and
    the end.

    Call ``start`` first, then ``add`` for each record in disk order, then ``finish``. A call out of
    turn is a ValueError; a record that does not fit is a PhcbtError and changes nothing.
    """

    __slots__ = ("_started", "_state", "header")

    def __init__(self, header: StreamHeader) -> None:
        self.header = header
        self._state = StreamState(header)
        self._started = False

    @classmethod
    def resume(
        cls, header: StreamHeader, skeleton: Iterable[tuple[RecordHead, bytes]]
    ) -> StreamWriter:
        """A started writer that stands after these blocks (heads and digests), and after the index
        that they made due.

        Raises PhcbtError if they are not the beginning of a stream. See ``resume.SkeletonReader``.
        """
        writer = cls(header)
        writer._started = True
        for head, digests in skeleton:
            writer._state.check(head)
            if head.kind not in (Kind.DATA, Kind.ZERO) or len(digests) != head.digests_size(header):
                raise PhcbtError(writer.position, "skeleton holds something other than blocks")
            head.check_guard(digests, writer.position)
            writer._block(head, digests)
        return writer

    @property
    def position(self) -> int:
        """Stream bytes handed out so far; 0 before ``start``."""
        return self._state.position if self._started else 0

    @property
    def disk_end(self) -> int:
        """First disk byte after the last record: where a resumed source goes on."""
        return self._state.disk_end

    @property
    def counts(self) -> Counts:
        """What was added so far."""
        return self._state.counts

    @property
    def root(self) -> bytes:
        """Stream root over what was added so far; final after ``finish``."""
        return self._state.root

    @property
    def finished(self) -> bool:
        """True after ``finish``."""
        return self._state.ended

    def start(self) -> bytes:
        """The header's bytes."""
        if self._started:
            raise ValueError("the stream has been started")
        self._started = True
        return self.header.encode()

    def add(self, record: EncodedRecord) -> list[bytes | memoryview]:
        """The record's pieces, none copied, and an index record when 1024 blocks have gathered."""
        self._open()
        self._state.check(record.head)
        pieces: list[bytes | memoryview] = [record.head.raw]
        pieces.extend(piece for piece in (record.digests, record.payload) if piece)
        index = self._block(record.head, record.digests)
        if index:
            pieces.append(index)
        return pieces

    def finish(self) -> bytes:
        """The last index record, if blocks are pending, and the end record."""
        self._open()
        index = self._index() if self._state.pending else b""
        end = self._state.end_record()
        self._state.add_end()
        return index + end

    def _open(self) -> None:
        if not self._started or self._state.ended:
            raise ValueError("the stream has not been started" if not self._started else "finished")

    def _block(self, head: RecordHead, digests: bytes) -> bytes:
        self._state.add_block(head, digests)
        return self._index() if self._state.index_due else b""

    def _index(self) -> bytes:
        record = self._state.index_record()
        self._state.add_index()
        return record
