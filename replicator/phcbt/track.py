# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a stream stands: order, counts, pending index entries and root.

Writer and readers follow a stream with the same object, so what a reader accepts is what a writer
would have written: index and end records are wholly determined by the blocks before them.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from replicator.errors import PhcbtError
from replicator.phcbt.format import (
    END_SIZE,
    ENTRY_SIZE,
    HEAD_SIZE,
    INDEX_EVERY,
    Codec,
    IndexEntry,
    Kind,
    RecordHead,
    StreamHeader,
)

_ROOT_TAG = b"PHCBT01 stream\0"
_END = struct.Struct(">QQQQQQ32s")


@dataclass(frozen=True, slots=True)
class Counts:
    """What a stream holds; bytes are plain bytes except ``payload_bytes``, which is as stored."""

    data_records: int = 0
    zero_records: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0
    payload_bytes: int = 0

    @property
    def records(self) -> int:
        """Blocks of both kinds."""
        return self.data_records + self.zero_records


@dataclass(frozen=True, slots=True)
class EndFields:
    """What an end record says."""

    counts: Counts
    last_index: int
    root: bytes


def encode_end(fields: EndFields) -> bytes:
    """The end record, 120 bytes."""
    counts = fields.counts
    payload = _END.pack(
        counts.data_records,
        counts.zero_records,
        counts.data_bytes,
        counts.zero_bytes,
        counts.payload_bytes,
        fields.last_index,
        fields.root,
    )
    head = RecordHead.build(Kind.END, Codec.NONE, len(payload), offset=0, length=0, guarded=payload)
    return head.raw + payload


def decode_end(record: bytes, position: int) -> EndFields:
    """Take an end record of 120 bytes apart; only its own check is verified. Raises PhcbtError."""
    try:
        head = RecordHead.decode(record[:HEAD_SIZE], position)
    except PhcbtError as error:
        raise PhcbtError(
            position, f"no end record where the stream ends: {error.reason}"
        ) from error
    if head.kind is not Kind.END or end_fault(head) is not None:
        raise PhcbtError(position, "no end record where the stream ends")
    payload = record[HEAD_SIZE:]
    head.check_guard(payload, position)
    *numbers, last_index, root = _END.unpack(payload)
    return EndFields(Counts(*numbers), last_index, root)


def end_fault(head: RecordHead) -> str | None:
    """Why this cannot be the head of an end record, or None."""
    if head.offset or head.length or head.payload_length != END_SIZE - HEAD_SIZE:
        return "end record of another shape"
    return None


def index_fault(head: RecordHead) -> str | None:
    """Why this cannot be the head of any index record, or None."""
    if not 1 <= head.length <= INDEX_EVERY or head.payload_length != head.length * ENTRY_SIZE:
        return f"index of {head.length} entries in {head.payload_length} bytes"
    return None


class StreamState:
    """Follows one stream from just after its header. Memory: at most 1024 index entries.

    ``check`` a head, then ``add_block``, ``add_index`` or ``add_end`` what it belongs to.
    ``position`` is the stream position after the last record added, ``disk_end`` the first disk
    byte that the next block may have.
    """

    __slots__ = (
        "_data_bytes",
        "_data_records",
        "_hash",
        "_payload_bytes",
        "_pending",
        "_short_index",
        "_zero_bytes",
        "_zero_records",
        "disk_end",
        "ended",
        "header",
        "last_index",
        "position",
    )

    def __init__(self, header: StreamHeader) -> None:
        encoded = header.encode()
        self.header = header
        self.position = len(encoded)
        self.disk_end = 0
        self.last_index = 0
        self.ended = False
        self._hash = hashlib.sha256(_ROOT_TAG + encoded)
        self._pending = bytearray()
        self._short_index = False
        self._data_records = self._zero_records = 0
        self._data_bytes = self._zero_bytes = self._payload_bytes = 0

    @property
    def pending(self) -> int:
        """Blocks since the last index."""
        return len(self._pending) // ENTRY_SIZE

    @property
    def index_due(self) -> bool:
        """True if the next record must be an index."""
        return self.pending == INDEX_EVERY

    @property
    def counts(self) -> Counts:
        """What was added so far."""
        return Counts(
            self._data_records,
            self._zero_records,
            self._data_bytes,
            self._zero_bytes,
            self._payload_bytes,
        )

    @property
    def root(self) -> bytes:
        """The stream root over what was added so far."""
        return self._hash.digest()

    def check(self, head: RecordHead) -> None:
        """Raise PhcbtError unless a record with this head may stand here. Bounds its lengths."""
        reason = self._fault(head)
        if reason is not None:
            raise PhcbtError(self.position, reason)

    def _fault(self, head: RecordHead) -> str | None:
        assert not self.ended
        if head.kind is Kind.END:
            if self._pending:
                return "end record where an index is due"
            return end_fault(head)
        if self._short_index:
            return "a record other than the end after a short index"
        if head.kind is Kind.INDEX:
            if head.length != self.pending or head.offset != self.last_index:
                return f"index of {head.length} entries after {self.pending} blocks"
            return index_fault(head)
        if self.index_due:
            return "block where an index is due"
        fault = head.block_fault(self.header)
        if fault is None and head.offset < self.disk_end:
            return f"block at disk byte {head.offset} after one up to {self.disk_end}"
        return fault

    def add_block(self, head: RecordHead, digests: bytes) -> None:
        """Count a block that ``check`` let pass."""
        entry = IndexEntry(head.offset, self.position, head.length, head.kind, head.codec)
        self._pending += entry.encode()
        self._hash.update(head.raw)
        self._hash.update(digests)
        self.disk_end = head.end
        self.position += HEAD_SIZE + len(digests) + head.payload_length
        if head.kind is Kind.ZERO:
            self._zero_records += 1
            self._zero_bytes += head.length
        else:
            self._data_records += 1
            self._data_bytes += head.length
            self._payload_bytes += head.payload_length

    def index_record(self) -> bytes:
        """The index record over the pending blocks, of which there is at least one."""
        payload = bytes(self._pending)
        head = RecordHead.build(
            Kind.INDEX,
            Codec.NONE,
            len(payload),
            offset=self.last_index,
            length=self.pending,
            guarded=payload,
        )
        return head.raw + payload

    def add_index(self) -> None:
        """Count the index record as written (or read)."""
        self._short_index = not self.index_due
        self.last_index = self.position
        self.position += HEAD_SIZE + len(self._pending)
        self._pending = bytearray()

    def end_record(self) -> bytes:
        """The end record of the stream as it stands."""
        return encode_end(EndFields(self.counts, self.last_index, self.root))

    def add_end(self) -> None:
        """Count the end record: nothing may follow."""
        self.ended = True
        self.position += END_SIZE
