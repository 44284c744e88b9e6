# SPDX-License-Identifier: AGPL-3.0-or-later
"""The values of PHCBT01 and their byte layouts (docs/phcbt01.md): header, record head, digests.

Knows nothing of streams: order, index and root are ``track``'s, reading and writing are other
modules'.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from uuid import UUID

import xxhash

from replicator.errors import PhcbtError

MAGIC = b"PHCBT01\n"
VERSION = 1
HEAD_SIZE = 40
ENTRY_SIZE = 24
INDEX_EVERY = 1024
END_SIZE = HEAD_SIZE + 80
GRAIN_MIN = 4096
GRAIN_MAX = 1 << 20
CHUNK_MAX = 1 << 24
DISK_SIZE_MAX = 1 << 50
ROOT_SIZE = 32
#: A record number or a point: what fits the field.
U64_MAX = (1 << 64) - 1

_HEADER = struct.Struct(">8sIHBBIIQ16sQQ32sH")
_CHECK_SIZE = 8
HEADER_MIN = _HEADER.size + 1 + _CHECK_SIZE
HEADER_MAX = _HEADER.size + 64 + _CHECK_SIZE
_HEAD = struct.Struct(">BBHIQQQ")
_ENTRY = struct.Struct(">QQIBBH")
_U32 = struct.Struct(">I")
_DISK_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

_ZEROS = bytes(GRAIN_MAX)
_PROBE = 64

#: What digests and payloads are taken from and handed out as.
Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a record is."""

    DATA = 1
    ZERO = 2
    INDEX = 3
    END = 4


class Codec(IntEnum):
    """How a data record's payload is stored."""

    NONE = 0
    ZSTD = 1


class Algorithm(IntEnum):
    """The digest of a grain."""

    XXH3_128 = 1
    BLAKE3_256 = 2

    @property
    def digest_size(self) -> int:
        """Bytes of one digest."""
        return 16 if self is Algorithm.XXH3_128 else 32

    def digest_grains(self, plain: Buffer, grain: int) -> bytes:
        """The digests of consecutive grains of ``plain``, joined; a last short grain counts as
        padded with zeros.

        A grain of zeros has the digest of all zero bytes, and no other grain has it. CPU-bound: 1
        MiB takes well under a millisecond.
        """
        view = memoryview(plain)
        hasher = _xxh3_128 if self is Algorithm.XXH3_128 else _blake3_256
        reserved = bytes(self.digest_size)
        digests = []
        for start in range(0, len(view), grain):
            piece = view[start : start + grain]
            if is_zero(piece):
                digests.append(reserved)
                continue
            if len(piece) < grain:
                piece = memoryview(bytes(piece) + _ZEROS[: grain - len(piece)])
            digest = hasher(piece)
            digests.append(digest if digest != reserved else reserved[:-1] + b"\x01")
        return b"".join(digests)


def _xxh3_128(piece: memoryview) -> bytes:
    return xxhash.xxh3_128_digest(piece)


def _blake3_256(piece: memoryview) -> bytes:
    import blake3  # noqa: PLC0415 - half a megabyte that few chains need

    return blake3.blake3(piece).digest()


def is_zero(piece: memoryview) -> bool:
    """True if all bytes (at most 1 MiB) are zero. Almost free for data that does not begin with
    zeros.
    """
    if bytes(piece[:_PROBE]) != _ZEROS[: min(_PROBE, len(piece))]:
        return False
    return _ZEROS.startswith(bytes(piece))


