# SPDX-License-Identifier: AGPL-3.0-or-later
"""The whole log, live rows and sealed segments together, as if nothing had ever been moved away. Everything here blocks.

Segments stand in ``events/segments``. One that an operator has moved off is named in the error, and can be brought back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from eventsourcing.persistence import InternalError, Notification, OperationalError, StoredEvent

from eventstore.environment import LMDBEnvironment
from eventstore.eventlog import SCAN_MAX
from eventstore.journal import Journal
from eventstore.merkle import HASH_BYTES
from eventstore.recorders import LMDBApplicationRecorder
from eventstore.records import originator_key
from eventstore.segments import Segment, SegmentError
from replicator.log import periods
from replicator.log.periods import Ends, Period

if TYPE_CHECKING:
    from eventstore.environment import Transaction

FOLDER = "segments"
SUFFIX = ".segment"
#: Stands for a segment that `replctl log export --move` has moved.
MOVED = ".moved"


class SegmentAwayError(OperationalError):
    """A sealed segment that is needed is not where it belongs: refused until it is brought back."""

    exit_code = 3


class SegmentDamagedError(InternalError):
    """A sealed segment does not read as it was sealed."""


class Archive:
    """The sealed periods of the log in ``folder``."""

    def __init__(self, folder: Path, rows: Journal) -> None:
        self.folder = folder / FOLDER
        self._rows = rows

    def path(self, period: Period) -> Path:
        """Where a period's segment belongs, whether it is there or not."""
        return self.folder / (period.label + SUFFIX)

    @contextmanager
    def open(self, period: Period, *, whatever: bool = False) -> Iterator[Segment]:
        """A sealed period's segment; ``whatever`` it holds, for who finds that out. Raises SegmentAwayError,
        SegmentDamagedError, also for what is found inside.
        """
        path = self.path(period)
        if not path.exists():
            raise SegmentAwayError(
                f"events {period.first} to {period.last} are in {path.name}, which is not in {path.parent}:"
                " bring it back with replctl log import FILE"
            )
        try:
            with Segment.open(path) as segment:
                info = segment.info
                held = info.first, info.last, info.root
                if not whatever and held != (period.first, period.last, period.root):
                    raise SegmentError(
                        0, f"it holds events {info.first} to {info.last} of another log or period"
                    )
                yield segment
        except SegmentError as error:
            raise SegmentDamagedError(
                f"{path.name}, events {period.first} to {period.last}: {error}"
            ) from error

    def moved(self, period: Period) -> Path:
        """The mark of a segment that was moved away on purpose."""
        return self.folder / (period.label + MOVED)

    def changed(self) -> int:
        """Another number whenever a segment came or went."""
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def sealed(self) -> list[Period]:
        """The periods that are sealed, in order."""
        return [period for period in periods.load(self._rows) if period.segment is not None]

    def holding(self, first: int, last: int) -> Iterator[tuple[Period, int, int]]:
        """The sealed periods that hold some of these events, with the first and last that each holds."""
        for period in self.sealed():
            if period.first <= last and first <= period.last:
                yield period, max(first, period.first), min(last, period.last)

    def stream(self, period: Period, stream: UUID) -> list[StoredEvent]:
        """All events of one stream in a sealed period."""
        with self.open(period) as segment:
            return segment.stream(originator_key(stream))

    def notifications(self, first: int, last: int) -> Generator[Notification, None, None]:
        """Sealed events, in order."""
        for period, begin, end in self.holding(first, last):
            with self.open(period) as segment:
                yield from segment.notifications(begin, end)

    def leaf_hashes(self, first: int, last: int) -> list[bytes]:
        """The tree's leaves of sealed events ``first`` to ``last``, as far as they are sealed."""
        found: list[bytes] = []
        for period, begin, end in self.holding(first, last):
            kept = _kept(period, periods.load_ends(self._rows, period), begin, end)
            if kept is not None:
                found += kept
                continue
            with self.open(period) as segment:
                found += segment.leaf_hashes(begin, end - begin + 1)
        return found


def _kept(period: Period, ends: Ends, first: int, last: int) -> list[bytes] | None:
    """These leaves out of what is kept of the period's ends, if they are there."""
    for begin, leaves in (
        (period.first, ends.lead),
        (period.last + 1 - len(ends.tail) // HASH_BYTES, ends.tail),
        *ends.blocks.items(),
    ):
        cut = leaves[(first - begin) * HASH_BYTES : (last + 1 - begin) * HASH_BYTES]
        if first >= begin and len(cut) == (last + 1 - first) * HASH_BYTES:
            return [cut[at : at + HASH_BYTES] for at in range(0, len(cut), HASH_BYTES)]
    return None


class WholeRecorder(LMDBApplicationRecorder):
    """The log's recorder, which reads on in the segments where the live log does not begin with the first event."""

    def __init__(self, environment: LMDBEnvironment, name: str, archive: Archive) -> None:
        super().__init__(environment, name, tree=True)
        self._archive = archive
        self._first: tuple[int, int, int] | None = None

    def live_first(self) -> int:
        """The first event that the live log may hold."""
        return super().first_nid()

    def first_nid(self) -> int:
        """The first event that can be read from here on without a gap, sealed or live."""
        live = self.live_first()
        if live == 1:
            return 1
        changed = self._archive.changed()
        known = self._first
        if known is not None and known[:2] == (live, changed):
            return known[2]
        first = live
        for period in reversed(self._archive.sealed()):
            if period.last + 1 == first and self._archive.path(period).exists():
                first = period.first
        self._first = (live, changed, first)
        return first

    def _page(
        self, low: int, stop: int | None, limit: int, topics: Sequence[str]
    ) -> tuple[list[Notification], int]:
        """As the live log's, from the very first event on: whatever reads notifications reads pages. Raises SegmentAwayError
        too.
        """
        while True:
            first = self.live_first()
            if low < first and limit > 0:
                return self._sealed_page(
                    low, first - 1 if stop is None else min(first - 1, stop), limit, topics
                )
            found = super()._page(low, stop, limit, topics)
            if low >= self.live_first() or limit < 1:  # else rows have gone under this look
                return found

    def _sealed_page(
        self, low: int, last: int, limit: int, topics: Sequence[str]
    ) -> tuple[list[Notification], int]:
        found: list[Notification] = []
        seen = low - 1
        with closing(self._archive.notifications(low, last)) as notes:
            for note in notes:
                seen = note.id
                if not topics or note.topic in topics:
                    found.append(note)
                if len(found) == limit or seen - low >= SCAN_MAX:
                    break
        return found, seen

    def leaves(self, txn: Transaction) -> Callable[[int, int], Sequence[bytes]]:
        """For the tree: the leaves of any events, by index from 0, as of this transaction."""

        def leaves(index: int, count: int) -> Sequence[bytes]:
            floor = self._log().floor(txn)
            first, last = index + 1, index + count
            found: list[bytes] = []
            if first <= floor:
                found += self._archive.leaf_hashes(first, min(last, floor))
            if last > floor:
                begin = max(first, floor + 1)
                found += self.leaf_hashes(txn, begin, last - begin + 1)
            return found

        return leaves


__all__ = [
    "FOLDER",
    "SUFFIX",
    "Archive",
    "SegmentAwayError",
    "SegmentDamagedError",
    "WholeRecorder",
]
