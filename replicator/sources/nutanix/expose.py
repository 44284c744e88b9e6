# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes a snapshot's disk readable over iSCSI, and takes that down again: nutanix-data-path.md, A1.7 to A1.12.

One volume group for each disk: which disk a target is cannot be mistaken. Whatever is made stands in the ledger first; it is
undone in strict reverse order, also when cancelled.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

import msgspec
import trio

from replicator.errors import SourceError
from replicator.iscsi import (
    AmbiguousDiskError,
    Chap,
    IscsiError,
    IscsiSettings,
    LoginNotFoundError,
    Portal,
    discover,
)
from replicator.iscsi.reader import DiskReader, open_reader
from replicator.prism.errors import ImageNeededError, PrismError
from replicator.prism.types import DiskSnapshot, Kind, Secrets, VmSnapshot, VolumeGroup
from replicator.sources.nutanix.ledger import Entry
from replicator.sources.nutanix.names import ObjectName
from replicator.sources.nutanix.site import NutanixSite

_logger = logging.getLogger(__name__)

#: Seconds between looks for a target that was just attached.
_GAPS_S: Final = (0.5, 1.0, 2.0, 4.0)


class NoTargetError(IscsiError):
    """The portal answers, and the volume group's target does not appear there: is the portal that of the right cluster?"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A disk to be made readable. ``number``: its place in the VM, for names. ``push_id``: whom it is for."""

    snapshot: VmSnapshot
    disk: DiskSnapshot
    number: int
    push_id: str