@dataclass(frozen=True, slots=True)
class GrainRun:
    """``count`` grains from grain ``first`` on: their digests joined, or None if all are zeros."""

    first: int
    count: int
    digests: bytes | None


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """What a stream is about; sizes in bytes. Only valid ones can be built, else ValueError."""

    algorithm: Algorithm
    grain: int
    chunk: int
    disk_size: int
    vm: UUID
    base_point: int
    target_point: int
    base_root: bytes
    disk_id: str
    digest_size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reason = self._fault()
        if reason is not None:
            raise ValueError(reason)
        object.__setattr__(self, "digest_size", self.algorithm.digest_size)

    def _fault(self) -> str | None:
        """Why these values are not a header, or None."""
        if not GRAIN_MIN <= self.grain <= GRAIN_MAX or self.grain & (self.grain - 1):
            return f"grain of {self.grain} bytes"
        if not self.grain <= self.chunk <= CHUNK_MAX or self.chunk % self.grain:
            return f"chunk of {self.chunk} bytes with a grain of {self.grain}"
        if not 1 <= self.disk_size <= DISK_SIZE_MAX:
            return f"disk of {self.disk_size} bytes"
        if (
            not 0 <= self.base_point <= U64_MAX
            or not 1 <= self.target_point <= U64_MAX
            or self.base_point == self.target_point
        ):
            return f"point {self.target_point} on base {self.base_point}"
        if len(self.base_root) != ROOT_SIZE or (self.base_point == 0 and any(self.base_root)):
            return "base root does not fit the base"
        if _DISK_ID.fullmatch(self.disk_id) is None:
            return "disk id is not 1 to 64 of A-Z a-z 0-9 . _ - or starts with a dot"
        return None

    @property
    def is_full(self) -> bool:
        """True if the stream has no base: what it does not cover is zeros."""
        return self.base_point == 0

    def grains(self, length: int) -> int:
        """How many grains ``length`` bytes from a grain border touch."""
        return -(-length // self.grain)

    def encode(self) -> bytes:
        """The header's bytes, 107 to 170."""
        disk_id = self.disk_id.encode("ascii")
        fixed = _HEADER.pack(
            MAGIC,
            _HEADER.size + len(disk_id) + _CHECK_SIZE,
            VERSION,
            self.algorithm,
            0,
            self.grain,
            self.chunk,
            self.disk_size,
            self.vm.bytes,
            self.base_point,
            self.target_point,
            self.base_root,
            len(disk_id),
        )
        body = fixed + disk_id
        return body + xxhash.xxh3_64_digest(body)

    @classmethod
    def decode(cls, data: bytes) -> StreamHeader:
        """The header whose ``encode()`` is ``data``. Raises PhcbtError."""
        length = header_length(data[:12])
        if len(data) != length:
            raise PhcbtError(0, f"header of {length} bytes in {len(data)} bytes")
        body = data[:-_CHECK_SIZE]
        if xxhash.xxh3_64_digest(body) != data[-_CHECK_SIZE:]:
            raise PhcbtError(length - _CHECK_SIZE, "header check does not fit the header")
        fields = _HEADER.unpack_from(body)
        (
            _,
            _,
            version,
            algorithm,
            reserved,
            grain,
            chunk,
            size,
            vm,
            base,
            target,
            root,
            id_length,
        ) = fields
        if version != VERSION:
            raise PhcbtError(12, f"version {version}, this program reads {VERSION}")
        if algorithm not in (Algorithm.XXH3_128, Algorithm.BLAKE3_256):
            raise PhcbtError(14, f"unknown digest algorithm {algorithm}")
        if reserved:
            raise PhcbtError(15, "reserved header field is not zero")
        if id_length != len(body) - _HEADER.size:
            raise PhcbtError(96, f"disk id of {id_length} bytes in a header of {length}")
        try:
            disk_id = body[_HEADER.size :].decode("ascii")
            return cls(
                Algorithm(algorithm),
                grain,
                chunk,
                size,
                UUID(bytes=vm),
                base,
                target,
                root,
                disk_id,
            )
        except ValueError as error:
            reason = "disk id is not ASCII" if isinstance(error, UnicodeDecodeError) else str(error)
            raise PhcbtError(0, f"header: {reason}") from error


def header_length(prefix: bytes) -> int:
    """The length of the header that starts with these 12 bytes, within its bounds. Raises
    PhcbtError.
    """
    if prefix[:8] != MAGIC:
        raise PhcbtError(0, "not a PHCBT01 stream: magic missing")
    if len(prefix) < 12:
        raise PhcbtError(8, "the stream ends inside the header")
    length: int = _U32.unpack_from(prefix, 8)[0]
    if not HEADER_MIN <= length <= HEADER_MAX:
        raise PhcbtError(8, f"header length {length}")
    return length


@dataclass(frozen=True, slots=True)
class RecordHead:
    """The 40 bytes before every record, their own fields checked and nothing else."""

    kind: Kind
    codec: Codec
    payload_length: int
    offset: int
    length: int
    raw: bytes = field(repr=False)

    @classmethod
    def build(
        cls,
        kind: Kind,
        codec: Codec,
        payload_length: int,
        *,
        offset: int,
        length: int,
        guarded: bytes,
    ) -> RecordHead:
        """Make a head; ``guarded`` is what its check covers besides itself: digests, or the
        payload.
        """
        raw = _HEAD.pack(kind, codec, 0, payload_length, offset, length, 0)
        return cls(
            kind, codec, payload_length, offset, length, raw + xxhash.xxh3_64_digest(raw + guarded)
        )

    @classmethod
    def decode(cls, raw: bytes, position: int) -> RecordHead:
        """Take 40 bytes apart. Raises PhcbtError at ``position``, which is the head's in the
        stream.
        """
        kind, codec, reserved, payload_length, offset, length, reserved_too = _HEAD.unpack_from(raw)
        if not Kind.DATA <= kind <= Kind.END:
            raise PhcbtError(position, f"unknown record kind {kind}")
        if codec > (Codec.ZSTD if kind == Kind.DATA else Codec.NONE):
            raise PhcbtError(position, f"codec {codec} in a record of kind {kind}")
        if reserved or reserved_too:
            raise PhcbtError(position, "reserved field of a record is not zero")
        return cls(Kind(kind), Codec(codec), payload_length, offset, length, raw)

    def check_guard(self, guarded: Buffer, position: int) -> None:
        """Raise PhcbtError unless the check fits this head and what it guards."""
        hasher = xxhash.xxh3_64(self.raw[:32])
        hasher.update(guarded)
        if hasher.digest() != self.raw[32:]:
            raise PhcbtError(position, f"check of the {self.kind.name.lower()} record does not fit")

    @property
    def end(self) -> int:
        """First disk byte after a block."""
        return self.offset + self.length

    def digests_size(self, header: StreamHeader) -> int:
        """Bytes of digests after this head."""
        if self.kind is not Kind.DATA:
            return 0
        return header.grains(self.length) * header.digest_size

    def block_fault(self, header: StreamHeader) -> str | None:
        """Why this cannot be a data or zero record of a stream with this header, or None."""
        if self.offset % header.grain or not 1 <= self.length <= header.chunk:
            return f"block of {self.length} bytes at disk byte {self.offset}"
        if self.end > header.disk_size:
            return f"block up to disk byte {self.end} on a disk of {header.disk_size}"
        if self.length % header.grain and self.end != header.disk_size:
            return f"block of {self.length} bytes ends inside a grain"
        if self.kind is Kind.ZERO:
            fits = self.payload_length == 0
        elif self.codec is Codec.NONE:
            fits = self.payload_length == self.length
        else:
            fits = 1 <= self.payload_length < self.length
        return None if fits else f"payload of {self.payload_length} bytes for {self.length}"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """Where the block of some part of the disk stands in the stream."""

    offset: int
    position: int
    length: int
    kind: Kind
    codec: Codec

    @property
    def end(self) -> int:
        """First disk byte after the block."""
        return self.offset + self.length

    def encode(self) -> bytes:
        """The 24 bytes of an index entry."""
        return _ENTRY.pack(self.offset, self.position, self.length, self.kind, self.codec, 0)

    @classmethod
    def decode(cls, data: Buffer, at: int, position: int) -> IndexEntry:
        """The entry at ``at`` in the payload of the index record at stream ``position``.
        PhcbtError.
        """
        offset, block, length, kind, codec, reserved = _ENTRY.unpack_from(data, at)
        if kind not in (Kind.DATA, Kind.ZERO) or codec > Codec.ZSTD or reserved:
            raise PhcbtError(position, f"index entry of kind {kind} with codec {codec}")
        return cls(offset, block, length, Kind(kind), Codec(codec))


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A data or zero record as it stands in a stream: three pieces, none copied."""

    head: RecordHead
    digests: bytes
    payload: bytes | memoryview

    @property
    def offset(self) -> int:
        """First disk byte."""
        return self.head.offset

    @property
    def length(self) -> int:
        """Disk bytes covered."""
        return self.head.length

    @property
    def is_zero(self) -> bool:
        """True for a zero record."""
        return self.head.kind is Kind.ZERO

    @property
    def size(self) -> int:
        """Bytes in the stream."""
        return HEAD_SIZE + len(self.digests) + len(self.payload)

    @property
    def skeleton(self) -> bytes:
        """The record without its payload: what a source spools so that it can resume."""
        return self.head.raw + self.digests

    def run(self, header: StreamHeader) -> GrainRun:
        """The grains that the record sets."""
        return grain_run(self.head, self.digests, header)


def grain_run(head: RecordHead, digests: bytes, header: StreamHeader) -> GrainRun:
    """The grains that a block sets."""
    count = header.grains(head.length)
    first = head.offset // header.grain
    return GrainRun(first, count, None if head.kind is Kind.ZERO else digests)
