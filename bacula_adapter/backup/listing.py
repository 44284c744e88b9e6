# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a job would back up, without backing it up: its files and their sizes, the VMs and their disks, and what can be asked."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from bacula_adapter.backend.interface import FileEntry, JobInfo, Level, ListingHandler
from bacula_adapter.backup.base import Chosen, DiskPlan, Way, ask_tracking, choose_base, plan_disk
from bacula_adapter.backup.chain import FAILURES, Chain, Entry, maps_of
from bacula_adapter.backup.handler import hold_chain
from bacula_adapter.backup.machine import Machine, Machines
from bacula_adapter.backup.machines import open_machines
from bacula_adapter.names import ROOTS, VirtualName
from bacula_adapter.state import JOBS, folder_of
from replicator.config import Config
from replicator.disk import data_bytes
from replicator.domain.backup import Backups
from replicator.errors import UsageError
from replicator.log import chains, open_log
from replicator.push.differing import Differing
from replicator.push.naming import disk_names
from replicator.sources.base import Snapshot

_logger = logging.getLogger(__name__)

#: How long the snapshot's removal may take once everything else was cancelled. Seconds.
_REMOVE_S: Final = 60.0


@asynccontextmanager
async def open_listing(job: JobInfo, config: Config) -> AsyncIterator[ListingHandler]:
    """The estimate, the listing, or what is asked of the VMs that ``config`` chooses. See ``OpenListing``."""
    async with open_machines(config, job.job) as machines:
        yield _Listing(job, config, machines)


