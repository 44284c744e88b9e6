# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images and VMs of restores on a cluster: each stands in the ledger before it is made, and leaves it when it is gone or kept.

A VM bears a name of ours until it is kept: whatever a process that died has left is found by that name, and removed by the
next one. Once the ledger says that a VM is kept it is its operator's, and nothing here removes it any more.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Final
from uuid import uuid4

import msgspec
import trio

from bacula_adapter.restore.platform_plan import PlannedDisk, PlannedVm, describe
from replicator.errors import ReplicatorError
from replicator.prism.api import RestorePrism
from replicator.prism.errors import (
    PrismAnswerError,
    PrismAuthError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismUnreachableError,
)
from replicator.prism.types import Found, Kind, NewDisk, NewVm, Vm
from replicator.sources.nutanix import names
from replicator.sources.nutanix.ledger import Entry, Ledger
from replicator.sources.nutanix.names import ObjectName
from replicator.sources.nutanix.plan import UNCERTAIN_AGE_US
from replicator.sources.nutanix.removal import made_as

_logger = logging.getLogger(__name__)

_WORDS: Final = {Kind.IMAGE: "image", Kind.VM: "VM"}
#: VMs first: they were made of the images.
_ORDER: Final = (Kind.VM, Kind.IMAGE)
#: How often an upload that broke is begun again, with a new image.
_UPLOADS_MAX: Final = 3
#: An Element may know a VM's disks a moment later than Prism Central.
_LOOKS_S: Final = (0.5, 1.0, 2.0, 4.0)


