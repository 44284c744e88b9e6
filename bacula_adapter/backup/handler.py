# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backup job: several VMs prepared and read ahead at once, their files written one VM after the other, one verdict for all."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import trio

from bacula_adapter.backend.interface import (
    TERMINATED_OK,
    BackupHandler,
    BackupOutput,
    JobInfo,
    Level,
)
from bacula_adapter.backup.chain import FAILURES
from bacula_adapter.backup.machine import Machine
from bacula_adapter.backup.machines import open_machines
from bacula_adapter.backup.reading import AHEAD_MAX, make_limiter
from bacula_adapter.backup.vm import VmBackup
from bacula_adapter.description import OBJECT, encode_object
from bacula_adapter.names import parse_name
from bacula_adapter.restore.options import OPTIONS_NAME, options_text
from bacula_adapter.state import JOBS, HeldError, hold_job_state
from replicator.config import Config
from replicator.domain.backup import PartName
from replicator.errors import RefusedError, ReplicatorError
from replicator.log import chains
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

#: How long undoing may take once everything else was cancelled. What is not done by then stands in the journal. Seconds.
_UNDO_S: Final = 90.0
#: The same for what follows from a job that ended well.
_SETTLE_S: Final = 300.0
#: Bacula's status of a job that ends without a verdict.
_FAILED: Final = "f"


@asynccontextmanager
async def open_backup(job: JobInfo, config: Config) -> AsyncIterator[BackupHandler]:
    """The backup of the VMs that ``config`` chooses. See ``OpenBackup``."""
    async with open_machines(config, job.job) as machines, AsyncExitStack() as held:
        chosen = await machines.select()
        _logger.info("Selected %d VM(s) for backup", len(chosen))
        cpus, ahead = make_limiter(), trio.Semaphore(AHEAD_MAX)
        vms = []
        for machine in chosen:
            own = await held.enter_async_context(hold_chain(job, config, machine))
            vms.append(VmBackup(job=job, own=own, machine=machine, cpus=cpus, ahead=ahead))
        before = await trio.to_thread.run_sync(_names_before, vms)
        handler = _Backup(job, config, vms, before)
        try:
            yield handler
        finally:
            with trio.move_on_after(_UNDO_S, shield=True):
                await handler.undo(_FAILED)


@asynccontextmanager
async def hold_chain(job: JobInfo, config: Config, machine: Machine) -> AsyncIterator[Config]:
    """Hold the folder of a VM's chain; yields its own configuration. Raises RefusedError while another process has it."""
    try:
        async with hold_job_state(config, JOBS, job.job, str(machine.uuid)) as own:
            yield own
    except HeldError as error:
        raise RefusedError(
            f"{machine.folder}: Bacula job {job.job} is backing it up already: {error}"
        ) from None


def _names_before(vms: Sequence[VmBackup]) -> list[str]:
    """The folders of the VMs' earlier parts, where a VM was called otherwise then. Blocks."""
    found: set[str] = set()
    for vm in vms:
        known = chains.read_chain(vm.own.state_dir)
        for part in (known.backups.last, known.backups.full) if known is not None else ():
            for disk in part.disks if part is not None else ():
                found.add(disk.image.rpartition("/disks/")[0] + "/")
    return sorted(found)


class _Backup:
    """Implements ``BackupHandler``."""

    def __init__(
        self, job: JobInfo, config: Config, vms: Sequence[VmBackup], before: Sequence[str]
    ) -> None:
        self._job = job
        self._config = config
        self._vms = vms
        self._before = before
        self._concluded = False

    @property
    def claims(self) -> Sequence[str]:
        """See ``BackupHandler``: the folders of these VMs alone. Nobody claims those of VMs that are not chosen any more."""
        now = [f"{vm.machine.root}/{vm.machine.folder}/" for vm in self._vms]
        return list(dict.fromkeys([*now, *self._before]))

    async def run(self, output: BackupOutput) -> None:
        """See ``BackupHandler``. The first VM that fails ends all of it."""
        if self._job.level is Level.FULL:
            # Once a chain: the console asks about the options of every job that a restore takes.
            await output.plugin_options(OPTIONS_NAME, options_text())
        turns = [trio.Event() for _ in range(len(self._vms) + 1)]
        turns[0].set()
        places = trio.Semaphore(self._config.concurrent_vms)

        async def one(number: int, vm: VmBackup) -> None:
            try:
                await vm.run(output, turns[number].wait, turns[number + 1].set)
            except FAILURES as error:
                raise _named(vm, error) from error
            places.release()

        async with flat_nursery() as nursery:
            for number, vm in enumerate(self._vms):
                await places.acquire()
                nursery.start_soon(one, number, vm)
        for vm in self._vms:
            assert vm.description is not None
            # After the last file: an earlier object takes signature and compression away from the files behind it.
            data = encode_object(vm.description)
            await output.restore_object(f"{OBJECT}{vm.machine.uuid}", data)

    async def exists(self, name: str) -> bool:
        """See ``BackupHandler``."""
        await trio.lowlevel.checkpoint()
        found = parse_name(name)
        if found is None:
            return False
        if found.kind == "raw":
            return any(name in vm.images for vm in self._vms)
        part = PartName(found.number, found.part_id)
        return any(part in vm.line for vm in self._vms)

    async def conclude(self, status: str) -> None:
        """See ``BackupHandler``. Every VM is concluded, whatever became of another; then the first failure is raised."""
        if status != TERMINATED_OK:
            await self.undo(status)
            return
        if any(vm.part is None for vm in self._vms):
            await self.undo(_FAILED)
            raise ReplicatorError(
                "Bacula calls the job good, but not every VM was backed up: nothing of it counts"
            )
        self._concluded = True
        failed: list[ReplicatorError] = []
        places = trio.Semaphore(self._config.concurrent_vms)

        async def one(vm: VmBackup) -> None:
            async with places:
                try:
                    await vm.conclude(status)
                except FAILURES as error:
                    failed.append(_named(vm, error))

        # Bacula has decided: no signal makes half a decision of it. What is not done in time, the next job does.
        with trio.move_on_after(_SETTLE_S, shield=True) as limit:
            async with flat_nursery() as nursery:
                for vm in self._vms:
                    nursery.start_soon(one, vm)
        if limit.cancelled_caught:
            raise ReplicatorError(
                f"what follows from the job was not done within {_SETTLE_S:.0f} s"
            )
        if failed:
            raise failed[0]

    async def undo(self, status: str) -> None:
        """Undo all, once. A failure is logged: what is left stands in the journal, and the next job removes it."""
        if self._concluded:
            return
        for vm in self._vms:
            try:
                await vm.conclude(status)
            except FAILURES as error:
                _logger.warning(
                    "%s: what this job made could not be removed; the next one does that: %s",
                    vm.name,
                    error,
                )
        self._concluded = True


def _named(vm: VmBackup, error: Exception) -> ReplicatorError:
    """An error that says of which VM it is."""
    if isinstance(error, ReplicatorError) and vm.name in str(error):
        return error
    what = str(error) or type(error).__name__
    return (
        RefusedError(f"{vm.name}: {what}")
        if isinstance(error, RefusedError)
        else ReplicatorError(f"{vm.name}: {what}")
    )


__all__ = ["hold_chain", "open_backup"]
