# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reading PHCBT01 as a stream, without input or output: bytes in, events out, in the manner of h11.

Structure, order, checks, index, counts and root are verified here. A data record's payload is
verified when its ``plain`` is taken, which is the expensive part and can run in a worker thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, NoReturn

from replicator.errors import PhcbtError
from replicator.phcbt.format import (
    CHUNK_MAX,
    DISK_SIZE_MAX,
    END_SIZE,
    HEAD_SIZE,
    Buffer,
    EncodedRecord,
    GrainRun,
    Kind,
    RecordHead,
    StreamHeader,
    header_length,
)
from replicator.phcbt.payload import plain_bytes
from replicator.phcbt.track import Counts, StreamState


class _NeedData(Enum):
    NEED_DATA = "NEED_DATA"


#: ``next_event`` has nothing until more bytes arrive.
NEED_DATA: Final = _NeedData.NEED_DATA


@dataclass(frozen=True, slots=True)
class Limits:
    """What a reader is ready to take, within the format's own bounds. Bytes."""

    chunk_max: int = CHUNK_MAX
    disk_size_max: int = DISK_SIZE_MAX


@dataclass(frozen=True, slots=True)
class Header:
    """The stream's header has arrived. ``raw`` is its bytes."""

    header: StreamHeader
    raw: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class DataRecord:
    """A data record at stream ``position``. ``raw`` is the whole record as it came; digests and
    payload lie in it.
    """

    position: int
    record: EncodedRecord
    raw: memoryview = field(repr=False)

    @property
    def offset(self) -> int:
        """First disk byte."""
        return self.record.head.offset

    @property
    def length(self) -> int:
        """Plain bytes."""
        return self.record.head.length

    def run(self, header: StreamHeader) -> GrainRun:
        """The grains that the record sets."""
        return self.record.run(header)

    def plain(self, header: StreamHeader) -> bytes | memoryview:
        """The plain bytes, verified. See ``plain_bytes``."""
        return plain_bytes(header, self.record, self.position)


@dataclass(frozen=True, slots=True)
class ZeroRecord:
    """``length`` disk bytes at ``offset`` are zeros."""

    position: int
    record: EncodedRecord
    raw: memoryview = field(repr=False)

    @property
    def offset(self) -> int:
        """First disk byte."""
        return self.record.head.offset

    @property
    def length(self) -> int:
        """Bytes of zeros."""
        return self.record.head.length

    def run(self, header: StreamHeader) -> GrainRun:
        """The grains that the record sets."""
        return self.record.run(header)


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """An index record, verified against the blocks that it lists."""

    position: int
    entries: int
    raw: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class End:
    """The stream is whole: counts and root fit what came."""

    position: int
    counts: Counts
    root: bytes
    raw: memoryview = field(repr=False)


Event = Header | DataRecord | ZeroRecord | IndexRecord | End


