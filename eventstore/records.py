# SPDX-License-Identifier: AGPL-3.0-or-later
"""How an event, its aggregate's id and its topic are laid out in bytes. Pure: no database here.

All integers are big-endian, so that LMDB's byte order is the order of the numbers.

record   format u8 = 1, flags u8, topic number u32, version u64, check u64, id, state
id       a UUID: its 16 bytes; text: length u16, UTF-8
flags    bit 0: the id is text. The other bits are room for an event id and metadata; a record
         that has one set was written by a later version and is refused, not guessed at
check    xxh3-64 of: notification id u64, the record without its check. So a whole record in
         another's place is found too
index    key: kind u8 (0 UUID, 1 text) and the id as above; value: version u64,
         notification id u64
topics   key: number u32; value: check u64 (xxh3-64 of the key and the text), UTF-8 text
floor    key: the five letters ``floor``, among the topics; value: check u64 (xxh3-64 of the key and
         the number), notification id u64. All events up to it have been moved away
position key: an upstream application's name, UTF-8; value: check u64 (xxh3-64 of the key and the
         number), notification id u64

canonical record, what a leaf of the tree covers: format u8 = 1, notification id u64, version u64,
lengths of the three that follow (key u16, topic u16, state u32), index key, topic text, state
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from uuid import UUID

import xxhash
from eventsourcing.persistence import DataError, InternalError, NotSupportedError

FORMAT = 1
FLAG_TEXT_ID = 0x01
#: LMDB keys end at 511 bytes; a text id shares its key with a kind and a length.
TEXT_ID_BYTES_MAX = 400
TOPIC_BYTES_MAX = 1024
STATE_BYTES_MAX = 16 << 20
VERSION_MAX = (1 << 63) - 1

_digest = xxhash.xxh3_64_digest
_FIXED = struct.Struct(">BBIQ")
_U64 = struct.Struct(">Q")
_U64_PAIR = struct.Struct(">QQ")
_U32 = struct.Struct(">I")
_U16 = struct.Struct(">H")
_CANONICAL = struct.Struct(">BQQHHI")
_CANONICAL_FORMAT = 1
_CHECK_BYTES = 8
FLOOR_KEY = b"floor"
ENTRY_BYTES = 16
_KIND_UUID = b"\x00"
#: Format and flags of a record whose id is a UUID.
_PLAIN = bytes([FORMAT, 0])
_KIND_TEXT = b"\x01"


class Record(NamedTuple):
    """A decoded record. ``key`` is the index key of its aggregate; `originator_id` gives the id
    itself.
    """

    topic: int
    version: int
    key: bytes
    state: bytes


def originator_key(originator_id: UUID | str) -> bytes:
    """The index key of an aggregate id: no key is the beginning of another. Raises DataError."""
    if isinstance(originator_id, UUID):
        return _KIND_UUID + originator_id.bytes
    if not isinstance(originator_id, str):
        raise DataError(f"an aggregate id is a UUID or text, not {type(originator_id).__name__}")
    text = _utf8(originator_id, "aggregate id", TEXT_ID_BYTES_MAX)
    return _KIND_TEXT + _U16.pack(len(text)) + text


def originator_id(key: bytes) -> UUID | str:
    """The aggregate id of an index key, with the type that it was stored with."""
    return UUID(bytes=key[1:]) if key[0] == 0 else key[3:].decode()


def pack_u64(number: int) -> bytes:
    """A number as an ordered key."""
    return _U64.pack(number)


def unpack_u64(key: bytes) -> int:
    """The number of an ordered key. Raises InternalError."""
    if len(key) != _U64.size:
        raise InternalError(f"damaged log: a key of {len(key)} bytes")
    return int.from_bytes(key)


def pack_entry(version: int, nid: int) -> bytes:
    """The index value, of `ENTRY_BYTES`, that says where a version's record is."""
    return _U64_PAIR.pack(version, nid)


def check_version(version: int) -> None:
    """Raises DataError unless an aggregate's version is within 0..2^63-1."""
    if not 0 <= version <= VERSION_MAX:
        raise DataError(f"aggregate version {version} is not within 0..{VERSION_MAX}")


def check_nid(nid: int) -> None:
    """Raises DataError unless a notification id is within 0..2^63-1."""
    if not 0 <= nid <= VERSION_MAX:
        raise DataError(f"notification id {nid} is not within 0..{VERSION_MAX}")


def check_topic(topic: str) -> None:
    """Raises DataError if a topic is no text, empty or too long."""
    # Nearly every topic is plain: those need no encoding to be measured.
    if not topic.isascii() or not 1 <= len(topic) <= TOPIC_BYTES_MAX:
        _utf8(topic, "topic", TOPIC_BYTES_MAX)


def application_key(name: str) -> bytes:
    """The key of an upstream application's position. Raises DataError."""
    return _utf8(name, "application name", TEXT_ID_BYTES_MAX)


def check_state(state: bytes) -> None:
    """Raises DataError if an event's state is no bytes or too long."""
    if not isinstance(state, bytes):
        raise DataError(f"an event's state is bytes, not {type(state).__name__}")
    if len(state) > STATE_BYTES_MAX:
        raise DataError(f"an event's state of {len(state)} bytes is over {STATE_BYTES_MAX}")


