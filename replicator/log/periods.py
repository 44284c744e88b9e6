# SPDX-License-Identifier: AGPL-3.0-or-later
"""The books: the log is cut into periods, and one that is closed can be read, folded and moved away by itself.

A period begins with one opening event for each VM, all in one transaction, that carries the VM's balance. It ends with
the month, or when it holds ``EVENTS_MAX`` events, which bounds what the live environment holds.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from eventstore.environment import Operation
from eventstore.journal import Journal
from replicator.errors import DamageError

if TYPE_CHECKING:
    from eventstore.environment import Transaction

#: Events of a period before it is closed though its month goes on: about 60 MB of live log, which can be read in less than
#: two seconds where the projection of states is lost.
EVENTS_MAX = 200_000
_PERIOD = "period/"
_ENDS = "ends/"


class Period(msgspec.Struct, frozen=True, array_like=True):
    """One period. ``first`` and ``last`` are numbers of events in the log; ``last`` is 0 while it is open.

    ``segment`` is the file that it was sealed into, ``root`` the tree's after its last event then; ``dropped``: its rows are
    gone from the live log.
    """

    number: int
    opened_at_us: int
    first: int
    last: int = 0
    segment: str | None = None
    root: bytes = b""
    dropped: bool = False

    @property
    def label(self) -> str:
        """The month that it began in, and its number: unique, and sorted as the log is."""
        return f"{self.number:06d}-{_month(self.opened_at_us)}"

    def is_over(self, events: int, vms: int, now_us: int) -> bool:
        """Whether an open period of so many events should be closed. One that holds openings only stays."""
        if events <= vms:
            return False
        # A clock that goes back ends no month.
        return events >= max(EVENTS_MAX, 2 * vms) or _month(now_us) > _month(self.opened_at_us)


class Ends(msgspec.Struct, frozen=True, array_like=True):
    """The tree's leaves at the two ends of a sealed period, where a block of the tree has events of its neighbours too: so
    that these can be proven while the segment is away. And what proofs since a head need that was seen in its middle.
    """

    lead: bytes = b""
    tail: bytes = b""
    #: Whole blocks, by the first event that is kept of them: of heads that other sides have seen last.
    blocks: dict[int, bytes] = {}


def _month(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).strftime("%Y-%m")


def load(journal: Journal) -> list[Period]:
    """All periods, in order; the last one is open. Blocks. Raises DamageError if they make no sense."""
    found: list[Period] = []
    for key, value in journal.items(_PERIOD):
        try:
            period = msgspec.msgpack.decode(value, type=Period)
        except msgspec.MsgspecError as error:
            raise DamageError(f"the log's period {key}: {error}") from error
        expected = found[-1].last + 1 if found else 1
        if (
            key != _key(_PERIOD, period)
            or period.number != len(found) + 1
            or period.first != expected
        ):
            raise DamageError(f"the log's periods do not follow each other at {key}")
        found.append(period)
    if any(not period.last for period in found[:-1]) or (found and found[-1].last):
        raise DamageError("the log's periods: not exactly the last one is open")
    return found


def load_ends(journal: Journal, period: Period) -> Ends:
    """What is kept of a sealed period's ends. Blocks. Raises DamageError."""
    row = journal.get(_key(_ENDS, period))
    try:
        return Ends() if row is None else msgspec.msgpack.decode(row, type=Ends)
    except msgspec.MsgspecError as error:
        raise DamageError(f"the ends of the log's period {period.label}: {error}") from error


def store(journal: Journal, *periods: Period, ends: Ends | None = None) -> Operation[None]:
    """The change that makes these rows durable; ``ends`` are those of the first."""
    rows = {_key(_PERIOD, period): msgspec.msgpack.encode(period) for period in periods}
    if ends is not None:
        rows[_key(_ENDS, periods[0])] = msgspec.msgpack.encode(ends)
    return journal.prepare_change(rows)


def _key(kind: str, period: Period) -> str:
    return f"{kind}{period.number:08d}"


class Close:
    """Closes a period and opens the next with these opening events, in one transaction; gives both periods."""

    def __init__(
        self, journal: Journal, period: Period, openings: Operation[list[int]], now_us: int
    ) -> None:
        self._journal = journal
        self._period = period
        self._openings = openings
        self._now_us = now_us

    def check(self, txn: Transaction) -> None:
        """As the openings say."""
        self._openings.check(txn)

    def put(self, txn: Transaction) -> tuple[Period, Period]:
        """Write the openings, and both rows."""
        first = self._openings.put(txn)[0]
        closed = msgspec.structs.replace(self._period, last=first - 1)
        opened = Period(closed.number + 1, max(self._now_us, closed.opened_at_us), first)
        rows = store(self._journal, closed, opened)
        rows.check(txn)
        rows.put(txn)
        return closed, opened

    def committed(self) -> None:
        """It is durable."""
        self._openings.committed()


__all__ = ["EVENTS_MAX", "Close", "Ends", "Period", "load", "load_ends", "store"]