class Decoder:
    """One stream. ``receive_data``, then ``next_event`` until NEED_DATA, again and again; ``close``
    when no more comes.

    Holds one block of received bytes and at most one record (a chunk with its digests and head),
    and 1024 index entries, however long the stream. Once it has raised PhcbtError it raises it for
    ever.
    """

    __slots__ = ("_at", "_block", "_checked", "_error", "_head", "_limits", "_spill", "_state")

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._state: StreamState | None = None
        self._block = memoryview(b"")
        self._at = 0
        self._spill = bytearray()
        self._head: RecordHead | None = None
        self._checked = False
        self._error: PhcbtError | None = None

    @classmethod
    def at(cls, state: StreamState, limits: Limits | None = None) -> Decoder:
        """A decoder that goes on where ``state`` stands (see ``resume.resume_partial``)."""
        decoder = cls(limits)
        decoder._admit(state.header)
        decoder._state = state
        return decoder

    @property
    def position(self) -> int:
        """Stream position after the last event: the last whole-record boundary; 0 before the
        header.
        """
        return 0 if self._state is None else self._state.position

    @property
    def header(self) -> StreamHeader | None:
        """The stream's header, once it has arrived."""
        return None if self._state is None else self._state.header

    @property
    def counts(self) -> Counts:
        """What the events so far hold."""
        return Counts() if self._state is None else self._state.counts

    @property
    def disk_end(self) -> int:
        """First disk byte after the last block."""
        return 0 if self._state is None else self._state.disk_end

    @property
    def ended(self) -> bool:
        """True once End has been handed out."""
        return self._state is not None and self._state.ended

    @property
    def buffered(self) -> int:
        """Bytes received after ``position``."""
        return len(self._spill) + len(self._block) - self._at

    def receive_data(self, data: Buffer) -> None:
        """Take bytes of any length; a ``bytearray`` is copied, a view is not: its memory must stay as it is until NEED_DATA,
        and for as long as events made of it are in use. Raises PhcbtError after the end.

        ValueError if ``next_event`` has not been called until NEED_DATA: that is what bounds the
        memory.
        """
        self._raise_again()
        if len(self._block) > self._at:
            raise ValueError("take every event before handing over more data")
        if not len(data):
            return
        if self.ended:
            self._fail(PhcbtError(self.position, "bytes after the end record"))
        self._block = memoryview(bytes(data) if isinstance(data, bytearray) else data)
        self._at = 0

    def next_event(self) -> Event | Literal[_NeedData.NEED_DATA]:
        """The next event, or NEED_DATA. Raises PhcbtError: stream position and reason."""
        self._raise_again()
        try:
            if self._state is None:
                return self._next_header()
            if self._state.ended:
                return NEED_DATA
            return self._next_record(self._state)
        except PhcbtError as error:
            self._fail(error)

    def close(self) -> None:
        """No more bytes come. Raises PhcbtError unless the stream is whole."""
        self._raise_again()
        if not self.ended:
            where = self.position + self.buffered
            self._fail(PhcbtError(where, "the stream ends before its end record"))

    def _raise_again(self) -> None:
        if self._error is not None:
            raise PhcbtError(self._error.offset, self._error.reason)

    def _fail(self, error: PhcbtError) -> NoReturn:
        self._error = error
        self._block = memoryview(b"")
        self._at = 0
        self._spill = bytearray()
        raise error

    def _admit(self, header: StreamHeader) -> None:
        """Raise PhcbtError if the header asks for more than the limits."""
        if header.chunk > self._limits.chunk_max:
            raise PhcbtError(20, f"chunk of {header.chunk} bytes, at most {self._limits.chunk_max}")
        if header.disk_size > self._limits.disk_size_max:
            raise PhcbtError(
                24, f"disk of {header.disk_size} bytes, at most {self._limits.disk_size_max}"
            )

    def _next_header(self) -> Header | Literal[_NeedData.NEED_DATA]:
        prefix = self._peek(12)
        if prefix is None:
            return NEED_DATA
        raw = self._take(header_length(prefix))
        if raw is None:
            return NEED_DATA
        header = StreamHeader.decode(bytes(raw))
        self._admit(header)
        self._state = StreamState(header)
        return Header(header, raw)

    def _next_record(
        self, state: StreamState
    ) -> DataRecord | ZeroRecord | IndexRecord | End | Literal[_NeedData.NEED_DATA]:
        head = self._head
        if head is None:
            start = self._peek(HEAD_SIZE)
            if start is None:
                return NEED_DATA
            head = RecordHead.decode(start, state.position)
            state.check(head)
            self._head = head
        digests_size = head.digests_size(state.header)
        if head.kind is Kind.DATA and not self._checked:
            # Before the payload: a lie in the head or the digests is known before a megabyte has
            # been waited for.
            start = self._peek(HEAD_SIZE + digests_size)
            if start is None:
                return NEED_DATA
            head.check_guard(start[HEAD_SIZE:], state.position)
            self._checked = True
        raw = self._take(HEAD_SIZE + digests_size + head.payload_length)
        if raw is None:
            return NEED_DATA
        self._head = None
        self._checked = False
        if head.kind is Kind.INDEX:
            return _index_event(state, head, raw)
        if head.kind is Kind.END:
            return self._end_event(state, head, raw)
        return _block_event(state, head, raw, digests_size)

    def _end_event(self, state: StreamState, head: RecordHead, raw: memoryview) -> End:
        position = state.position
        head.check_guard(raw[HEAD_SIZE:], position)
        if raw != state.end_record():
            raise PhcbtError(position, "end record does not fit the records before it")
        if self.buffered:
            raise PhcbtError(position + END_SIZE, "bytes after the end record")
        state.add_end()
        return End(position, state.counts, state.root, raw)

    def _peek(self, count: int) -> bytes | None:
        """A copy of the next ``count`` bytes, or None if they have not all arrived; they stay."""
        if not self._gather(count):
            return None
        if self._spill:
            return bytes(memoryview(self._spill)[:count])
        return bytes(self._block[self._at : self._at + count])

    def _take(self, count: int) -> memoryview | None:
        """The next ``count`` bytes, or None if they have not all arrived. Not copied if they came
        in one block.
        """
        if not self._gather(count):
            return None
        if self._spill:
            # Never more than asked for: _gather moves no byte of the next record here.
            taken = memoryview(self._spill).toreadonly()
            self._spill = bytearray()
            return taken
        taken = self._block[self._at : self._at + count]
        self._at += count
        return taken

    def _gather(self, count: int) -> bool:
        """True if ``count`` bytes are together, in the spill (exactly as far as asked for) or in
        the block.
        """
        left = len(self._block) - self._at
        if not self._spill and left >= count:
            return True
        missing = min(count - len(self._spill), left)
        if missing > 0:
            self._spill += self._block[self._at : self._at + missing]
            self._at += missing
        if self._at == len(self._block):
            self._block = memoryview(b"")
            self._at = 0
        return len(self._spill) >= count


def _block_event(
    state: StreamState, head: RecordHead, raw: memoryview, digests_size: int
) -> DataRecord | ZeroRecord:
    position = state.position
    digests = bytes(raw[HEAD_SIZE : HEAD_SIZE + digests_size])
    record = EncodedRecord(head, digests, raw[HEAD_SIZE + digests_size :])
    if head.kind is Kind.DATA:
        state.add_block(head, digests)
        return DataRecord(position, record, raw)
    head.check_guard(b"", position)
    state.add_block(head, digests)
    return ZeroRecord(position, record, raw)


def _index_event(state: StreamState, head: RecordHead, raw: memoryview) -> IndexRecord:
    position = state.position
    head.check_guard(raw[HEAD_SIZE:], position)
    if raw != state.index_record():
        raise PhcbtError(position, "index record does not list the blocks before it")
    state.add_index()
    return IndexRecord(position, head.length, raw)