class RestoreObjects:
    """What one restore makes. ``job``: its name, for descriptions; ``clock``: microseconds since the epoch."""

    def __init__(
        self, prism: RestorePrism, ledger: Ledger, job: str, job_id: int, clock: Callable[[], int]
    ) -> None:
        self._prism = prism
        self._ledger = ledger
        self._job = job
        self._clock = clock
        #: In names on the cluster: this restore, and no other.
        self._push_id = f"r{job_id % 10**10}x{secrets.token_hex(3)}"
        self._lock = trio.Lock()

    # Making

    async def make_image(self, planned: PlannedVm, disk: PlannedDisk, number: int) -> Entry:
        """An image with a disk's bytes; one that broke on its way is removed and begun again. Raises PrismError."""
        image = disk.image
        for left in reversed(range(_UPLOADS_MAX)):
            entry = await self._begin(Kind.IMAGE, planned, number)
            _logger.info(
                "VM %s: uploading %s, %d bytes, as image %s",
                planned.name,
                image.disk,
                image.size,
                entry.name,
            )
            tag = f"{image.disk} of {planned.vm.name}, on its way to VM {planned.name}; made by replctl, to be deleted"
            uuid = await self._prism.create_empty_image(entry.name, planned.cluster.uuid, tag)
            entry = await self._made(entry, uuid)
            try:
                await self._prism.upload_image(uuid, image.path, image.size)
            except PrismUnreachableError as error:
                if not left:
                    raise
                _logger.warning("%s; the upload of %s begins again", error, image.disk)
                await self.remove(entry)
            else:
                return entry
        raise AssertionError

    async def make_vm(self, planned: PlannedVm, images: Sequence[Entry]) -> Entry:
        """The VM, off, with its disks from the images; looked at once it is there. Raises PrismError."""
        entry = await self._begin(Kind.VM, planned, None)
        disks = []
        for disk, image in zip(planned.disks, images, strict=True):
            assert image.uuid is not None
            disks.append(
                NewDisk(
                    image=image.uuid,
                    bus=disk.bus,
                    index=disk.index,
                    size=disk.image.size,
                    container=disk.container,
                )
            )
        new = NewVm(
            name=entry.name,
            description=describe(planned, entry.name, self._job),
            cluster=planned.cluster.uuid,
            hardware=planned.hardware,
            disks=tuple(disks),
        )
        uuid = await self._prism.create_vm(new, entry.request)
        entry = await self._made(entry, uuid)
        await self._check_vm(new, uuid)
        return entry

    async def _check_vm(self, new: NewVm, uuid: str) -> None:
        wanted = sorted((disk.bus, disk.index, disk.size) for disk in new.disks)
        try:
            vm = await self._described(uuid)
        except (PrismAuthError, PrismPermissionError, PrismUnreachableError) as error:
            # By v3 only its Element tells all of a VM's disks. Prism's task has ended well, and the images were checked.
            _logger.warning(
                "VM %s was made, but its disks could not be looked at: %s", new.name, error
            )
            return
        found = sorted((disk.bus, disk.index, disk.size) for disk in vm.disks)
        if found != wanted:
            raise PrismAnswerError(
                f"VM {new.name} was made with other disks than were asked for: {found} in place of {wanted}"
            )

    async def _described(self, uuid: str) -> Vm:
        for gap_s in _LOOKS_S:
            try:
                return await self._prism.vm(uuid)
            except (PrismAnswerError, PrismNotFoundError) as error:
                _logger.info("%s; looking again", error)
                await trio.sleep(gap_s)
        return await self._prism.vm(uuid)

    async def _begin(self, kind: Kind, planned: PlannedVm, number: int | None) -> Entry:
        async with self._lock:
            now_us = self._clock()
            second = now_us // 1_000_000 * 1_000_000
            name = ObjectName(self._ledger.installation, self._push_id, kind, second, number)
            entry = Entry(
                kind=kind,
                name=await self._unused(name),
                request_id=str(uuid4()),
                vm=planned.original,
                cluster=planned.cluster.uuid,
                push_id=self._push_id,
                intended_at_us=now_us,
                capability=self._prism.capability,
            )
            await self._ledger.write(entry)
            return entry

    async def _unused(self, name: ObjectName) -> str:
        """No other VM of this job has an object of that name either."""
        taken = {entry.name for entry in await self._ledger.entries()}
        while str(name) in taken:
            name = ObjectName(
                name.installation, name.push_id, name.kind, name.made_at_us + 1_000_000, name.disk
            )
        return str(name)

    async def _made(self, entry: Entry, uuid: str) -> Entry:
        entry = msgspec.structs.replace(entry, uuid=uuid)
        await self._ledger.write(entry)
        return entry

    # Keeping

    async def keep(self, entry: Entry, name: str) -> Entry:
        """From here on the VM is its operator's, whatever becomes of this process; durable on return."""
        entry = msgspec.structs.replace(entry, kept_as=name)
        await self._ledger.write(entry)
        return entry

    async def hand_over(self, entry: Entry, *, power_on: bool) -> None:
        """Give a VM that is kept its name, and let go of it. Raises PrismError; it is still kept then."""
        assert entry.kept_as is not None
        assert entry.uuid is not None
        await self._prism.rename_vm(entry.uuid, entry.kept_as)
        if power_on:
            await self._prism.power_on(entry.uuid)
        await self._ledger.settle(entry)

    # Removing

    async def remove(self, entry: Entry, found: Sequence[Found] | None = None) -> None:
        """Remove an object and strike it out. ``found``: what is there, asked for where it is not given and the entry has no id.

        What may still come stays in the ledger, as dropped. Raises PrismError.
        """
        if entry.uuid is not None:
            uuids = [entry.uuid]
        else:
            if found is None:
                found = await self.find_ours()
            uuids = made_as(entry, found)
        for uuid in uuids:
            if entry.kind is Kind.VM:
                await self._prism.delete_vm(uuid)
            else:
                await self._prism.delete_image(uuid)
            _logger.info("removed %s %s (%s)", _WORDS[entry.kind], entry.name, uuid)
        if not uuids and self._clock() - entry.intended_at_us < UNCERTAIN_AGE_US:
            if not entry.dropped:
                await self._ledger.write(msgspec.structs.replace(entry, dropped=True))
            return
        await self._ledger.settle(entry)

    async def find_ours(self) -> Sequence[Found]:
        """What is on the clusters by the name of this installation."""
        return await self._prism.find(names.prefix(self._ledger.installation))

    async def clear(self) -> None:
        """Remove all that no operator has, VMs first; finish what was kept and did not get its name.

        What cannot be removed is a warning, and stays in the ledger for the next time.
        """
        entries = [entry for entry in await self._ledger.entries() if entry.kind in _ORDER]
        found: Sequence[Found] | None = None
        if any(entry.uuid is None for entry in entries):
            found = await self.find_ours()
        for entry in sorted(entries, key=lambda each: _ORDER.index(each.kind)):
            try:
                if entry.kept_as is not None:
                    await self._finish_kept(entry)
                else:
                    await self.remove(entry, found)
            except PrismError as error:
                _logger.warning(
                    "%s %s stays on the cluster, and is looked at again by the next restore: %s",
                    _WORDS[entry.kind],
                    entry.name,
                    error,
                )

    async def _finish_kept(self, entry: Entry) -> None:
        assert entry.uuid is not None
        try:
            vm = await self._prism.vm(entry.uuid)
        except PrismNotFoundError:
            _logger.info("VM %s, which was restored, is gone", entry.kept_as)
        else:
            if vm.name == entry.name:
                await self.hand_over(entry, power_on=False)
                _logger.warning(
                    "VM %s of a restore that was interrupted at its end has its name now; it is powered %s",
                    entry.kept_as,
                    vm.power.lower(),
                )
                return
        await self._ledger.settle(entry)

    async def open_entries(self) -> Sequence[Entry]:
        """What the ledger holds of restores."""
        return [entry for entry in await self._ledger.entries() if entry.kind in _ORDER]


def first_of(errors: Sequence[ReplicatorError]) -> ReplicatorError:
    """The first error, with the others in its notes."""
    first, *others = errors
    for other in others:
        first.add_note(f"also: {other}")
    return first


__all__ = ["RestoreObjects", "first_of"]
