# SPDX-License-Identifier: AGPL-3.0-or-later
"""The topics of one log: each has a number, so that a record need not repeat its text; and for each
number, which events have it.

``topics`` holds number → text. ``by-topic`` holds bitmaps: key topic number u32 and block u64; value
check u64 (xxh3-64 of key and bitmap) and 256 bits as one big-endian number, in which bit ``i`` is
the event ``block * 256 + i``. One row for 256 events costs a batch next to nothing, where a row for
each event made it slower than the log itself. Knows nothing of what else is in a record.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import xxhash
from eventsourcing.persistence import InternalError, OperationalError

from eventstore import records

if TYPE_CHECKING:
    from eventstore.environment import Cursor, Database, Transaction

TOPICS_MAX = 1 << 16
BLOCK_BITS = 8
BLOCK_EVENTS = 1 << BLOCK_BITS
_BITMAP_BYTES = BLOCK_EVENTS // 8
_CHECK_BYTES = 8
_KEY = struct.Struct(">IQ")


class Topics:
    """The numbers of a log's topics, as far as they are known to be committed."""

    __slots__ = ("_by_name", "_database", "by_number")

    def __init__(self, database: Database) -> None:
        self._database = database
        self._by_name: dict[str, int] = {}
        self.by_number: dict[int, str] = {}

    def name(self, txn: Transaction, number: int, nid: int) -> str:
        """The text of a topic's number, in a read transaction. Raises InternalError naming the
        event if there is none.
        """
        topic = self.by_number.get(number)
        if topic is None:
            self.promote(self._stored(txn))
            topic = self.by_number.get(number)
            if topic is None:
                raise topic_missing(nid, number)
        return topic

    def stored_names(self, txn: Transaction) -> dict[int, str]:
        """All numbers and texts that the caller's transaction sees; nothing is remembered."""
        return {number: topic for topic, number in self._stored(txn).items()}

    def numbers(self, txn: Transaction, topics: Collection[str]) -> list[int]:
        """The numbers of those topics that the log has, in a read transaction."""
        if any(topic not in self._by_name for topic in topics):
            self.promote(self._stored(txn))
        return [self._by_name[topic] for topic in set(topics) if topic in self._by_name]

    def intern(self, txn: Transaction, topic: str, new: dict[str, int]) -> int:
        """The number of ``topic`` in a write transaction, given to it now if it has none.

        What is not known to be committed is kept in ``new``, for `promote` after the commit.
        """
        number = self._by_name.get(topic)
        if number is None:
            number = new.get(topic)
        if number is not None:
            return number
        # Another recorder or process may have added it, or another operation of this transaction.
        new.update(self._stored(txn))
        number = new.get(topic)
        if number is None:
            number = len(new)
            if number >= TOPICS_MAX:
                raise OperationalError(f"{number} topics are in use, and no more are allowed")
            key, value = records.encode_topic(number, topic)
            if not txn.put(key, value, overwrite=False, db=self._database):
                raise InternalError(f"topic {number} is already there")
            new[topic] = number
        return number

    def promote(self, committed: dict[str, int]) -> None:
        """Remember numbers that are committed."""
        for topic, number in committed.items():
            # By number first: whoever finds the name in another thread can find the number too.
            self.by_number[number] = topic
            self._by_name[topic] = number

    def _stored(self, txn: Transaction) -> dict[str, int]:
        found: dict[str, int] = {}
        with txn.cursor(self._database) as cursor:
            for key, value in cursor:
                if key != records.FLOOR_KEY:
                    number, topic = records.decode_topic(key, value)
                    found[topic] = number
        return found


def topic_missing(nid: int, number: int) -> InternalError:
    """The error for an event whose topic's number has no text."""
    return InternalError(f"event {nid} has topic number {number}, which is not there")


