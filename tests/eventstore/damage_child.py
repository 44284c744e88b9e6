# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reads a store whose data file is damaged in one place after the other: FOLDER FIRST.

Prints one line for each damage, before it reads and after: if this process dies, the parent knows
where. Damages are numbered, and FIRST is where to begin.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from eventsourcing.persistence import Notification, PersistenceError, StoredEvent

from eventstore import LMDBApplicationRecorder, LMDBEnvironment

IDS = [f"aggregate {number}" for number in range(12)]
TOPICS = ["topic 0", "topic 1", "topic 2"]
COUNT = 150
PAGE_BYTES = 4096
HEADER_BYTES = 16
META_BYTES = 152


def build(folder: str) -> None:
    """A store with every kind of row, and pages that were freed."""
    with LMDBEnvironment.open(folder, map_size=1 << 20) as opened:
        recorder = LMDBApplicationRecorder(opened, "app", tree=True)
        for first in range(1, COUNT, 10):
            recorder.insert_events(
                [
                    StoredEvent(IDS[n % 12], n, TOPICS[n % 3], b"state %d " % n * 9)
                    for n in range(first, first + 10)
                ]
            )


def flips(data: bytes) -> Iterator[tuple[int, int]]:
    """(byte, bit): every bit of the first bytes of the meta pages, and one bit of each byte of the
    pages' headers and of a sample of the rest.
    """
    for page in (0, PAGE_BYTES):
        for position in range(page, page + META_BYTES):
            for bit in range(8):
                yield position, bit
    for position in range(2 * PAGE_BYTES, len(data)):
        offset = position % PAGE_BYTES
        if offset < HEADER_BYTES or position % 97 == 0:
            yield position, position % 7


def select(recorder: LMDBApplicationRecorder) -> list[list[StoredEvent] | list[Notification]]:
    """Everything that can be asked for."""
    found: list[list[StoredEvent] | list[Notification]] = [
        list(recorder.select_notifications(None, 2 * COUNT)),
        list(recorder.select_notifications(None, 2 * COUNT, topics=TOPICS[:1])),
    ]
    found += [list(recorder.select_events(name)) for name in IDS]
    found += [list(recorder.select_events(name, desc=True, limit=2)) for name in IDS]
    return found


def judge(folder: str, whole: list[list[StoredEvent] | list[Notification]]) -> str:
    """What a damaged store says: ``harmless``, ``error``, ``hides`` or ``wrong``."""
    try:
        with LMDBEnvironment.open(folder, readonly=True) as opened:
            recorder = LMDBApplicationRecorder(opened, "app")
            found = select(recorder)
            if found == whole:
                return "harmless"
            stored = {event for every in whole for event in every}
            if not all(event in stored for some in found for event in some):
                return "wrong"
            # Less than there is. A look at all of it tells, unless all of it is an older state.
            count = recorder.verify()
            return f"hides: {count} events are left"
    except PersistenceError as error:
        return f"error {type(error).__name__}"


def main(folder: str, first: int) -> None:
    original = Path(folder) / "whole" / "data.mdb"
    data = original.read_bytes()
    with LMDBEnvironment.open(folder + "/whole", readonly=True) as opened:
        whole = select(LMDBApplicationRecorder(opened, "app"))
    damaged = folder + "/damaged"
    os.makedirs(damaged, exist_ok=True)
    file = os.open(damaged + "/data.mdb", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(file, data, 0)
    for number, (position, bit) in enumerate(flips(data)):
        if number < first:
            continue
        os.write(1, f"{number} {position} {bit} ".encode())
        os.pwrite(file, bytes([data[position] ^ 1 << bit]), position)
        os.write(1, f"{judge(damaged, whole)}\n".encode())
        os.pwrite(file, data[position : position + 1], position)
    os.close(file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
