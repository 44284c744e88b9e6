# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM on a Nutanix cluster as a source with change tracking.

A snapshot is a recovery point (v3: a VM snapshot); the reference is the one of the last committed point, and stays on the
cluster until the next is confirmed. Disks are read from volume groups that are cloned from the snapshot, or over REST. Whatever
is made stands in the ledger before it is made: every step can be repeated by another process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final
from uuid import UUID, uuid4

import msgspec
import trio

from replicator.errors import SnapshotGoneError, SourceError
from replicator.prism.errors import (
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
    PrismTaskError,
)
from replicator.prism.types import Consistency, Kind, Vm, VmSnapshot
from replicator.sources.base import HeldSnapshot, SnapshotName, VmIdentity
from replicator.sources.nutanix import plan
from replicator.sources.nutanix.ledger import Entry
from replicator.sources.nutanix.names import ObjectName
from replicator.sources.nutanix.removal import Remover
from replicator.sources.nutanix.site import NutanixSite
from replicator.sources.nutanix.snapshot import NutanixSnapshot, open_snapshot
from replicator.sources.nutanix.sweep import judge

_logger = logging.getLogger(__name__)

#: An application-consistent snapshot can fail for what is in the guest.
_NOT_QUIESCED: Final = (PrismTaskError, PrismRefusedError)


