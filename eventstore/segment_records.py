# SPDX-License-Identifier: AGPL-3.0-or-later
"""Canonical records (records.py) as they stand in a segment's blocks: taking them apart, and the blocks' bounds. Pure.

What is read here may be hostile: a length is a claim until it fits the bytes that are there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import xxhash
import zstandard
from eventsourcing.persistence import DataError, InternalError

from eventstore.records import (
    STATE_BYTES_MAX,
    TEXT_ID_BYTES_MAX,
    TOPIC_BYTES_MAX,
    VERSION_MAX,
    originator_id,
)

BLOCK_RECORDS = 256
#: One record of the greatest size fits.
BLOCK_BYTES_MAX = STATE_BYTES_MAX + 4096
CHECK_BYTES = 8
_CANONICAL = struct.Struct(">BQQHHI")
_U16 = struct.Struct(">H")
RECORD_BYTES_MIN = _CANONICAL.size + 4


class SegmentError(InternalError):
    """A segment is damaged, cut off, forged, or no segment. ``offset`` is where in the file, ``reason`` is why."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"segment at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class CanonicalParts(NamedTuple):
    """What a canonical record holds. ``key`` is the index key of the aggregate's id."""

    nid: int
    key: bytes
    version: int
    topic: str
    state: bytes

    @property
    def originator_id(self) -> UUID | str:
        """The aggregate's id, with the type that it was stored with."""
        return originator_id(self.key)


class PackedRecord(NamedTuple):
    """A canonical record with what a reader looks for."""

    nid: int
    version: int
    key: bytes
    record: bytes


def check_of(data: bytes) -> bytes:
    """The check of some stored bytes."""
    return xxhash.xxh3_64_digest(data)


def split_canonical(record: bytes, offset: int = 0) -> CanonicalParts:
    """The parts of a `canonical_record`: the same parts make the same bytes again. Raises SegmentError with ``offset``."""
    if len(record) < _CANONICAL.size:
        raise SegmentError(offset, f"a record is cut off after {len(record)} bytes")
    form, nid, version, key_length, topic_length, state_length = _CANONICAL.unpack_from(record)
    middle = _CANONICAL.size + key_length
    end = middle + topic_length
    if form != 1 or version > VERSION_MAX or end + state_length != len(record):
        raise SegmentError(offset, f"record {nid} is none")
    if not 1 <= topic_length <= TOPIC_BYTES_MAX or state_length > STATE_BYTES_MAX:
        raise SegmentError(offset, f"record {nid} has a topic or state of a bad length")
    key = record[_CANONICAL.size : middle]
    try:
        check_key(key)
        topic = record[middle:end].decode()
    except (DataError, UnicodeDecodeError) as error:
        raise SegmentError(offset, f"record {nid}: {error}") from error
    return CanonicalParts(nid, key, version, topic, record[end:])


def pack_block(records: Sequence[bytes]) -> bytes:
    """Canonical records by column: the first bytes of all their heads, the second ones, …; all keys; topics; states.
    Equal things stand together then, and compress.
    """
    count = len(records)
    heads = bytearray(_CANONICAL.size * count)
    keys, topics, states = [], [], []
    for number, record in enumerate(records):
        heads[number::count] = record[: _CANONICAL.size]
        _, _, _, key_length, topic_length, _ = _CANONICAL.unpack_from(record)
        middle = _CANONICAL.size + key_length
        keys.append(record[_CANONICAL.size : middle])
        topics.append(record[middle : middle + topic_length])
        states.append(record[middle + topic_length :])
    return b"".join((heads, *keys, *topics, *states))


def unpack_block(data: bytes, first: int, count: int, offset: int) -> list[PackedRecord]:
    """The records ``first``.. of a block, exactly these; topics and states are not looked at. Raises SegmentError."""
    size = _CANONICAL.size * count
    if size > len(data):
        raise SegmentError(offset, f"a block of {len(data)} bytes cannot hold {count} records")
    heads = [data[number:size:count] for number in range(count)]
    fields = [_CANONICAL.unpack(head) for head in heads]
    key_at = size
    topic_at = key_at + sum(row[3] for row in fields)
    state_at = topic_at + sum(row[4] for row in fields)
    if state_at + sum(row[5] for row in fields) != len(data):
        raise SegmentError(offset, "a block is not as long as its records")
    records: list[PackedRecord] = []
    for nid, head, row in zip(range(first, first + count), heads, fields, strict=True):
        _, found, version, key_length, topic_length, state_length = row
        if found != nid:
            raise SegmentError(offset, f"a block has record {found} where {nid} belongs")
        key = data[key_at : key_at + key_length]
        topic = data[topic_at : topic_at + topic_length]
        state = data[state_at : state_at + state_length]
        records.append(PackedRecord(nid, version, key, b"".join((head, key, topic, state))))
        key_at += key_length
        topic_at += topic_length
        state_at += state_length
    return records


def check_key(key: bytes) -> None:
    """Raises DataError unless it is the index key of an aggregate's id."""
    if len(key) == 17 and key[0] == 0:
        return
    text = key[3:]
    if not (key[:1] == b"\x01" and 1 <= len(text) <= TEXT_ID_BYTES_MAX):
        raise DataError(f"{key[:32].hex()} is no key of an aggregate's id")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{key[:32].hex()} is no key of an aggregate's id") from error
    if _U16.unpack_from(key, 1)[0] != len(text):
        raise DataError(f"{key[:32].hex()} is no key of an aggregate's id")


def decompress(
    stored: bytes, length: int, offset: int, context: zstandard.ZstdDecompressor
) -> bytes:
    """The bytes of a frame. Its own word on its size must be ``length``, which the caller has bounded: nothing larger
    is ever made. Raises SegmentError.
    """
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != length:
            raise SegmentError(offset, f"a frame says {frame.content_size} bytes, not {length}")
        data = context.decompress(stored, max_output_size=length, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise SegmentError(offset, f"it does not decompress: {error}") from error
    if len(data) != length:
        raise SegmentError(offset, f"a frame has {len(data)} bytes, not {length}")
    return data


def block_ends(nid: int, records: int, length: int, more: int) -> bool:
    """True if the record ``nid`` of ``more`` bytes begins a new block after one of that many records and bytes."""
    return bool(records) and ((nid - 1) % BLOCK_RECORDS == 0 or length + more > BLOCK_BYTES_MAX)
