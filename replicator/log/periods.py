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

#: Events of a period before it is closed though its month goes on: about 300 MB of live log.
EVENTS_MAX = 1_000_000


class Period(msgspec.Struct, frozen=True, array_like=True):
    """One period. ``first`` and ``last`` are numbers of events in the log; ``last`` is 0 while it is open.

    ``segment`` is the file that it was sealed into; ``dropped``: its rows are gone from the live log. ``lead`` and ``tail``
    are the tree's leaves at its two ends where a block of the tree has events of its neighbours too: so that these can be
    proven while this segment is away.
    """

    number: int
    opened_at_us: int
    first: int
    last: int = 0
    segment: str | None = None
    dropped: bool = False
    lead: bytes = b""
    tail: bytes = b""

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


def _month(time_us: int) -> str:
    return datetime.fromtimestamp(time_us / 1_000_000, UTC).strftime("%Y-%m")


def load(journal: Journal) -> list[Period]:
    """All periods, in order; the last one is open. Blocks. Raises DamageError if they make no sense."""
    found: list[Period] = []
    for key, value in journal.items():
        try:
            period = msgspec.msgpack.decode(value, type=Period)
        except msgspec.MsgspecError as error:
            raise DamageError(f"the log's period {key}: {error}") from error
        expected = found[-1].last + 1 if found else 1
        if (
            key != _key(period.number)
            or period.number != len(found) + 1
            or period.first != expected
        ):
            raise DamageError(f"the log's periods do not follow each other at {key}")
        found.append(period)
    if any(not period.last for period in found[:-1]) or (found and found[-1].last):
        raise DamageError("the log's periods: not exactly the last one is open")
    return found


def store(journal: Journal, *periods: Period) -> Operation[None]:
    """The change that makes these rows durable."""
    return journal.prepare_change({_key(p.number): msgspec.msgpack.encode(p) for p in periods})


def _key(number: int) -> str:
    return f"{number:08d}"


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


__all__ = ["EVENTS_MAX", "Close", "Period", "load", "store"]
