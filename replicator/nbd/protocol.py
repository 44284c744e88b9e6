# SPDX-License-Identifier: AGPL-3.0-or-later
"""The NBD protocol's numbers and messages, shared by our client and our server. No input or output
here.

Source of every number: the NBD project's ``doc/proto.md`` (fixed newstyle negotiation, structured
replies, metadata contexts). Every length that a peer names is checked against a bound before anyone
waits for, or allocates, that much.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from replicator.errors import SourceError

INIT_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

#: Bounds. A name is limited by the specification; the others are what QEMU and nbdkit use.
NAME_LENGTH_MAX = 4096
OPTION_LENGTH_MAX = 64 << 10
PAYLOAD_MAX = 32 << 20
STATUS_PAYLOAD_MAX = 4 + 8 * (1 << 17)
ERROR_PAYLOAD_MAX = 4 + 2 + NAME_LENGTH_MAX + 8
REQUEST_LENGTH_MAX = 0xFFFFFFFF

BASE_ALLOCATION = "base:allocation"
DIRTY_BITMAP = "qemu:dirty-bitmap:"

#: Flags of a ``base:allocation`` extent, and of a ``qemu:dirty-bitmap:`` extent.
STATE_HOLE = 1
STATE_ZERO = 2
STATE_DIRTY = 1


class HandshakeFlag(IntFlag):
    """Global and client handshake flags (they share their values)."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class TransmissionFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    CAN_MULTI_CONN = 256


class Option(IntEnum):
    """Negotiation requests."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """Negotiation replies; those with the top bit are errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUPPORTED = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006
    ERR_TOO_BIG = 0x80000009


REPLY_ERROR = 0x80000000


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Command(IntEnum):
    """Requests in the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of a request."""

    NONE = 0
    FUA = 1
    NO_HOLE = 2
    REQ_ONE = 8


class Chunk(IntEnum):
    """Kinds of structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 32769
    ERROR_OFFSET = 32770


CHUNK_ERROR = 0x8000
CHUNK_DONE = 1

GREETING = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_INFO = struct.Struct(">QH")
BLOCK_SIZE_INFO = struct.Struct(">III")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
OFFSET_HOLE = struct.Struct(">QI")
STATUS = struct.Struct(">II")


class NbdError(SourceError):
    """An NBD server refused or failed a request; ``code`` is its error number (errno), 0 if it gave
    none.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class NbdProtocolError(NbdError):
    """The other side broke the protocol. The connection is over."""


class NbdDisconnectedError(NbdError):
    """The connection is gone; whether requests in flight took effect is unknown."""