class NutanixSource:
    """One VM: ``vm`` is its UUID. ``name``: as Prism lists it, so that it need not be asked for. Implements ``Source``.

    A method that fails or is cancelled leaves what ``abandon``, ``sweep`` and the next ``take`` remove: it is in the ledger.
    """

    def __init__(self, site: NutanixSite, vm: str, name: str | None = None) -> None:
        self._site = site
        self._vm = vm
        self._name = name
        self._remover = Remover(site.prism, site.ledger)
        self._opening = trio.Semaphore(site.settings.concurrent_disks)
        self._open: dict[str, list[NutanixSnapshot]] = {}
        self._told: set[str] = set()

    async def identify(self) -> VmIdentity:
        """Prism's UUID and name. Raises PrismError."""
        if self._name is None:
            self._name = (await self._site.prism.vm(self._vm)).name
        await trio.lowlevel.checkpoint()
        return VmIdentity(UUID(self._vm), self._name)

    async def take(self, name: SnapshotName) -> NutanixSnapshot:
        """See ``Source``. Raises SourceError while the VM migrates, or where application_consistent = true cannot be had.

        What changed is asked for at once. ``lost_tracking`` is set where that is unknown for every disk; a disk of which it is
        unknown says so itself (ReferenceLostError).
        """
        ObjectName(self._site.ledger.installation, name.push_id, Kind.SNAPSHOT, 0)
        await self._clear({name.reference}, "left by an earlier attempt")
        vm = await self._site.prism.vm(self._vm)
        self._name = vm.name
        wanted = plan.disks_of(vm)
        if (left_out := plan.left_out(vm)) is not None:
            self._tell(left_out)
        consistency, why = plan.choose_consistency(self._site.settings.application_consistent, vm)
        if why is not None:
            self._tell(f"{why}: the snapshot is crash-consistent")
        entry = await self._snap(vm, name, consistency)
        plan.check_disks(wanted, entry.as_snapshot())
        return await self._go_on(entry, name)

    async def reopen(self, name: SnapshotName) -> NutanixSnapshot:
        """See ``Source``."""
        entry = await self._entry(name.push_id)
        if entry is None or entry.uuid is None or entry.dropped:
            raise SnapshotGoneError(f"no snapshot of push {name.push_id}")
        if entry.reference:
            raise SnapshotGoneError(
                f"push {name.push_id} is committed: its snapshot is the reference"
            )
        why = plan.out_of_reach(entry, self._site.prism.capability)
        if why is not None:
            raise SnapshotGoneError(f"the snapshot of push {name.push_id} cannot be read: {why}")
        await self._end(name.push_id)
        vm = await self._site.prism.vm(self._vm)
        try:
            await self._site.prism.snapshot(entry.uuid, vm)
        except PrismNotFoundError as error:
            raise SnapshotGoneError(
                f"the snapshot of push {name.push_id} is gone: {error}"
            ) from None
        return await self._go_on(entry, name)

    async def confirm(self, name: SnapshotName) -> None:
        """See ``Source``. The snapshot is the reference before anything is removed."""
        await self._end(name.push_id)
        entry = await self._entry(name.push_id)
        if entry is not None and not entry.reference:
            await self._site.ledger.write(msgspec.structs.replace(entry, reference=True))
        await self._clear({name.push_id}, "not needed after the commit")

    async def abandon(self, name: SnapshotName) -> None:
        """See ``Source``."""
        await self._end(name.push_id)
        entries = [entry for entry in await self._entries() if entry.push_id == name.push_id]
        entries = [entry for entry in entries if not entry.reference]
        await self._remover.remove(entries, self._site.clock(), why="not needed any more")

    async def held(self) -> list[HeldSnapshot]:
        """See ``Source``. A reference is a snapshot, and takes room. From the ledger: nobody else makes any of ours."""
        return [
            HeldSnapshot(entry.push_id, entry.taken_at_us or entry.intended_at_us)
            for entry in await self._entries()
            if entry.kind is Kind.SNAPSHOT and not entry.dropped
        ]

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        """See ``Source``. The first one of a process also removes, on all clusters, what bears this installation's id and is in no
        ledger, if it is old enough.
        """
        kept = {reference}
        if keep is not None:
            kept |= {keep.push_id, keep.reference}
        for push_id in self._open.keys() - kept:
            await self._end(push_id)
        removed = await self._clear(kept, "no point and no push needs it")
        if not self._site.looked_around:
            removed += await self._look_around()
            self._site.looked_around = True
        return removed

    # Inside

    async def _entries(self) -> list[Entry]:
        return list(await self._site.ledger.entries(self._vm))

    async def _entry(self, push_id: str) -> Entry | None:
        """The snapshot of a push. Of several (one was made after all) the newest that has an id."""
        found = [
            entry
            for entry in await self._entries()
            if entry.kind is Kind.SNAPSHOT and entry.push_id == push_id and not entry.dropped
        ]
        known = [entry for entry in found if entry.uuid is not None]
        found = known or found
        return found[-1] if found else None

    async def _clear(self, kept: Iterable[str | None], why: str) -> list[str]:
        """Remove what the ledger has of this VM, other than these pushes' snapshots and what this process reads from now."""
        entries = [
            entry
            for entry in await self._entries()
            if (entry.kind is not Kind.SNAPSHOT or entry.push_id not in kept or entry.dropped)
            and entry.name not in self._site.in_use
        ]
        return await self._remover.remove(entries, self._site.clock(), why=why)

    async def _look_around(self) -> list[str]:
        found = await self._remover.find_ours()
        entries = await self._site.ledger.entries()
        # All that is in the ledger is some VM's matter; here only what is in none.
        live: dict[str, set[str]] = {}
        for entry in entries:
            live.setdefault(entry.vm, set()).add(entry.push_id)
        judged = judge(
            found,
            entries,
            self._site.ledger.installation,
            live,
            self._site.clock(),
            spoken=self._site.prism.capability,
        )
        strays = {each.uuid for each in judged if each.is_removed}
        return await self._remover.remove_strays(each for each in found if each.uuid in strays)

    async def _end(self, push_id: str) -> None:
        """Close what this process has open of a push."""
        for snapshot in self._open.pop(push_id, []):
            await snapshot.aclose()

    async def _snap(self, vm: Vm, name: SnapshotName, consistency: Consistency) -> Entry:
        """Make the snapshot; where the guest does not let itself be quiesced, one without."""
        settings = self._site.settings
        try:
            return await self._create(vm, name, consistency)
        except _NOT_QUIESCED as error:
            unknown = isinstance(error, PrismTaskError) and error.timed_out
            if consistency is Consistency.CRASH or unknown:
                raise
            if settings.application_consistent == "true":
                raise
            await self._clear({name.reference}, "its snapshot failed")
            _logger.warning(
                "%s: the application-consistent snapshot failed, taking a crash-consistent one: %s",
                vm.name,
                error,
            )
            return await self._create(vm, name, Consistency.CRASH)

    async def _create(self, vm: Vm, name: SnapshotName, consistency: Consistency) -> Entry:
        site = self._site
        now = site.clock()
        expires_at_us = plan.expiry_us(now, site.settings.interval_s, site.settings.outage_s)
        text = await site.ledger.unused(
            vm.uuid, ObjectName(site.ledger.installation, name.push_id, Kind.SNAPSHOT, now)
        )
        entry = Entry(
            kind=Kind.SNAPSHOT,
            name=text,
            request_id=str(uuid4()),
            vm=vm.uuid,
            cluster=vm.cluster,
            push_id=name.push_id,
            intended_at_us=now,
            capability=site.prism.capability,
            expires_at_us=expires_at_us,
            consistency=consistency,
        )
        await site.ledger.write(entry)
        snapshot = await site.prism.create_snapshot(
            vm, entry.name, consistency, expires_at_us, entry.request
        )
        entry = self._described(entry, vm, snapshot)
        with trio.CancelScope(shield=True):  # it is there: not to know its id costs a search
            await site.ledger.write(entry)
        if consistency is Consistency.APPLICATION and snapshot.consistency is not consistency:
            if site.settings.application_consistent == "true":
                raise SourceError(
                    f"{vm.name}: Prism made a crash-consistent snapshot, and application_consistent is true"
                )
            self._tell(f"{vm.name}: Prism made the snapshot crash-consistent only")
        return entry

    def _described(self, entry: Entry, vm: Vm, snapshot: VmSnapshot) -> Entry:
        return msgspec.structs.replace(
            entry,
            uuid=snapshot.uuid,
            cluster=snapshot.cluster,
            taken_at_us=snapshot.taken_at_us,
            consistency=snapshot.consistency,
            disks=plan.in_order(vm, snapshot.disks),
        )

    async def _go_on(self, entry: Entry, name: SnapshotName) -> NutanixSnapshot:
        site = self._site
        reference = await self._entry(name.reference) if name.reference is not None else None
        if reference is not None and reference.uuid is not None:
            await self._keep_alive(reference)
        snapshot, sized = await open_snapshot(site, entry, name.reference, reference, self._opening)
        if sized != entry:
            await site.ledger.write(sized)
        self._open.setdefault(name.push_id, []).append(snapshot)
        return snapshot

    async def _keep_alive(self, reference: Entry) -> None:
        """Have a reference that would expire soon live on: cycles have not come through for long."""
        site, now = self._site, self._site.clock()
        if reference.is_out_of_reach(site.prism.capability):
            return
        if not plan.is_expiring(reference, now, site.settings.interval_s):
            return
        until = plan.expiry_us(now, site.settings.interval_s, site.settings.outage_s)
        try:
            await site.prism.extend_snapshot(reference.as_snapshot(), until)
        except (PrismNotFoundError, PrismPermissionError, PrismRefusedError) as error:
            _logger.warning(
                "the reference %s cannot be made to live longer: %s", reference.name, error
            )
            return
        await site.ledger.write(msgspec.structs.replace(reference, expires_at_us=until))

    def _tell(self, text: str) -> None:
        """A warning, once for as long as this object lives: a cycle may come every few minutes."""
        _logger.log(logging.INFO if text in self._told else logging.WARNING, "%s", text)
        self._told.add(text)


__all__ = ["NutanixSource"]
