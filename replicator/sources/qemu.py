# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM in a running QEMU, or images in a ``qemu-storage-daemon``, as a source with change tracking.

A snapshot is, for each disk, a dirty bitmap that starts, the reference's bitmap that stops, and a
backup job that saves what the guest is about to overwrite into a scratch image; one QMP transaction
makes all of it at one instant. The scratch image, with the disk behind it, is exported over NBD and
reads as the disk was.

If scratch space ran out, QEMU 7 would fail the *guest's* write. So ``take`` wants free space, and
while a snapshot is read the free space is watched: the snapshot ends before the guest notices
(``scratch_free_min``).
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid5

import trio

from replicator import durable
from replicator.errors import SnapshotGoneError, SourceError
from replicator.nbd.client import NbdClient
from replicator.nbd.protocol import BASE_ALLOCATION, DIRTY_BITMAP
from replicator.sources import snapshot_names as names
from replicator.sources.base import HeldSnapshot, SnapshotName, SourceDisk, VmIdentity
from replicator.sources.qemu_inventory import (
    Inventory,
    find_disks,
    read_name,
    read_uuid,
    take_inventory,
)
from replicator.sources.qemu_plan import instant, plan_record, reference_bitmaps, useless_bitmaps
from replicator.sources.qemu_removal import Removal, answers
from replicator.sources.qemu_view import QemuDiskView, QemuSnapshot
from replicator.sources.qmp import (
    QmpClient,
    QmpError,
    QmpGoneError,
    check_socket_path,
    open_qmp,
)
from replicator.sources.snapshot_names import SnapshotRecord

_UUID_NAMESPACE = UUID("5f1c1bb1-5d9e-5a43-9a39-1f6d4f0e3b52")
SCRATCH_FREE_MIN = 2 << 30
READ_DEPTH = 16
_GUARD_INTERVAL_S = 1.0
_UNKNOWN_SERVER = (
    "QEMU runs an NBD server already: name its socket with qemu_nbd_socket or, if a push that was "
    "killed left it, stop it with nbd-server-stop over QMP"
)


