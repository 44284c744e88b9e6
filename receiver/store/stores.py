# SPDX-License-Identifier: AGPL-3.0-or-later
"""All VMs of a receiver."""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path
from uuid import UUID

import trio
from eventsourcing.persistence import PersistenceError

from receiver.store.admission import PushRefusedHereError
from receiver.store.vm_store import Retention, VmStore
from replicator import durable
from replicator.config import Config
from replicator.domain.model import PushKind
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError, ReplicatorError
from replicator.log import EventLog
from replicator.wire.messages import Open

_logger = logging.getLogger(__name__)


class Stores:
    """The stores of all known VMs, each with its task in ``nursery``."""

    def __init__(self, config: Config, log: EventLog, nursery: trio.Nursery) -> None:
        self._config = config
        self._log = log
        self._nursery = nursery
        self._stores: dict[UUID, VmStore] = {}
        self._unusable: dict[UUID, str] = {}  # why a VM of the log has no store
        self._adding = trio.Lock()

    async def start(self) -> None:
        """Recover every VM that the log knows, and sweep folders of VMs that it does not."""
        root = self._config.state_dir / "vms"
        await trio.to_thread.run_sync(durable.make_dir, root)
        for vm in self._log.vms:
            try:
                await self._add(UUID(vm.vm))
            except (OSError, ReplicatorError, PersistenceError) as error:
                self._unusable[UUID(vm.vm)] = str(error)
                _logger.error("%s cannot be used, the others go on without it: %s", vm.name, error)
        known = {vm.vm for vm in self._log.vms}
        for folder in await trio.to_thread.run_sync(_folders, root):
            if folder.name not in known:
                _logger.warning("%s belongs to no VM of the log; it is left alone", folder)

    async def _add(self, vm: UUID) -> VmStore:
        retention = Retention(self._config.dr_restore_points, self._config.push_apply_remote)
        store = VmStore(self._config.state_dir, self._log, vm, retention)
        for path in await store.recover():
            _logger.warning("%s: removed %s, left by an earlier run", store.vm.name, path.name)
        self._stores[vm] = store
        store.wake()
        self._nursery.start_soon(store.run)
        return store

    @property
    def log(self) -> EventLog:
        """The log that they are in."""
        return self._log

    @property
    def all(self) -> list[VmStore]:
        """Every store, in the order of names."""
        return [self._stores[UUID(vm.vm)] for vm in self._log.vms if UUID(vm.vm) in self._stores]

    def get(self, vm: UUID) -> VmStore | None:
        """The store of a VM, if it is known."""
        return self._stores.get(vm)

    def find(self, name: str) -> VmStore:
        """The store of the VM of that name or UUID. Raises RefusedError."""
        vm = UUID(self._log.find(name).vm)
        if vm not in self._stores:
            raise RefusedError(
                f"VM {name} cannot be used: {self._unusable.get(vm, 'it has no folder')}"
            )
        return self._stores[vm]

    @property
    def unusable(self) -> list[tuple[ProtectedVm, str]]:
        """The VMs of the log whose folder cannot be used, and why."""
        return [
            (vm, self._unusable[UUID(vm.vm)])
            for vm in self._log.vms
            if UUID(vm.vm) in self._unusable
        ]

    def check_selected(self, vm: str, name: str) -> None:
        """Raise PushRefusedHereError for a VM that the configuration does not select."""
        if not _matches(self._config.vm, vm, name) or _matches(self._config.exclude, vm, name):
            raise PushRefusedHereError(
                "unknown-vm", f"VM {name} is not one that this receiver takes"
            )

    async def check_acceptable(self, vm: UUID, name: str) -> None:
        """Raise PushRefusedHereError for a VM that no push could be taken of.

        It is not selected, its name is another's, or what is kept of it cannot be used.
        """
        self.check_selected(str(vm), name)
        async with self._adding:
            if vm in self._unusable:
                await self._add_again(vm)
        if vm not in self._stores:
            self._check_name(vm, name)

    async def for_push(self, vm: UUID, opened: Open) -> VmStore:
        """The store that a push goes to; a seed makes it known. Raises PushRefusedHereError for an unknown VM."""
        self.check_selected(opened.vm, opened.name)
        async with self._adding:
            store = self._stores.get(vm)
            if store is not None:
                return store
            if vm in self._unusable:
                return await self._add_again(vm)
            self._check_name(vm, opened.name)
            _check_first(opened)
            if self._log.get(vm) is None:
                await trio.to_thread.run_sync(_set_aside, self._config.state_dir / "vms", vm)
            await self._log.register(vm, opened.name, "receiver")
            return await self._add(vm)

    async def _add_again(self, vm: UUID) -> VmStore:
        """A VM that could not be used at the start, perhaps now. Raises PushRefusedHereError if not."""
        try:
            store = await self._add(vm)
        except (OSError, ReplicatorError, PersistenceError) as error:
            self._unusable[vm] = str(error)
            _logger.error("VM %s cannot be used: %s", vm, error)
            raise PushRefusedHereError(
                "failed", "the receiver cannot use what it has of this VM"
            ) from error
        del self._unusable[vm]
        return store

    def _check_name(self, uuid: UUID, name: str) -> None:
        for vm in self._log.vms:
            # The VM itself may be in the log without a store, if making its folder failed last time.
            if vm.name == name and vm.vm != str(uuid):
                raise PushRefusedHereError(
                    "unknown-vm",
                    f"another VM ({vm.vm}) is called {name} here already: rename one of them on the platform, or leave this"
                    " one out (exclude)",
                )


def _check_first(opened: Open) -> None:
    """Raise PushRefusedHereError unless a VM can begin with this push; asked before the VM is made known."""
    if opened.kind is not PushKind.SEED:
        raise PushRefusedHereError("unknown-vm", f"VM {opened.name} has no seed here")
    if opened.parent or any(disk.since != opened.point for disk in opened.disks):
        raise PushRefusedHereError(
            "wrong-parent", f"VM {opened.name} has no point here that could be gone on from"
        )
    if len({disk.disk for disk in opened.disks}) != len(opened.disks):
        raise PushRefusedHereError("bad-request", "a disk stands twice in the push")


def _set_aside(root: Path, vm: UUID) -> None:
    """Give a folder that no log knows another name: its replica may be the last copy that somebody has."""
    folder = root / str(vm)
    if not folder.is_dir():
        return
    number = 1
    while (aside := root / f"{vm}.unknown-{number}").exists():
        number += 1
    _logger.warning("%s is not in the log; it is kept as %s", folder, aside.name)
    durable.rename(folder, aside)


def _matches(patterns: str, vm: str, name: str) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern) or pattern == vm
        for pattern in (part.strip() for part in patterns.split(","))
        if pattern
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())