@dataclass(frozen=True, slots=True)
class StatusExtent:
    """A range and what one metadata context says of it."""

    offset: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it travels (without a write's payload)."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int

    def encode(self) -> bytes:
        """The request's 28 bytes."""
        return REQUEST.pack(
            REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, self.length
        )

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Read 28 bytes; raises NbdProtocolError on a wrong magic."""
        magic, flags, command, cookie, offset, length = REQUEST.unpack(data)
        if magic != REQUEST_MAGIC:
            raise NbdProtocolError("request without its magic number", errno.EINVAL)
        return cls(flags, command, cookie, offset, length)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What negotiation said about an export; sizes in bytes."""

    size: int
    flags: TransmissionFlag
    block_min: int = 1
    block_max: int = PAYLOAD_MAX


def encode_option(option: Option, payload: bytes = b"") -> bytes:
    """One negotiation request."""
    return OPTION.pack(OPTION_MAGIC, option, len(payload)) + payload


def encode_option_reply(option: int, reply: Reply, payload: bytes = b"") -> bytes:
    """One negotiation reply."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(payload)) + payload


def encode_name(name: str) -> bytes:
    """A name with its length before it; raises NbdError if it is too long."""
    data = name.encode()
    if len(data) > NAME_LENGTH_MAX:
        raise NbdError(f"name of {len(data)} bytes: NBD allows {NAME_LENGTH_MAX}")
    return U32.pack(len(data)) + data


class Reader:
    """Takes a bounded option payload apart; anything missing is an NbdProtocolError."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        end = self._at + count
        if end > len(self._data):
            raise NbdProtocolError("negotiation message is shorter than it says", errno.EINVAL)
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def u16(self) -> int:
        """The next 16-bit number."""
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        """The next 32-bit number."""
        return int.from_bytes(self.take(4), "big")

    def name(self) -> str:
        """A name with its length before it."""
        length = self.u32()
        if length > NAME_LENGTH_MAX:
            raise NbdProtocolError(f"name of {length} bytes", errno.EINVAL)
        return self.text(length)

    def text(self, length: int) -> str:
        """``length`` bytes as UTF-8."""
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise NbdProtocolError("name is not UTF-8", errno.EINVAL) from None

    def rest(self) -> bytes:
        """Everything left."""
        return self.take(len(self._data) - self._at)

    def end(self) -> None:
        """Demand that nothing is left."""
        if self._at != len(self._data):
            raise NbdProtocolError("negotiation message is longer than it says", errno.EINVAL)


def encode_go(export: str, wanted: Sequence[Info]) -> bytes:
    """Payload of INFO and GO."""
    return encode_name(export) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def decode_go(payload: bytes) -> tuple[str, list[int]]:
    """Export name and kinds of information wanted."""
    reader = Reader(payload)
    export = reader.name()
    wanted = [reader.u16() for _ in range(reader.u16())]
    reader.end()
    return export, wanted


def encode_contexts(export: str, queries: Sequence[str]) -> bytes:
    """Payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return encode_name(export) + U32.pack(len(queries)) + b"".join(encode_name(q) for q in queries)


def decode_contexts(payload: bytes) -> tuple[str, list[str]]:
    """Export name and queries. The payload's own bound also bounds the number of queries."""
    reader = Reader(payload)
    export = reader.name()
    queries = [reader.name() for _ in range(reader.u32())]
    reader.end()
    return export, queries


def decode_info(payload: bytes, known: ExportInfo | None) -> ExportInfo | None:
    """Add one INFO reply to what is known of an export. Kinds that we did not ask for change
    nothing.
    """
    reader = Reader(payload)
    kind = reader.u16()
    if kind == Info.EXPORT:
        size, flags = EXPORT_INFO.unpack(reader.take(EXPORT_INFO.size))
        reader.end()
        if size >= 1 << 63:
            raise NbdProtocolError(f"export of {size} bytes", errno.EINVAL)
        block_min, block_max = (known.block_min, known.block_max) if known else (1, PAYLOAD_MAX)
        return ExportInfo(size, TransmissionFlag(flags), block_min, block_max)
    if kind == Info.BLOCK_SIZE:
        minimum, _preferred, maximum = BLOCK_SIZE_INFO.unpack(reader.take(BLOCK_SIZE_INFO.size))
        reader.end()
        if not 1 <= minimum <= 64 << 10 or minimum & (minimum - 1) or maximum < minimum:
            raise NbdProtocolError(f"block sizes {minimum} to {maximum}", errno.EINVAL)
        largest = min(maximum, PAYLOAD_MAX) // minimum * minimum
        if known is None:
            return ExportInfo(0, TransmissionFlag(0), minimum, largest)
        return ExportInfo(known.size, known.flags, minimum, largest)
    return known


def decode_status(
    payload: bytes | bytearray, offset: int, length: int
) -> tuple[int, list[StatusExtent]]:
    """Context id and extents of a BLOCK_STATUS chunk for a request of ``length`` bytes at
    ``offset``.

    The last extent may say more than was asked: it is cut. Raises NbdProtocolError.
    """
    if len(payload) < 12 or (len(payload) - 4) % 8:
        raise NbdProtocolError(f"block status of {len(payload)} bytes", errno.EINVAL)
    context = U32.unpack_from(payload)[0]
    extents: list[StatusExtent] = []
    end = offset + length
    at = offset
    for size, flags in STATUS.iter_unpack(memoryview(payload)[4:]):
        if size == 0 or at >= end:
            raise NbdProtocolError("block status extent that covers nothing asked", errno.EINVAL)
        extents.append(StatusExtent(at, min(size, end - at), flags))
        at += size
    return context, extents


def error_text(code: int) -> str:
    """The operating system's words for an NBD error number (they are Linux errnos by
    specification).
    """
    return errno.errorcode.get(code, f"error {code}")