class TopicIndex:
    """Which events have which topic, by the topic's number."""

    __slots__ = ("_database",)

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, txn: Transaction, number: int, nids: Iterable[int]) -> None:
        """Note that the events ``nids`` have the topic."""
        for block, added in _blocks(nids).items():
            key = _KEY.pack(number, block)
            stored = txn.get(key, db=self._database)
            bits = 0 if stored is None else _bitmap(key, stored)
            txn.put(key, _sealed(key, bits | added), db=self._database)

    def remove(self, txn: Transaction, number: int, nids: Iterable[int]) -> None:
        """Forget events; those that are not there are no error."""
        for block, bits in _blocks(nids).items():
            key = _KEY.pack(number, block)
            stored = txn.get(key, db=self._database)
            if stored is None:
                continue
            left = _bitmap(key, stored) & ~bits
            if left:
                txn.put(key, _sealed(key, left), db=self._database)
            else:
                txn.delete(key, db=self._database)

    def check(self, txn: Transaction, number: int, nids: Iterable[int]) -> None:
        """Raises InternalError unless all the events are there under the topic."""
        for block, bits in _blocks(nids).items():
            key = _KEY.pack(number, block)
            stored = txn.get(key, db=self._database)
            lacking = bits if stored is None else bits & ~_bitmap(key, stored)
            if lacking:
                nid = next(_events(block, lacking))
                raise InternalError(f"event {nid} is missing from the topic index")

    def count(self, txn: Transaction) -> int:
        """How many events it has, of all topics together."""
        with txn.cursor(self._database) as cursor:
            return sum(_bitmap(key, value).bit_count() for key, value in cursor)

    def select(self, txn: Transaction, numbers: Iterable[int], low: int) -> Iterator[int]:
        """The events from ``low`` on that have one of the topics, ascending.

        Raises InternalError if a row is damaged.
        """
        first = low >> BLOCK_BITS
        cursors = [(number, txn.cursor(self._database)) for number in numbers]
        heads: dict[int, tuple[int, int]] = {}
        try:
            for place, (number, cursor) in enumerate(cursors):
                found = _row(cursor, number, going=cursor.set_range(_KEY.pack(number, first)))
                if found is not None:
                    heads[place] = found
            while heads:
                block = min(block for block, _ in heads.values())
                bits = 0
                for place in [place for place, head in heads.items() if head[0] == block]:
                    bits |= heads.pop(place)[1]
                    number, cursor = cursors[place]
                    found = _row(cursor, number, going=cursor.next())
                    if found is not None:
                        heads[place] = found
                if block == first:
                    skipped = low - (block << BLOCK_BITS)
                    bits = bits >> skipped << skipped
                yield from _events(block, bits)
        finally:
            for _, cursor in cursors:
                cursor.close()


def _events(block: int, bits: int) -> Iterator[int]:
    base = (block << BLOCK_BITS) - 1
    while bits:
        lowest = bits & -bits
        yield base + lowest.bit_length()
        bits ^= lowest


def _blocks(nids: Iterable[int]) -> dict[int, int]:
    """Bitmaps by block."""
    found: dict[int, int] = {}
    for nid in nids:
        block = nid >> BLOCK_BITS
        found[block] = found.get(block, 0) | 1 << (nid & (BLOCK_EVENTS - 1))
    return found


def _row(cursor: Cursor, number: int, *, going: bool) -> tuple[int, int] | None:
    """(block, bitmap) under the cursor, None if the topic has no more."""
    if not going:
        return None
    key, value = cursor.item()
    if len(key) != _KEY.size:
        raise InternalError(f"damaged topic index: a key of {len(key)} bytes")
    found, block = _KEY.unpack(key)
    return (block, _bitmap(key, value)) if found == number else None


def _sealed(key: bytes, bits: int) -> bytes:
    bitmap = bits.to_bytes(_BITMAP_BYTES)
    return xxhash.xxh3_64_digest(key + bitmap) + bitmap


def _bitmap(key: bytes, value: bytes) -> int:
    bitmap = value[_CHECK_BYTES:]
    if len(bitmap) != _BITMAP_BYTES or value[:_CHECK_BYTES] != xxhash.xxh3_64_digest(key + bitmap):
        raise InternalError(f"topic index row {key.hex()} is damaged: it lacks its checksum")
    return int.from_bytes(bitmap)
