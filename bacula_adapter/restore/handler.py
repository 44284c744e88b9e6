# SPDX-License-Identifier: AGPL-3.0-or-later
"""A restore: from the files that Bacula hands over to images at their target, kept only when Bacula says that the job is good."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import UUID

import trio

from bacula_adapter.backend.interface import TERMINATED_OK, Answer, JobInfo, RestoredFile
from bacula_adapter.description import OBJECT, Description, decode_object
from bacula_adapter.names import VirtualName, find_name
from bacula_adapter.restore import convert
from bacula_adapter.restore.assembly import Assembly
from bacula_adapter.restore.cross import check_cross
from bacula_adapter.restore.directory import DirectoryTarget, open_directory_target
from bacula_adapter.restore.leftovers import Leftovers
from bacula_adapter.restore.options import apply_options
from bacula_adapter.restore.plan import wanted_disks
from bacula_adapter.restore.slots import open_slot
from bacula_adapter.restore.target import RestoredVm
from bacula_adapter.state import JobState
from replicator import durable
from replicator.config import Config
from replicator.errors import DamageError, RefusedError, ReplicatorError
from replicator.nursery import flat_nursery

if TYPE_CHECKING:
    from bacula_adapter.restore.platform import PlatformTarget

_logger = logging.getLogger(__name__)

_OBJECT_KIND: Final = 25
_OPTIONS_KIND: Final = 28
_REASON_MAX: Final = 500
#: How long the log may take to write down how a restore ended.
_RECORD_S: Final = 30.0


class Restore:
    """Implements ``RestoreHandler``. Made by ``open_restore``."""

    def __init__(
        self,
        job: JobInfo,
        config: Config,
        state: JobState,
        leftovers: Leftovers,
        nursery: trio.Nursery,
    ) -> None:
        self._job = job
        self._config = config
        self._state = state
        self._leftovers = leftovers
        self._nursery = nursery
        self._scratch = state.config.work_path / "scratch"
        self._assembly: Assembly | None = None
        self._parts: list[Description] = []
        self._target: DirectoryTarget | PlatformTarget | None = None
        self._released = trio.Event()
        self._closed = trio.Event()
        self._bases: dict[tuple[str, str], Path] = {}
        self._announced: set[tuple[str, str]] = set()
        self._vms: list[RestoredVm] | None = None
        self._keeping = False
        self._kept = False
        self._undone = False
        #: Why it came to nothing, once that is known.
        self.reason = ""

    @property
    def _bare(self) -> bool:
        """Whether Bacula puts nothing before names."""
        return self._job.where in ("", "/")

    @property
    def _to_platform(self) -> bool:
        return self._bare and not self._config.where

    async def restore_object(self, name: str, kind: int, job_id: int, data: bytes) -> None:
        """See ``RestoreHandler``."""
        if kind == _OPTIONS_KIND:
            self._config = apply_options(self._config, data)
            _logger.debug("options of this restore are taken from object %s", name)
        elif kind != _OBJECT_KIND or not name.startswith(OBJECT):
            raise DamageError(
                f"the catalogue has an object {name[:80]!r} of kind {kind}, which no version of this program known here has made"
            )
        else:
            part = decode_object(data)
            if name != f"{OBJECT}{part.uuid}":
                raise DamageError(f"the catalogue's object {name[:80]!r} describes VM {part.uuid}")
            if self._assembly is not None:
                raise DamageError(f"the catalogue's object {name} came after a file")
            self._parts.append(part)
            _logger.debug("part %s of VM %s is in job %d", part.part, part.vm, job_id)
        await trio.lowlevel.checkpoint()

    async def create(self, file: RestoredFile) -> Answer:
        """See ``RestoreHandler``."""
        assembly = await self._begun()
        name, base = self._located(file.name)
        self._bases.setdefault((name.root, name.vm), base)
        return await assembly.create(name, file)

    async def data(self, offset: int | None, data: bytes) -> None:
        """See ``RestoreHandler``."""
        assert self._assembly is not None
        await self._assembly.data(offset, data)

    async def close(self, *, whole: bool) -> None:
        """See ``RestoreHandler``."""
        assert self._assembly is not None
        await self._assembly.close(whole=whole)

    async def finish(self) -> None:
        """See ``RestoreHandler``."""
        if self._assembly is None:
            self._vms = []
            _logger.info("no file of this plugin string was selected: nothing is restored")
            return
        vms = await self._assembly.finish()
        if self._to_platform:
            vms = [vm for vm in vms if vm.disks]
        if not vms:
            raise RefusedError(
                "no disk of any VM was selected, or none in its newest part: mark the VM's whole folder; where=/path restores"
                " descriptions alone"
            )
        target = await self._opened()
        for vm in vms:
            assert vm.description is not None
            if not isinstance(target, DirectoryTarget):
                check_cross(vm.description, self._config)  # without the catalogue only now
            else:
                root = vm.description.root_name
                base = self._bases.get((root, vm.name)) or next(iter(self._bases.values()))
                target.expect(root, vm.name, base, vm.description.taken_at_us // 1_000_000)
        await target.finish(vms)
        self._vms = vms

    async def conclude(self, status: str) -> None:
        """See ``RestoreHandler``."""
        if status == TERMINATED_OK:
            if self._vms is None:
                raise ReplicatorError(
                    "Bacula calls the job good, but it did not come to its end: nothing of it is kept"
                )
            if self._target is not None:
                self._keeping = True
                await self._target.keep()
                self._keeping = False
            self._kept = True
            await self._record()
            await self.undo()
            return
        self.reason = self.reason or f"Bacula ended the job with status {status}"
        await self.undo()

    async def undo(self) -> None:
        """Let go of everything; what was not kept is removed, and the failure recorded. Not cancelled, done once."""
        if self._undone:
            return
        self._undone = True
        with trio.CancelScope(shield=True):
            if self._assembly is not None:
                await self._assembly.aclose()
            self._released.set()
            if self._target is not None:
                await self._closed.wait()
            if not self._kept:
                await self._record()
            if (
                not self._keeping
            ):  # else the journal says what is whole, and the next restore gives it its name
                await self._leftovers.settle()

    # The target

    async def _begun(self) -> Assembly:
        """The assembly; made when the first file comes, because then all objects and options have."""
        if self._assembly is None:
            await trio.to_thread.run_sync(durable.make_dir, self._scratch)
            wanted = wanted_disks(self._config.restore_disks_only)
            self._assembly = Assembly(self._nursery, self._scratch, wanted, self._place)
            self._assembly.learn(self._parts)
            if self._parts:
                self._tell_parts(self._assembly)
        return self._assembly

    def _tell_parts(self, assembly: Assembly) -> None:
        for part in assembly.plan.vms:
            steps = max((len(plan.steps) for plan in assembly.plan.of(part)), default=0)
            _logger.info(
                "VM %s as of job %s: %d disks, from up to %d parts",
                part.vm,
                part.job,
                len(part.disks),
                steps,
            )

    async def _opened(self) -> DirectoryTarget | PlatformTarget:
        """The target, opened in a task of its own: its context outlives the call that needs it first."""
        if self._target is None:
            self._target = await self._nursery.start(self._hold)
        assert self._target is not None
        return self._target

    async def _hold(self, task_status: trio.TaskStatus[DirectoryTarget | PlatformTarget]) -> None:
        try:
            async with AsyncExitStack() as stack:
                if self._to_platform:
                    from bacula_adapter.restore.platform import (  # noqa: PLC0415 - loads the client of Prism
                        open_platform_target,
                    )

                    config = self._config
                    if config.target_format != "raw":
                        raise RefusedError(
                            "target_format: belongs to a restore with where=/path; Nutanix takes raw images"
                        )
                    task_status.started(
                        await stack.enter_async_context(
                            open_platform_target(config, self._job, self._state.log)
                        )
                    )
                else:
                    task_status.started(
                        await stack.enter_async_context(
                            open_directory_target(
                                self._config.target_format, self._job.replace, self._leftovers
                            )
                        )
                    )
                await self._released.wait()
        finally:
            self._closed.set()

    async def _place(self, root: str, vm: str, disk: str, time_s: int, count: int) -> Path:
        """See ``assembly.Place``."""
        target = await self._opened()
        assert self._assembly is not None
        part = next((p for p in self._assembly.plan.vms if (p.root_name, p.vm) == (root, vm)), None)
        if isinstance(target, DirectoryTarget):
            base = self._bases.get((root, vm)) or next(iter(self._bases.values()))
            target.expect(root, vm, base, time_s)
            known = part.disk(disk) if part is not None else None
            if known is not None and self._config.target_format != "raw":
                convert.check_size(self._config.target_format, known.size)
        elif part is not None and (root, vm) not in self._announced:
            self._announced.add((root, vm))
            check_cross(part, self._config)
            await target.check([part])
        path = await trio.to_thread.run_sync(target.image_path, root, vm, disk)
        if count:
            path = path.with_name(f"{path.name}.{count}")
        if isinstance(target, DirectoryTarget):
            target.note(path)
            await self._leftovers.note(path, target.vm_folder(root, vm))
        return path

    def _located(self, text: str) -> tuple[VirtualName, Path]:
        """The virtual file that a name means, and the folder that it is to go below. Raises RefusedError."""
        found = find_name(text)
        if found is None:
            hint = (
                "; a regular expression may only change what stands before its first component"
                if self._job.where is None
                else ""
            )
            raise RefusedError(f"{text[:200]} is no name of a file of this plugin{hint}")
        before, name = found
        where = self._job.where
        if self._bare:
            if before.strip("/"):
                raise RefusedError(f"{text[:200]} has a prefix, though the job has no where")
            return name, Path(self._config.where or "/")
        if not before.startswith("/"):
            raise RefusedError(f"{text[:200]}: expected an absolute path")
        if where is not None and os.path.normpath(before) != os.path.normpath(where):
            raise RefusedError(f"{text[:200]} is not below where={where}")
        return name, Path(os.path.normpath(before))

    # The log

    async def _record(self) -> None:
        """Write down how it ended, for each VM. A log that cannot be written to fails no restore that stays."""
        vms = self._vms or []
        parts = [vm.description for vm in vms if vm.description is not None]
        if not parts and self._assembly is not None:
            parts = self._assembly.under_way()
        sizes = {vm.name: sum(disk.size for disk in vm.disks) for vm in vms}
        where = "the platform"
        if not self._to_platform:
            where = (self._config.where if self._bare else self._job.where) or "files"
        try:
            with trio.fail_after(_RECORD_S):
                for part in parts:
                    await self._record_one(part, where, sizes.get(part.vm, 0))
        except (OSError, ReplicatorError, trio.TooSlowError) as error:
            _logger.error("the end of this restore is not in the log: %s", error)

    async def _record_one(self, part: Description, where: str, size: int) -> None:
        log, job, uuid = self._state.log, self._job, UUID(part.uuid)
        await log.register(uuid, part.vm, "backup")
        async with log.change(uuid) as vm:
            if self._kept:
                vm.restore_done(job.name, job.job_id, where, size)
            else:
                vm.restore_failed(job.name, job.job_id, where, self.reason[:_REASON_MAX])
        if self._kept:
            _logger.info("Restore complete: VM=%s bytes=%d to %s", part.vm, size, where)


@asynccontextmanager
async def open_restore(job: JobInfo, config: Config) -> AsyncIterator[Restore]:
    """A restore of whatever Bacula hands over; see ``OpenRestore``. Raises RefusedError if too many are at work on this host."""
    async with open_slot(config) as state:
        leftovers = Leftovers(state.log)
        await leftovers.sweep(state.config.work_path / "scratch")
        own = state.config
        async with flat_nursery() as nursery:
            restore = Restore(job, own, state, leftovers, nursery)
            try:
                yield restore
            except Exception as error:
                restore.reason = restore.reason or str(error) or type(error).__name__
                raise
            finally:
                restore.reason = restore.reason or "the job was cancelled"
                await restore.undo()
                nursery.cancel_scope.cancel()


__all__ = ["Restore", "open_restore"]
