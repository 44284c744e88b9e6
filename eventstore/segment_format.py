# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a sealed segment is laid out in bytes: packing and checking of its parts. Pure: no files here.

All integers are big-endian; a check is xxh3-64 of the bytes that it stands for. In the order of the file:

header   magic 8, format u16 = 1, flags u16 = 0, first nid u64, last nid u64, lengths of origin u16 and label u16, number
         of hashes u8, length of the dictionary u32, the hashes (32 bytes each: the tree's frontier before the first
         record), origin, label, dictionary, check. The dictionary is any bytes that the frames below may refer to
         (zstd's raw content); here the keys and topics of the first records
blocks   one zstd frame each, with its content size: the canonical records of 1..256 neighbouring nids by column (first
         bytes of all fixed heads, second bytes, …, then all keys, all topics, all states). A block ends before every
         nid that begins 256 leaves of the tree (nid 1, 257, …), and earlier where it would grow over 16 MiB and 4 KiB
index    chunks, one zstd frame each: streams in the order of their keys. A stream: key length u16, key, events u32,
         least and greatest version u64, number of blocks u32, for each block the distance of its number from the one
         before (the first: its number) as LEB128
tail     records u64, bytes of records u64, streams u32, blocks u32, chunks u32, length of the checkpoint u32, root of the
         tree after the last record 32; for each block: records u16, length u32, stored length u32, check of the stored
         bytes u64, tree hash of its records alone 32; for each chunk: length u32, stored length u32, check of the stored
         bytes u64, length of its first key u16, that key; checkpoint text
footer   tail's offset u64, tail's length u64, tail's check u64, SHA-256 of all bytes before this field 32, check of the
         footer so far u64, magic 8

Where blocks and chunks lie follows from the lengths: they stand one after the other, without gaps.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple, NoReturn

from eventsourcing.persistence import DataError

from eventstore.merkle import HASH_BYTES
from eventstore.records import TEXT_ID_BYTES_MAX, VERSION_MAX
from eventstore.segment_records import (
    BLOCK_BYTES_MAX,
    BLOCK_RECORDS,
    CHECK_BYTES,
    RECORD_BYTES_MIN,
    SegmentError,
    check_of,
)

HEAD_MAGIC = b"\x89ESEG\r\n\x1a"
FOOT_MAGIC = b"ESEGEND\n"
FORMAT = 1
BLOCKS_MAX = 1 << 20
#: A chunk is closed when it has this many bytes, so only one huge stream makes it larger.
CHUNK_BYTES = 1 << 16
CHUNK_BYTES_MAX = 16 << 20
TEXT_BYTES_MAX = 1024
CHECKPOINT_BYTES_MAX = 1 << 16
FRONTIER_MAX = 63
#: Keys of some thousand streams.
DICTIONARY_BYTES_MAX = 1 << 17

HEAD = struct.Struct(">8sHHQQHHBI")
HEADER_BYTES_MAX = (
    HEAD.size + FRONTIER_MAX * HASH_BYTES + 2 * TEXT_BYTES_MAX + DICTIONARY_BYTES_MAX + CHECK_BYTES
)
TAIL = struct.Struct(">QQIIII32s")
BLOCK = struct.Struct(">HII8s32s")
CHUNK = struct.Struct(">II8sH")
FOOT = struct.Struct(">QQ8s32s8s8s")
#: The SHA-256 covers the footer up to here.
FOOT_HASHED = 24
_STREAM = struct.Struct(">IQQI")
_U16 = struct.Struct(">H")
_KEY_BYTES_MAX = 3 + TEXT_ID_BYTES_MAX


class Header(NamedTuple):
    """What is known before the first record is written."""

    first: int
    last: int
    frontier: tuple[bytes, ...]
    origin: str
    label: str
    dictionary: bytes = b""


class Block(NamedTuple):
    """Where a block lies and what it holds."""

    offset: int
    first: int
    records: int
    length: int
    stored: int
    check: bytes
    tree_hash: bytes

    @property
    def end(self) -> int:
        """The nid after its last record."""
        return self.first + self.records


class Chunk(NamedTuple):
    """Where a part of the index lies; it begins with the stream of ``key``."""

    offset: int
    length: int
    stored: int
    check: bytes
    key: bytes


class Stream(NamedTuple):
    """Where the events of one stream are: the numbers of the blocks that hold some."""

    key: bytes
    events: int
    least: int
    greatest: int
    blocks: tuple[int, ...]


class Tail(NamedTuple):
    """The directories, and what is known after the last record."""

    records: int
    record_bytes: int
    streams: int
    root: bytes
    checkpoint: str
    blocks: tuple[Block, ...]
    chunks: tuple[Chunk, ...]


# Header


def pack_header(header: Header) -> bytes:
    """The header's bytes. Raises DataError."""
    origin = _text(header.origin, "origin")
    label = _text(header.label, "label")
    if not 1 <= header.first <= header.last <= VERSION_MAX:
        raise DataError(f"a segment cannot hold records {header.first}..{header.last}")
    before = header.first - 1
    hashes = header.frontier
    if len(hashes) != before.bit_count() or any(len(each) != HASH_BYTES for each in hashes):
        raise DataError(f"these {len(hashes)} hashes are no frontier of {before} leaves")
    lengths = (len(origin), len(label), len(hashes), len(header.dictionary))
    head = HEAD.pack(HEAD_MAGIC, FORMAT, 0, header.first, header.last, *lengths)
    body = b"".join((head, *hashes, origin, label, header.dictionary))
    return body + check_of(body)


def unpack_header(data: bytes) -> tuple[Header, int]:
    """The header and its length, from the first `HEADER_BYTES_MAX` bytes of a file. Raises SegmentError."""
    if len(data) < HEAD.size or data[:8] != HEAD_MAGIC:
        raise SegmentError(0, "this is no segment")
    _, form, flags, first, last, origin_length, label_length, count, more = HEAD.unpack_from(data)
    if form != FORMAT or flags:
        raise SegmentError(8, f"a later version wrote it (format {form}, flags {flags:#x})")
    at = HEAD.size + count * HASH_BYTES
    label_end = at + origin_length + label_length
    end = label_end + more
    if end + CHECK_BYTES > len(data) or data[end : end + CHECK_BYTES] != check_of(data[:end]):
        raise SegmentError(0, "the header does not have its check")
    if not 1 <= first <= last <= VERSION_MAX or count != (first - 1).bit_count():
        raise SegmentError(12, f"it cannot hold records {first}..{last} after {count} hashes")
    hashes = tuple(data[place : place + HASH_BYTES] for place in range(HEAD.size, at, HASH_BYTES))
    try:
        origin = data[at : at + origin_length].decode()
        label = data[at + origin_length : label_end].decode()
    except UnicodeDecodeError as error:
        raise SegmentError(at, f"origin or label: {error}") from error
    return Header(first, last, hashes, origin, label, data[label_end:end]), end + CHECK_BYTES


def _text(text: str, what: str) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a segment's {what} is not valid text") from error
    if len(encoded) > TEXT_BYTES_MAX:
        raise DataError(f"a segment's {what} has {len(encoded)} bytes, over {TEXT_BYTES_MAX}")
    return encoded


# Index


def pack_stream(stream: Stream) -> bytes:
    """A stream's entry in the index."""
    packed = bytearray(_U16.pack(len(stream.key)) + stream.key)
    packed += _STREAM.pack(stream.events, stream.least, stream.greatest, len(stream.blocks))
    before = 0
    for number in stream.blocks:
        distance, before = number - before, number
        while distance > 0x7F:
            packed.append(0x80 | distance & 0x7F)
            distance >>= 7
        packed.append(distance)
    return bytes(packed)


def unpack_streams(data: bytes, blocks: int, offset: int) -> Iterator[Stream]:
    """The streams of a chunk, in order, for a segment of that many blocks. Raises SegmentError with ``offset``."""
    at = 0
    last = b""
    while at < len(data):
        stream, at = _unpack_stream(data, at, blocks, offset)
        if stream.key <= last:
            raise SegmentError(offset, "the index is not in the order of its keys")
        last = stream.key
        yield stream


def _unpack_stream(data: bytes, at: int, blocks: int, offset: int) -> tuple[Stream, int]:
    def refuse() -> NoReturn:
        raise SegmentError(offset, f"the index is damaged at {at} of its chunk")

    if at + 2 > len(data):
        refuse()
    start = at + 2
    end = start + _U16.unpack_from(data, at)[0]
    if end - start > _KEY_BYTES_MAX or end + _STREAM.size > len(data):
        refuse()
    events, least, greatest, count = _STREAM.unpack_from(data, end)
    place = end + _STREAM.size
    # Every number takes a byte or more: this bounds what is made of the word of a count.
    if not 1 <= count <= min(blocks, events, len(data) - place) or least > greatest:
        refuse()
    numbers: list[int] = []
    number = 0
    for _ in range(count):
        distance = shift = 0
        while True:
            if place >= len(data) or shift > 21:
                refuse()
            byte = data[place]
            place += 1
            distance |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        number += distance
        if number >= blocks or (numbers and not distance):
            refuse()
        numbers.append(number)
    return Stream(data[start:end], events, least, greatest, tuple(numbers)), place


# Tail and footer


def pack_tail(tail: Tail) -> bytes:
    """The tail's bytes."""
    checkpoint = tail.checkpoint.encode()
    counts = (len(tail.blocks), len(tail.chunks), len(checkpoint))
    parts = [TAIL.pack(tail.records, tail.record_bytes, tail.streams, *counts, tail.root)]
    parts += [BLOCK.pack(b.records, b.length, b.stored, b.check, b.tree_hash) for b in tail.blocks]
    for chunk in tail.chunks:
        parts.append(CHUNK.pack(chunk.length, chunk.stored, chunk.check, len(chunk.key)))
        parts.append(chunk.key)
    return b"".join((*parts, checkpoint))


def unpack_tail(data: bytes, offset: int, header: Header, header_bytes: int) -> Tail:
    """The tail of bytes that had their check, which began at ``offset``. Everything in it must fit the header and the
    place: raises SegmentError.
    """
    if len(data) < TAIL.size:
        raise SegmentError(offset, "the tail is cut off")
    records, size, streams, block_count, chunk_count, text, root = TAIL.unpack_from(data)
    at = TAIL.size
    if at + block_count * BLOCK.size + chunk_count * CHUNK.size + text > len(data):
        raise SegmentError(offset, "the tail is shorter than its directories")
    blocks = _unpack_blocks(data[at:], block_count, offset, header, header_bytes)
    if records != header.last - header.first + 1 or size != sum(b.length for b in blocks):
        raise SegmentError(offset, "the totals are not those of the blocks")
    at += block_count * BLOCK.size
    place = blocks[-1].offset + blocks[-1].stored
    chunks: list[Chunk] = []
    for _ in range(chunk_count):
        if at + CHUNK.size > len(data):
            raise SegmentError(offset, "the directory of the index is cut off")
        length, stored, check, key_length = CHUNK.unpack_from(data, at)
        at += CHUNK.size
        key = data[at : at + key_length]
        at += key_length
        if not 0 < length <= CHUNK_BYTES_MAX or (chunks and key <= chunks[-1].key):
            raise SegmentError(offset, f"chunk {len(chunks)} of the index cannot be")
        chunks.append(Chunk(place, length, stored, check, key))
        place += stored
    if at + text != len(data) or place != offset or not chunks or text > CHECKPOINT_BYTES_MAX:
        raise SegmentError(offset, "the tail does not fit what is before it")
    try:
        checkpoint = data[at:].decode()
    except UnicodeDecodeError as error:
        raise SegmentError(offset + at, f"checkpoint: {error}") from error
    return Tail(records, size, streams, root, checkpoint, blocks, tuple(chunks))


def _unpack_blocks(
    rows: bytes, count: int, offset: int, header: Header, header_bytes: int
) -> tuple[Block, ...]:
    blocks: list[Block] = []
    place, nid = header_bytes, header.first
    for number in range(count):
        records, length, stored, check, tree_hash = BLOCK.unpack_from(rows, number * BLOCK.size)
        room = BLOCK_RECORDS - (nid - 1) % BLOCK_RECORDS
        if not 1 <= records <= room or not records * RECORD_BYTES_MIN <= length <= BLOCK_BYTES_MAX:
            raise SegmentError(
                offset, f"block {number} cannot be ({records} records, {length} bytes)"
            )
        blocks.append(Block(place, nid, records, length, stored, check, tree_hash))
        place += stored
        nid += records
    if nid != header.last + 1 or count > BLOCKS_MAX:
        raise SegmentError(offset, f"the blocks end before record {nid}, not {header.last + 1}")
    return tuple(blocks)


def pack_footer(offset: int, tail: bytes, digest: bytes) -> bytes:
    """The footer; ``digest`` is the SHA-256 of all before it, and of its `footer_start`."""
    body = footer_start(offset, tail) + digest
    return body + check_of(body) + FOOT_MAGIC


def footer_start(offset: int, tail: bytes) -> bytes:
    """The part of the footer that the SHA-256 covers."""
    return struct.pack(">QQ8s", offset, len(tail), check_of(tail))


def unpack_footer(data: bytes, file_bytes: int) -> tuple[int, int, bytes, bytes]:
    """(tail's offset, tail's length, tail's check, SHA-256) of a file's last bytes. Raises SegmentError."""
    at = file_bytes - FOOT.size
    offset, length, check, digest, own, magic = FOOT.unpack(data)
    if magic != FOOT_MAGIC or own != check_of(data[: FOOT_HASHED + HASH_BYTES]):
        raise SegmentError(at, "the footer is damaged, or the file is cut off")
    if offset + length != at:
        raise SegmentError(at, f"the tail cannot be {length} bytes at {offset}")
    return offset, length, check, digest


class IndexBuilder:
    """Gathers where each stream's events are, record by record."""

    def __init__(self) -> None:
        self._streams: dict[bytes, tuple[list[int], array[int]]] = {}

    def add(self, key: bytes, version: int, block: int) -> None:
        """Note one record of block number ``block``; the numbers never fall."""
        found = self._streams.get(key)
        if found is None:
            self._streams[key] = ([1, version, version], array("I", (block,)))
            return
        totals, blocks = found
        totals[0] += 1
        totals[1] = min(totals[1], version)
        totals[2] = max(totals[2], version)
        if blocks[-1] != block:
            blocks.append(block)

    def streams(self) -> Iterator[Stream]:
        """What was noted, in the order of the keys."""
        for key in sorted(self._streams):
            (events, least, greatest), blocks = self._streams[key]
            yield Stream(key, events, least, greatest, tuple(blocks))

    def __len__(self) -> int:
        return len(self._streams)


def chunked(streams: Iterable[Stream]) -> Iterator[tuple[bytes, bytes]]:
    """(first key, bytes) of the chunks of an index. Raises DataError for one that is too large."""
    key, size = b"", 0
    parts: list[bytes] = []
    for stream in streams:
        packed = pack_stream(stream)
        if not parts:
            key = stream.key
        parts.append(packed)
        size += len(packed)
        if size >= CHUNK_BYTES:
            yield key, _joined(parts, size)
            parts, size = [], 0
    if parts:
        yield key, _joined(parts, size)


def _joined(parts: list[bytes], size: int) -> bytes:
    if size > CHUNK_BYTES_MAX:
        raise DataError(f"a part of the index of {size} bytes is over {CHUNK_BYTES_MAX}")
    return b"".join(parts)