class _Listing:
    """Implements ``ListingHandler``."""

    def __init__(self, job: JobInfo, config: Config, machines: Machines) -> None:
        self._job = job
        self._config = config
        self._machines = machines

    async def estimate(self) -> AsyncIterator[FileEntry]:
        """See ``ListingHandler``: sizes are the data that would be carried. A snapshot is taken, asked, and removed again; no disk
        is read. Where only reading tells what differs, all data count.
        """
        chosen = await self._machines.select()
        _logger.info("Selected %d VM(s) for backup", len(chosen))
        for machine in chosen:
            for entry in await self._estimate(machine):
                yield entry

    async def listing(self, path: str) -> AsyncIterator[FileEntry]:
        """See ``ListingHandler``: ``/`` has a folder for each VM, a VM's folder its disks. Raises UsageError for another path."""
        now_s = int(time.time())
        wanted = [part for part in path.split("/") if part]
        if wanted and wanted[0] in ROOTS:
            del wanted[0]
        if len(wanted) > 1 and wanted[1:] != ["disks"]:
            raise UsageError(f"listing: there is nothing below {path}: name a VM, or / for all")
        machines = await self._machines.select()
        if not wanted:
            for machine in machines:
                yield FileEntry(name=f"{machine.root}/{machine.folder}/", size=0, mtime_s=now_s)
            return
        found = [m for m in machines if wanted[0] in (m.folder, m.name, str(m.uuid))]
        if not found:
            have = ", ".join(machine.folder for machine in machines)
            raise UsageError(f"listing: no VM {wanted[0]} is chosen (there are: {have})")
        for machine in found:
            for entry in await self._disks(machine, now_s):
                yield entry

    async def query(self, parameter: str) -> AsyncIterator[tuple[str, str]]:
        """See ``ListingHandler``: ``vm`` names the VMs chosen, others are the platform's."""
        if parameter == "vm":
            for machine in await self._machines.select():
                yield "vm", machine.folder
            return
        for key, value in await self._machines.query(parameter):
            yield key, value

    async def _disks(self, machine: Machine, now_s: int) -> list[FileEntry]:
        disks = await machine.disks()
        folder = folder_of(self._config, JOBS, self._job.job, str(machine.uuid))
        chain = await trio.to_thread.run_sync(chains.read_chain, folder)
        known = chain.backups if chain is not None else Backups()
        names = disk_names(known.disk_names, [identity for identity, _ in disks])
        return [
            FileEntry(
                name=str(VirtualName(machine.root, machine.folder, "raw", names[identity])),
                size=size,
                mtime_s=now_s,
            )
            for identity, size in disks
        ]

    async def _estimate(self, machine: Machine) -> list[FileEntry]:
        """The files of one VM."""
        async with (
            hold_chain(self._job, self._config, machine) as own,
            open_log(own.state_dir / "events") as log,
            machine.open_source(own, log) as source,
        ):
            chain = Chain(log, source, maps_of(own), machine.uuid, machine.folder)
            await chain.open(clean_up=own.job_cleanup_on_abort)
            entry = self._entry(machine, own, chain)
            await chain.begin(entry)
            try:
                snapshot = await source.take(entry.snapshot)
                try:
                    return await self._ask(machine, chain, snapshot, entry)
                finally:
                    with trio.move_on_after(_REMOVE_S, shield=True):
                        await snapshot.aclose()
            finally:
                await _forget(chain, entry)

    def _entry(self, machine: Machine, own: Config, chain: Chain) -> Entry:
        last = chain.known.last
        return Entry(
            push_id=machine.push_id(own),
            reference=last.push_id if last is not None else None,
            part=secrets.token_hex(4),
            number=chain.known.next_number,
            job=self._job.name,
            job_id=self._job.job_id,
            level=self._job.level,
            started_us=time.time_ns() // 1000,
        )

    async def _ask(
        self, machine: Machine, chain: Chain, snapshot: Snapshot, entry: Entry
    ) -> list[FileEntry]:
        known, mtime_s = chain.known, snapshot.taken_at_us // 1_000_000
        last = known.last
        # The console does not say which job an estimate would go on from.
        guess = "" if last is None else last.job
        if self._job.level is Level.DIFFERENTIAL and known.full is not None:
            guess = known.full.job
        base = choose_base(self._job.level, self._job.previous or guess, known)
        names = disk_names(known.disk_names, [disk.identity for disk in snapshot.disks])
        chosen = Chosen(base=base.part, last=last, loss=machine.loss, misfit=chain.maps.misfit)
        found = []
        for disk in snapshot.disks:
            plan = await trio.to_thread.run_sync(
                plan_disk, chosen, names[disk.identity], disk.identity, disk.view
            )
            plan = await ask_tracking(plan, snapshot, entry.reference, machine.loss)
            size = await _carried(plan, chain, known, entry.reference)
            name = VirtualName(
                machine.root,
                machine.folder,
                "raw" if plan.way is Way.FULL else "delta",
                plan.disk,
                entry.number,
                entry.part,
            )
            found.append(FileEntry(name=str(name), size=size, mtime_s=mtime_s))
        return found


async def _carried(plan: DiskPlan, chain: Chain, known: Backups, reference: str | None) -> int:
    """Bytes of data that a disk's file would hold, before whole grains and heads of records."""
    if plan.way is not Way.CHANGES:
        return await data_bytes(plan.view, None)
    found = await data_bytes(plan.view, reference)
    if plan.between is not None:
        assert known.full is not None
        assert known.last is not None
        older = chain.maps.path(known.full.part, plan.disk)
        newer = chain.maps.path(known.last.part, plan.disk)
        found += await trio.to_thread.run_sync(_differing, older, newer)
    return min(found, plan.view.size)


def _differing(old: Path, new: Path) -> int:
    with Differing(old, new) as found:
        return sum(extent.length for extent in found.extents() if not extent.zero)


async def _forget(chain: Chain, entry: Entry) -> None:
    """Remove the snapshot, whatever became of the estimate; where that fails, the next job does it."""
    why = f"not within {_REMOVE_S:.0f} s"
    with trio.move_on_after(_REMOVE_S, shield=True):
        try:
            await chain.forget(entry)
        except FAILURES as error:
            why = str(error)
        else:
            return
    _logger.warning("%s: the snapshot is left for the next job to remove: %s", chain.name, why)


__all__ = ["open_listing"]
