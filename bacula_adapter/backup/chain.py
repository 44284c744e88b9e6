# SPDX-License-Identifier: AGPL-3.0-or-later
"""A chain: the backups of one VM by one Bacula job, and how a job's part of it comes to count, or comes to nothing.

The order of durable steps: journal entry, snapshot, files to Bacula, its verdict, our event, the source's new reference, the
maps of parts that nobody goes on from any more gone, journal entry gone. Each can be repeated. A backend that dies before the
event leaves the reference where it was: the next job finds the entry, and removes what it stands for.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
import trio
from eventsourcing.persistence import PersistenceError

from bacula_adapter.backup.maps import ChainMaps
from replicator.config import Config
from replicator.domain.backup import BackupPart, Backups
from replicator.domain.vm import ProtectedVm
from replicator.errors import ReplicatorError, StateError
from replicator.log import EventLog
from replicator.sources.base import SnapshotName, Source

_logger = logging.getLogger(__name__)

#: The journal's key of the job that is not settled.
_KEY: Final = "backup"
_REASON_MAX: Final = 1000
ROLE: Final = "backup"
#: What the source and the log may fail of.
FAILURES: Final = (ReplicatorError, PersistenceError, OSError)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A job's part that is not settled: ``part`` is its id, ``push_id`` names its snapshot, ``reference`` that of the last part."""

    push_id: str
    reference: str | None
    part: str
    number: int
    job: str
    job_id: int
    level: str
    started_us: int

    @property
    def snapshot(self) -> SnapshotName:
        """The snapshot's name at the source."""
        return SnapshotName(self.push_id, self.reference)


@dataclass(frozen=True, slots=True)
class Chain:
    """An open chain. The caller holds its folder alone, and keeps log and source open."""

    log: EventLog
    source: Source
    maps: ChainMaps
    uuid: UUID
    name: str

    @property
    def _vm(self) -> ProtectedVm:
        vm = self.log.get(self.uuid)
        assert vm is not None
        return vm

    @property
    def known(self) -> Backups:
        """What its events add up to."""
        return self._vm.backups

    async def open(self, *, clean_up: bool) -> None:
        """Settle what an earlier job left, and remove what nobody needs. Raises SourceError, OSError.

        ``clean_up`` False leaves on the platform what no entry stands for.
        """
        await self.log.register(self.uuid, self.name, ROLE)
        entry = await load(self.log)
        last = self.known.last
        if entry is not None and last is not None and last.push_id == entry.push_id:
            await self._finish(entry)
        elif entry is not None:
            _logger.warning(
                "%s: job %s ended without a verdict, or was not tidied up: what it made goes, what it sent does not count",
                self.name,
                entry.job,
            )
            await self.abandon(entry, "it ended without Bacula's verdict")
        if clean_up:
            reference = last.push_id if last is not None else None
            for left in await self.source.sweep(None, reference):
                _logger.warning("removed %s, left by an earlier job", left)
        await trio.to_thread.run_sync(self.maps.keep, self._kept())

    def _kept(self) -> set[str]:
        return {part.part for part in (self.known.last, self.known.full) if part is not None}

    async def begin(self, entry: Entry) -> None:
        """Write down that a job begins. Nothing of it is there before."""
        await self.log.journal_put(_KEY, msgspec.to_builtins(entry))
        await trio.to_thread.run_sync(self.maps.begin, entry.part)

    async def commit(self, entry: Entry, part: BackupPart) -> None:
        """Bacula has it all: the part counts from here on. Raises what keeps the event from being durable: then it does not.

        What follows from the event is done now or, where that fails, which is logged, by the next job.
        """
        await trio.to_thread.run_sync(self.maps.made_durable, entry.part)
        async with self.log.change(self.uuid) as vm:
            vm.commit_backup(part)
        try:
            await self._finish(entry)
        except FAILURES as error:
            _logger.warning(
                "%s: part %d counts, but the older reference could not be let go of; the next job does that: %s",
                self.name,
                part.number,
                error,
            )

    async def _finish(self, entry: Entry) -> None:
        """What follows from our event; can be repeated."""
        await self.source.confirm(entry.snapshot)
        await trio.to_thread.run_sync(self.maps.keep, self._kept())
        await self.log.journal_delete(_KEY)

    async def abandon(self, entry: Entry, reason: str) -> None:
        """The job came to nothing: our event, then what it made goes; the reference stays. Raises SourceError: the next job, or
        `replctl owned`, goes on with that.
        """
        failure = self.known.failure
        if failure is None or (failure.job, failure.job_id) != (entry.job, entry.job_id):
            async with self.log.change(self.uuid) as vm:
                vm.fail_backup(entry.job, entry.job_id, entry.level, reason[:_REASON_MAX])
        await self.forget(entry)

    async def forget(self, entry: Entry) -> None:
        """Remove what was made for an entry, and the entry; nothing is recorded of it. Can be repeated."""
        await self.source.abandon(entry.snapshot)
        await trio.to_thread.run_sync(self.maps.keep, self._kept())
        await self.log.journal_delete(_KEY)


async def load(log: EventLog) -> Entry | None:
    """The unsettled job of a chain. Raises StateError."""
    found: Any = await log.journal_get(_KEY)
    if found is None:
        return None
    try:
        return msgspec.convert(found, Entry)
    except msgspec.ValidationError as error:
        raise StateError(
            f"the log's journal holds an entry {_KEY!r} that is none: {error}"
        ) from None


def maps_of(config: Config) -> ChainMaps:
    """The maps of a chain whose own configuration this is."""
    return ChainMaps(Path(config.state_dir) / "maps")


__all__ = ["FAILURES", "ROLE", "Chain", "Entry", "load", "maps_of"]