class Making:
    """Objects that are made one after the other on a cluster, each in the ledger first, and how each is undone."""

    def __init__(self, site: NutanixSite, wanted: Wanted) -> None:
        self.site = site
        self.wanted = wanted
        self._undo: list[tuple[str, Callable[[], Awaitable[None]]]] = []

    async def intend(self, kind: Kind) -> Entry:
        """Write down that an object of this kind is about to be made; its name is taken from now on."""
        now = self.site.clock()
        name = await self.site.ledger.unused(
            self.wanted.snapshot.vm,
            ObjectName(
                self.site.ledger.installation, self.wanted.push_id, kind, now, self.wanted.number
            ),
        )
        entry = Entry(
            kind=kind,
            name=name,
            request_id=str(uuid4()),
            vm=self.wanted.snapshot.vm,
            cluster=self.wanted.snapshot.cluster,
            push_id=self.wanted.push_id,
            intended_at_us=now,
            capability=self.site.prism.capability,
        )
        self.site.in_use.add(entry.name)
        self._undo.append((f"free {entry.name}", lambda: self._free(entry.name)))
        await self.site.ledger.write(entry)
        return entry

    async def _free(self, name: str) -> None:
        self.site.in_use.discard(name)
        await trio.lowlevel.checkpoint()

    async def made(self, entry: Entry, uuid: str, delete: Callable[[], Awaitable[None]]) -> None:
        """It is made; ``delete`` undoes it, and then it leaves the ledger."""
        entry = msgspec.structs.replace(entry, uuid=uuid)

        async def undo() -> None:
            await delete()
            await self.site.ledger.settle(entry)

        self.on_undo(f"delete {entry.kind} {entry.name}", undo)
        await self.site.ledger.write(entry)

    def on_undo(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """One more step, which is the first to be undone."""
        self._undo.append((what, step))

    async def undo(self) -> None:
        """Undo all of it, the last step first. Never fails: what cannot be undone is told, and stays in the ledger.

        Not interrupted by a cancellation from outside; it ends after ``cleanup_s``.
        """
        with trio.move_on_after(self.site.settings.cleanup_s, shield=True) as scope:
            while self._undo:
                what, step = self._undo.pop()
                try:
                    await step()
                except (SourceError, OSError) as error:
                    _logger.warning("cannot %s: %s; the next sweep tries again", what, error)
        for what, _ in self._undo:
            if what.startswith("free "):
                self.site.in_use.discard(what.removeprefix("free "))
        if scope.cancelled_caught:
            _logger.warning(
                "taking down disk %s took more than %g s; the next sweep removes the rest",
                self.wanted.disk.disk,
                self.site.settings.cleanup_s,
            )


@asynccontextmanager
async def expose(site: NutanixSite, wanted: Wanted) -> AsyncGenerator[DiskReader, None]:
    """The disk, readable over iSCSI until the block is left.

    Raises PrismError, IscsiError, and SourceError where what the target serves is not the disk. Cancelled, it is taken down
    all the same.
    """
    making = Making(site, wanted)
    try:
        async with AsyncExitStack() as stack:
            try:
                reader = await _set_up(making, stack)
            except (PrismError, IscsiError):
                site.attach_failures += 1
                raise
            yield reader
    finally:
        await making.undo()


async def _set_up(making: Making, stack: AsyncExitStack) -> DiskReader:
    site, wanted = making.site, making.wanted
    portal = await site.portal(wanted.snapshot.cluster)
    image = await make_image(making) if site.prism.clones_by_image else None
    chap = site.chap
    entry = await making.intend(Kind.VOLUME_GROUP)
    try:
        group = await site.prism.create_volume_group(
            wanted.snapshot, wanted.disk, entry.name, chap, entry.request, image=image
        )
    except ImageNeededError:
        # Only the first try tells that this Prism clones no snapshot.
        image = await make_image(making)
        entry = msgspec.structs.replace(entry, request_id=str(uuid4()))
        await site.ledger.write(entry)
        group = await site.prism.create_volume_group(
            wanted.snapshot, wanted.disk, entry.name, chap, entry.request, image=image
        )
    await making.made(entry, group.uuid, lambda: site.prism.delete_volume_group(group.uuid))
    if group.disk_sizes.get(0) != wanted.disk.size:
        raise SourceError(
            f"volume group {group.name} holds a disk of {group.disk_sizes.get(0)} bytes, and disk {wanted.disk.disk} of the"
            f" snapshot has {wanted.disk.size}"
        )
    attachment = await site.prism.attach(group, site.settings.initiator, chap, uuid4())
    making.on_undo(
        f"detach {site.settings.initiator} from {group.name}",
        lambda: site.prism.detach(group.uuid, attachment),
    )
    reader = await _log_in(site, portal, group, chap, stack)
    if reader.size != wanted.disk.size:
        raise SourceError(
            f"{reader.disk.where} serves {reader.size} bytes, and disk {wanted.disk.disk} of the snapshot has {wanted.disk.size}"
        )
    return reader


async def make_image(making: Making) -> str:
    """An image of the snapshot's disk, for the time of this making; returns its id."""
    prism, wanted = making.site.prism, making.wanted
    entry = await making.intend(Kind.IMAGE)
    image = await prism.create_image(wanted.snapshot, wanted.disk, entry.name, entry.request)
    await making.made(entry, image, lambda: prism.delete_image(image))
    return image


async def _log_in(
    site: NutanixSite,
    portal: Portal,
    group: VolumeGroup,
    chap: Secrets | None,
    stack: AsyncExitStack,
) -> DiskReader:
    """Find the group's target and log in. A target that was just attached may take a while to appear everywhere."""
    settings = site.settings
    plain = IscsiSettings(settings.initiator, depth=settings.depth, read_size=settings.read_size)
    proving = plain
    if chap is not None:
        proof = Chap(settings.initiator, chap.target, target_secret=chap.client or "")
        proving = IscsiSettings(
            settings.initiator, proof, depth=settings.depth, read_size=settings.read_size
        )
    deadline = trio.current_time() + settings.discovery_s
    missing: IscsiError | None = None
    for gap_s in itertools.chain(_GAPS_S, itertools.repeat(_GAPS_S[-1])):
        offered = [target.name for target in await discover(portal, plain)]
        for target in targets_of(offered, group.target):
            try:
                # The portal that was asked, whatever address it gives: it may be reached by another one from here.
                return await stack.enter_async_context(open_reader(portal, target, None, proving))
            except (LoginNotFoundError, AmbiguousDiskError) as error:
                missing = error
        if trio.current_time() + gap_s > deadline:
            break
        await trio.sleep(gap_s)
    if missing is not None:
        raise missing
    raise NoTargetError(
        f"iSCSI portal {portal} shows {settings.initiator} no target of volume group {group.name}, {settings.discovery_s:g} s after"
        " it was attached"
    )


def targets_of(offered: Sequence[str], wanted: str) -> list[str]:
    """The targets of the volume group whose targets' names contain ``wanted``: not those of one whose name only begins so."""
    pattern = re.compile(rf"(?:^|[^a-z0-9]){re.escape(wanted.lower())}(?![a-z0-9])")
    return [name for name in offered if pattern.search(name.lower())]


__all__ = [
    "Making",
    "NoTargetError",
    "Wanted",
    "expose",
    "make_image",
    "targets_of",
]