def encode_record(nid: int, topic: int, version: int, key: bytes, state: bytes) -> bytes:
    """The record of an event under notification id ``nid``; `check_state` has accepted its state."""
    head = _FIXED.pack(FORMAT, key[0], topic, version)
    body = key[1:] + state
    return head + _digest(_U64.pack(nid) + head + body) + body


def plain_record(key: bytes, record: bytes) -> tuple[int, int, bytes] | None:
    """Topic number, version, and aggregate id and state together, of a sound record of a UUID's event; None for any other,
    of which `decode_record` says what it is. ``key`` is the notification id as it is stored.
    """
    body = record[22:]
    sound = record[14:22] == _digest(key + record[:14] + body) and len(body) >= 16
    if not sound or record[:2] != _PLAIN:
        return None
    _, _, topic, version = _FIXED.unpack_from(record)
    return topic, version, body


def decode_record(nid: int, record: bytes) -> Record:
    """Check and take apart the record stored under ``nid``.

    Raises InternalError naming ``nid`` if it is damaged, NotSupportedError if a later version wrote
    it.
    """
    head, body = record[:14], record[22:]
    if record[14:22] != _digest(_U64.pack(nid) + head + body) or len(head) != _FIXED.size:
        raise InternalError(f"event {nid} is damaged: its record does not have its checksum")
    form, flags, topic, version = _FIXED.unpack(head)
    if form != FORMAT or flags & ~FLAG_TEXT_ID:
        raise NotSupportedError(
            f"event {nid} was written by a later version (format {form}, flags {flags:#x})"
        )
    if flags:
        end = 2 + int.from_bytes(body[:2])
        kind = _KIND_TEXT
    else:
        end = 16
        kind = _KIND_UUID
    if end > len(body):
        raise InternalError(f"event {nid} is damaged: its aggregate id is cut off")
    return Record(topic, version, kind + body[:end], body[end:])


class Reader:
    """Reads the records of one aggregate, whose ``key`` is known: what is known need not be taken
    apart.
    """

    __slots__ = ("_begin", "_body", "_key")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._begin = bytes((FORMAT, key[0]))
        self._body = key[1:]

    def read(self, entry: bytes, record: bytes) -> tuple[int, bytes]:
        """(topic number, state) of the record that an index value names. Raises as `decode_record`,
        and InternalError if it is another event's.
        """
        head, body = record[:14], record[22:]
        if (
            record[14:22] != _digest(entry[8:] + head + body)
            or not head.startswith(self._begin)
            or head[6:] != entry[:8]
            or not body.startswith(self._body)
        ):
            nid = int.from_bytes(entry[8:])
            decode_record(nid, record)
            raise InternalError(f"event {nid} is not the one that the index names")
        return int.from_bytes(head[2:6]), body[len(self._body) :]


def canonical_record(nid: int, key: bytes, version: int, topic: str, state: bytes) -> bytes:
    """What the tree's leaf of an event covers: no two events have the same. ``key`` is
    `originator_key` of its aggregate's id.

    Not what is stored: no number of a topic, no checksum. Raises DataError.
    """
    text = _utf8(topic, "topic", TOPIC_BYTES_MAX)
    head = _CANONICAL.pack(_CANONICAL_FORMAT, nid, version, len(key), len(text), len(state))
    return b"".join((head, key, text, state))


def encode_topic(number: int, topic: str) -> tuple[bytes, bytes]:
    """Key and value of a topic's row. Raises DataError."""
    key = _U32.pack(number)
    text = _utf8(topic, "topic", TOPIC_BYTES_MAX)
    return key, _check(key, text) + text


def decode_topic(key: bytes, value: bytes) -> tuple[int, str]:
    """(number, topic) of a row. Raises InternalError if it is damaged."""
    text = value[_CHECK_BYTES:]
    if len(key) != _U32.size or value[:_CHECK_BYTES] != _check(key, text):
        raise InternalError(f"topic {key.hex()} is damaged: it does not have its checksum")
    return int.from_bytes(key), text.decode()


def encode_number(key: bytes, number: int) -> bytes:
    """The value of a row that holds one number: the floor, a position."""
    packed = _U64.pack(number)
    return _check(key, packed) + packed


def decode_number(key: bytes, value: bytes) -> int:
    """The number of such a row. Raises InternalError if it is damaged."""
    packed = value[_CHECK_BYTES:]
    if len(packed) != _U64.size or value[:_CHECK_BYTES] != _check(key, packed):
        raise InternalError(f"row {key!r} is damaged: it does not have its checksum")
    return int.from_bytes(packed)


def _check(*parts: bytes) -> bytes:
    return _digest(b"".join(parts))


def _utf8(text: str, what: str, limit: int) -> bytes:
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the {what} is not valid text") from error
    if not 1 <= len(encoded) <= limit:
        raise DataError(f"the {what} has {len(encoded)} bytes, not 1..{limit}")
    return encoded