class QemuSource:
    """The VM behind one QMP socket. Implements ``Source``.

    ``working_dir`` belongs to this VM alone: it takes the scratch images (as large as what the
    guest overwrites while a snapshot lives), small records, and QEMU's NBD socket; QEMU must be
    able to write there. ``nbd_socket`` names an NBD server that the QEMU process runs already (it
    can have only one). ``grain`` is the bitmaps' unit in bytes. ``scratch_free_min``: below so many
    free bytes no snapshot is taken, and one that is being read ends. ``family``: what the ids of its pushes begin with
    (snapshot_names); objects of another family are left alone.

    A method that fails or is cancelled leaves what ``abandon`` removes.
    """

    def __init__(
        self,
        qmp_socket: Path,
        working_dir: Path,
        *,
        name: str | None,
        nbd_socket: Path | None = None,
        grain: int,
        scratch_free_min: int = SCRATCH_FREE_MIN,
        family: str = "",
    ) -> None:
        self._qmp_socket = qmp_socket
        self._dir = working_dir
        self._name = name
        self._grain = grain
        self._scratch_free_min = scratch_free_min
        self._family = family
        # The same for every process that serves this VM: what an earlier one started is found
        # again.
        key = names.socket_key(qmp_socket)
        self._own_socket = working_dir / f"qemu-{key}.sock" if nbd_socket is None else None
        self._nbd_socket = nbd_socket or working_dir / f"qemu-{key}.sock"
        check_socket_path(qmp_socket, "QMP socket")
        check_socket_path(self._nbd_socket, "NBD socket")

    async def identify(self) -> VmIdentity:
        """UUID and name from QEMU; without a UUID there, one made from the name. Raises
        SourceError.
        """
        async with open_qmp(self._qmp_socket) as qmp:
            uuid = await read_uuid(qmp)
            name = self._name or await read_name(qmp)
        if name is None and uuid is None:
            raise SourceError("QEMU was given neither a name nor a UUID: set the VM's name")
        if uuid is None:
            uuid = uuid5(_UUID_NAMESPACE, str(name))
        return VmIdentity(uuid, name or str(uuid))

    async def take(self, name: SnapshotName) -> QemuSnapshot:
        """See ``Source``. Also raises SourceError while a snapshot of another push is there."""
        names.check_push_id(name.push_id)
        await trio.to_thread.run_sync(durable.make_dir, self._dir)
        await self._check_space(SourceError)
        async with open_qmp(self._qmp_socket) as qmp:
            inventory = await self._clear_way(qmp, name)
            disks = await find_disks(qmp, inventory)
            earlier = await self._load_lenient(name.reference) if name.reference else None
            record = plan_record(name, disks, earlier)
            if useless := useless_bitmaps(record, disks):
                await qmp.execute("transaction", actions=useless)
            await trio.to_thread.run_sync(record.save, self._dir)
            for index, disk in enumerate(record.disks):
                path = names.scratch_path(self._dir, name.push_id, index)
                await _create_scratch(path, disk.size)
                await qmp.execute(
                    "blockdev-add",
                    driver="qcow2",
                    node_name=names.node_name(name.push_id, index),
                    file={"driver": "file", "filename": str(path)},
                    backing=disk.node,
                )
            record = record.taken(time.time_ns() // 1000)
            await trio.to_thread.run_sync(record.save, self._dir)
            # As late as can be: until its first export nothing in QEMU tells that it is ours.
            await self._start_server(qmp)
            await qmp.execute("transaction", actions=instant(record, disks, self._grain))
            for index, disk in enumerate(record.disks):
                await qmp.execute(
                    "block-export-add",
                    type="nbd",
                    id=self._export_id(name.push_id, index),
                    name=names.object_id(name.push_id, index),
                    node_name=names.node_name(name.push_id, index),
                    bitmaps=reference_bitmaps(record, disk),
                )
        return await self._open(record)

    async def reopen(self, name: SnapshotName) -> QemuSnapshot:
        """See ``Source``."""
        record = await trio.to_thread.run_sync(SnapshotRecord.load, self._dir, name.push_id)
        if record is None or not record.taken_at_us:
            raise SnapshotGoneError(f"no snapshot of push {name.push_id}")
        await self._check(record)
        return await self._open(record)

    async def confirm(self, name: SnapshotName) -> None:
        """See ``Source``."""
        async with self._removal() as removal:
            await removal.end_snapshot(name.push_id)
            await removal.remove_files(name.push_id, record=False)
            if name.reference is not None and name.reference != name.push_id:
                await removal.drop_bitmaps(name.reference)
                await removal.remove_files(name.reference, record=True)

    async def abandon(self, name: SnapshotName) -> None:
        """See ``Source``."""
        async with self._removal() as removal:
            await _abandon(removal, name)

    async def held(self) -> list[HeldSnapshot]:
        """See ``Source``. The reference is a bitmap and takes no room; scratch images do."""
        made_us = await trio.to_thread.run_sync(names.held_files, self._dir)
        async with open_qmp(self._qmp_socket) as qmp:
            pushes = self._own(_alive(await take_inventory(qmp))) | made_us.keys()
        held = []
        for push_id in pushes:
            record = await self._load_lenient(push_id)
            taken_at_us = record.taken_at_us if record is not None else 0
            held.append(HeldSnapshot(push_id, taken_at_us or made_us.get(push_id, 0)))
        return sorted(held, key=lambda each: each.taken_at_us)

    async def sweep(self, keep: SnapshotName | None, reference: str | None) -> list[str]:
        """See ``Source``."""
        kept = {reference}
        frozen: str | None = None
        if keep is not None:
            kept |= {keep.push_id, keep.reference}
            frozen = keep.reference
        live = keep.push_id if keep is not None else None
        prefix = names.node_prefix(live) if live is not None else None
        async with self._removal() as removal:
            strays = await self._known_pushes(removal.qmp) - {push for push in kept if push}
            # Snapshots first: their exports hold bitmaps. Of the reference, too, nothing but the
            # bitmap stays.
            await removal.end_snapshots(
                lambda push: push != live and names.family_of(push) == self._family,
                lambda node: (
                    names.family_of_node(node) == self._family
                    and (prefix is None or not node.startswith(prefix))
                ),
            )
            for push_id in sorted(strays):
                record = await self._load_lenient(push_id)
                older = record.reference if record is not None else None
                # The reference of the snapshot that stays must not begin to record again.
                await removal.restore_reference(push_id, older if older != frozen else None)
                await removal.remove_files(push_id, record=True)
            if reference is not None and reference != live:
                await removal.remove_files(reference, record=False)
        return removal.removed

    async def _known_pushes(self, qmp: QmpClient) -> set[str]:
        inventory = await take_inventory(qmp)
        found: set[str | None] = set(_alive(inventory))
        for node in inventory.nodes.values():
            found |= {names.push_of_bitmap(bitmap) for bitmap in node.bitmaps}
        files = await trio.to_thread.run_sync(names.our_files, self._dir)
        found |= {names.push_of_file(name) for name in files}
        return self._own(push for push in found if push is not None)

    def _own(self, pushes: Iterable[str]) -> set[str]:
        """Those of this source's family."""
        return {push for push in pushes if names.family_of(push) == self._family}

    async def _load_lenient(self, push_id: str) -> SnapshotRecord | None:
        """A stray's record; a damaged one says as little as none: the stray goes either way."""
        try:
            return await trio.to_thread.run_sync(SnapshotRecord.load, self._dir, push_id)
        except SourceError:
            return None

    async def _clear_way(self, qmp: QmpClient, name: SnapshotName) -> Inventory:
        """Remove what an earlier attempt of the same push left; refuse if another push's snapshot
        is alive.
        """
        inventory = await take_inventory(qmp)
        alive = _alive(inventory)
        pushes = self._own(alive)
        if alive != pushes:
            raise SourceError(
                "another snapshot of this VM is read now, by replctl or by a Bacula job, and QEMU has one at a time:"
                " try again when that has ended; what a process left that died is removed by its next run"
            )
        others = pushes - {name.push_id}
        nodes = [n for n in inventory.our_nodes if names.family_of_node(n) == self._family]
        strange = [n for n in nodes if not n.startswith(names.node_prefix(name.push_id))]
        if others or strange:
            what = ", ".join(sorted(f"push {push}" for push in others)) or "an earlier push"
            raise SourceError(f"the snapshot of {what} is still there: abandon it or sweep")
        bitmap = names.bitmap_name(name.push_id)
        begun = any(bitmap in node.bitmaps for node in inventory.nodes.values())
        if begun or pushes or nodes:
            await _abandon(Removal(qmp, self._dir, self._own_socket), name)
            inventory = await take_inventory(qmp)
        return inventory

    async def _start_server(self, qmp: QmpClient) -> None:
        if self._own_socket is None:
            return
        address = {"type": "unix", "data": {"path": str(self._own_socket)}}
        try:
            await qmp.execute("nbd-server-start", addr=address)
        except QmpError as error:
            if "already running" not in str(error):
                raise
            if not await answers(self._own_socket):
                raise SourceError(_UNKNOWN_SERVER) from error

    def _export_id(self, push_id: str, index: int) -> str:
        return names.export_id(push_id, index, own_server=self._own_socket is not None)

    async def _open(self, record: SnapshotRecord) -> QemuSnapshot:
        """Connect to each disk's export."""
        guard = _Guard(lambda: self._guard(record))
        clients: list[NbdClient] = []
        disks: list[SourceDisk] = []
        try:
            for index, disk in enumerate(record.disks):
                bitmaps = reference_bitmaps(record, disk)
                contexts = [BASE_ALLOCATION, *(DIRTY_BITMAP + bitmap for bitmap in bitmaps)]
                export = names.object_id(record.push_id, index)
                client = await NbdClient.connect(
                    self._nbd_socket, export, contexts=contexts, depth=READ_DEPTH
                )
                clients.append(client)
                if client.size != disk.size or BASE_ALLOCATION not in client.contexts:
                    raise SourceError(f"disk {disk.identity} is exported with another size")
                view = QemuDiskView(
                    client,
                    reference=record.reference,
                    bitmap=bitmaps[0] if bitmaps else None,
                    known_size=disk.reference_size,
                    lost=disk.lost,
                    guard=guard.run,
                )
                disks.append(SourceDisk(disk.identity, view))
        except BaseException:
            for client in clients:
                await client.aclose()
            raise
        lost = "; ".join(disk.lost for disk in record.disks if disk.lost)
        return QemuSnapshot(
            taken_at_us=record.taken_at_us,
            disks=disks,
            lost_tracking=lost or None,
            clients=clients,
            check=lambda: self._check(record),
        )

    async def _check(self, record: SnapshotRecord) -> None:
        """Raise SnapshotGoneError unless every job and export of the snapshot is alive and has
        room.
        """
        await self._guard(record)
        try:
            async with open_qmp(self._qmp_socket) as qmp:
                inventory = await take_inventory(qmp)
        except QmpGoneError as error:
            raise SnapshotGoneError(f"the snapshot ended with QEMU: {error}") from error
        for index, disk in enumerate(record.disks):
            name = names.object_id(record.push_id, index)
            if inventory.jobs.get(name) not in ("running", "paused", "standby", "ready"):
                raise SnapshotGoneError(f"QEMU has ended the snapshot of disk {disk.identity}")
            if self._export_id(record.push_id, index) not in inventory.exports:
                raise SnapshotGoneError(f"the snapshot of disk {disk.identity} is not exported")

    async def _guard(self, record: SnapshotRecord) -> None:
        """End the snapshot if scratch space runs out: going on would fail writes of the guest."""
        try:
            await self._check_space(SnapshotGoneError)
        except SnapshotGoneError:
            async with self._removal() as removal:
                await removal.end_snapshot(record.push_id)
                await removal.remove_files(record.push_id, record=False)
            raise

    async def _check_space(self, error: type[SourceError]) -> None:
        status = await trio.to_thread.run_sync(os.statvfs, self._dir)
        free = status.f_bavail * status.f_frsize
        if free < self._scratch_free_min:
            need = f"{free} bytes free, {self._scratch_free_min} are needed"
            raise error(f"no room for what the guest overwrites in {self._dir}: {need}")

    @asynccontextmanager
    async def _removal(self) -> AsyncIterator[Removal]:
        async with open_qmp(self._qmp_socket) as qmp:
            yield Removal(qmp, self._dir, self._own_socket)


class _Guard:
    """Runs a check before a read, but not more often than once in _GUARD_INTERVAL_S."""

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check
        self._next = trio.current_time() + _GUARD_INTERVAL_S
        self._gone: str | None = None

    async def run(self) -> None:
        if self._gone is not None:
            raise SnapshotGoneError(self._gone)
        now = trio.current_time()
        if now < self._next:
            return
        self._next = now + _GUARD_INTERVAL_S
        try:
            await self._check()
        except SnapshotGoneError as error:
            self._gone = str(error)
            raise


def _alive(inventory: Inventory) -> set[str]:
    """The pushes that have a job or an export."""
    found = {names.push_of_object(name) for name in (*inventory.jobs, *inventory.exports)}
    return {push for push in found if push is not None}


async def _abandon(removal: Removal, name: SnapshotName) -> None:
    await removal.end_snapshot(name.push_id)
    await removal.restore_reference(name.push_id, name.reference)
    await removal.remove_files(name.push_id, record=True)


async def _create_scratch(path: Path, size: int) -> None:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)]
    durable.observe("create", str(path))
    try:
        done = await trio.run_process(
            command, check=False, capture_stdout=True, capture_stderr=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        text = "qemu-img is missing: install the package qemu-utils"
        raise SourceError(text) from None
    if done.returncode:
        why = " ".join(done.stderr.decode(errors="replace").split())[:300]
        raise SourceError(f"cannot make scratch image {path}: {why}")
