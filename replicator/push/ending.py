# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a push ends at its source: committed and settled, or given up. Every step can be repeated after a crash."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from uuid import UUID

import trio

from replicator.domain.model import Point
from replicator.errors import DamageError, PhcbtError, StateError, WireError
from replicator.imagemap import vm_root
from replicator.log import EventLog
from replicator.push import journal
from replicator.push.connection import Connection
from replicator.push.files import PushFiles
from replicator.push.journal import PushEntry
from replicator.push.transfer import since_us
from replicator.sources.base import Source
from replicator.wire import messages as m

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of one VM's pushes."""

    log: EventLog
    source: Source
    files: PushFiles
    vm: UUID
    name: str

    async def commit(self, entry: PushEntry, answer: m.Committed, sampled: int = 0) -> Point:
        """Record what the receiver has committed, and settle it. Raises WireError if it is not what was pushed."""
        disks = await trio.to_thread.run_sync(self.files.final_disks, entry)
        root = vm_root([(disk.disk, disk.size, disk.root) for disk in disks])
        if answer.push_id != entry.push_id or answer.point != entry.point or answer.root != root:
            raise WireError(
                f"the receiver committed something else than point {entry.point} of ours"
            )
        point = Point(
            number=entry.point,
            parent=entry.parent,
            push_id=entry.push_id,
            kind=entry.kind,
            epoch=entry.epoch,
            taken_at_us=entry.taken_at_us,
            committed_at_us=answer.committed_at_us,
            duration_us=since_us(entry.started_us),
            bytes_pushed=answer.bytes_pushed,
            root=root,
            disks=tuple(disks),
            sampled=sampled,
            compared=entry.is_compared,
        )
        async with self.log.change(self.vm) as vm:
            vm.commit(point)
        await self.settle(entry, point)
        _logger.info(
            "DR cycle complete: vm=%s cycle=%d bytes_pushed=%d",
            self.name,
            point.number,
            point.bytes_pushed,
        )
        return point

    async def settle(self, entry: PushEntry, point: Point) -> None:
        """What follows from our event; can be repeated."""
        await self.source.confirm(entry.snapshot)
        try:
            await trio.to_thread.run_sync(self.files.advance_maps, entry, point)
        except (DamageError, StateError) as error:
            # Without its map the next push cannot be a cycle; the plan will see that.
            _logger.error("%s: %s", self.name, error)
        await journal.settle(self.log, str(self.vm))
        await trio.to_thread.run_sync(self.files.end, entry)

    async def still_known(self, entry: PushEntry) -> bool:
        """Whether this side can say what a committed push brought; if not, it is given up."""
        try:
            await trio.to_thread.run_sync(self.files.final_disks, entry)
        except (OSError, PhcbtError, DamageError, StateError) as error:
            reason = f"the receiver has it, but this side lost what it sent: {error}"
            await self.abandon(entry, reason, None)
            return False
        return True

    async def abandon(
        self,
        entry: PushEntry,
        reason: str,
        connection: Connection | None,
        *,
        raised: bool = False,
    ) -> None:
        """Give a push up: told to the receiver if it can be, then our event, then what the source made.

        ``raised``: the reason is an error that goes on to the caller, who tells it once.
        """
        if raised:
            _logger.info("the push to point %d is given up", entry.point)
        else:
            _logger.warning("the push to point %d is given up: %s", entry.point, reason)
        if connection is not None:
            abandon = m.Abandon(str(self.vm), entry.push_id, reason[:1000])
            state = await connection.ask(abandon, m.VmState)
            if state.newest is not None and state.newest.push_id == entry.push_id:
                return  # it was committed before it could be forgotten: the next plan goes on from there
        if entry.disks is not None:
            async with self.log.change(self.vm) as vm:
                vm.abandon_push(entry.push_id, entry.point, reason)
        await self.source.abandon(entry.snapshot)
        await journal.settle(self.log, str(self.vm))
        await trio.to_thread.run_sync(self.files.end, entry)


__all__ = ["Ending"]
