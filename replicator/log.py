# SPDX-License-Identifier: AGPL-3.0-or-later
"""The event log of one side, for trio: protected VMs are loaded, changed and saved here, one change at a time per VM.

The store is synchronous: every call goes to a worker thread, all writes through one lane. A change is durable when
``change`` returns, and nobody sees it before: what ``get`` and ``vms`` give is never changed in place, so that worker
threads may read it. If saving fails, the VM is read again from the log.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import msgspec
import trio
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate
from eventsourcing.persistence import Transcoder

from eventstore import Journal, LMDBEnvironment
from replicator.domain.model import stream_id
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError

T = TypeVar("T")


class MsgpackTranscoder(Transcoder):
    """Event fields as MessagePack: binary digests and times as they are."""

    def encode(self, obj: Any) -> bytes:
        """One event's fields."""
        return msgspec.msgpack.encode(obj)

    def decode(self, data: bytes) -> Any:
        """The fields back; arrays come as lists."""
        return msgspec.msgpack.decode(data)


def _fold(vm: ProtectedVm | None, events: Iterable[Any]) -> ProtectedVm | None:
    for event in events:
        vm = event.mutate(vm)
    return vm


class _VmApplication(Application[UUID]):
    name = "replctl"

    def construct_transcoder(self) -> Transcoder:
        return MsgpackTranscoder()


class EventLog:
    """The VMs of one side and their events, in ``folder``; see ``open_log``."""

    def __init__(self, application: _VmApplication, environment: LMDBEnvironment) -> None:
        self._application = application
        self._environment = environment
        self._writer = trio.CapacityLimiter(1)
        self._readers = trio.CapacityLimiter(4)
        self._vms: dict[UUID, ProtectedVm] = {}
        self._locks: dict[UUID, trio.Lock] = {}
        self._changed = trio.Event()
        self._journal = Journal(environment, "journal")

    def load(self) -> None:
        """Fold the whole log. Blocks; called once, before the log is used."""
        recorder = self._application.recorder
        start: int | None = None
        registered = str(ProtectedVm.Registered.TOPIC)
        while page := recorder.select_notifications(
            start, 500, topics=[registered], inclusive_of_start=False
        ):
            for note in page:
                vm = self._reload_stream(UUID(str(note.originator_id)))
                self._vms[UUID(vm.vm)] = vm
            start = page[-1].id

    @property
    def vms(self) -> list[ProtectedVm]:
        """All VMs, by name. Read only: changes go through ``change``."""
        return sorted(self._vms.values(), key=lambda vm: (vm.name, vm.vm))

    def get(self, vm: UUID) -> ProtectedVm | None:
        """The VM of that UUID, if this side knows it."""
        return self._vms.get(vm)

    def find(self, name: str) -> ProtectedVm:
        """The VM of that name or UUID. Raises RefusedError that lists what there is."""
        for vm in self.vms:
            if name in (vm.name, vm.vm):
                return vm
        have = ", ".join(vm.name for vm in self.vms) or "none"
        raise RefusedError(f"no VM {name!r} here (known: {have})")

    async def register(self, vm: UUID, name: str, role: str) -> ProtectedVm:
        """The VM of that UUID, recorded now if it is new."""
        async with self._lock(vm):
            known = self._vms.get(vm)
            if known is None:
                known = ProtectedVm.register(vm, name, role)
                await self._save(known)
                self._vms[vm] = known
            return known

    @asynccontextmanager
    async def change(self, vm: UUID) -> AsyncIterator[ProtectedVm]:
        """Hold the VM alone, as a copy; the events triggered inside are durable, and seen by others, when the block is left
        without an error.

        A cancellation inside drops them; while they are being saved it waits for the outcome.
        """
        async with self._lock(vm):
            working = self._vms[vm].working_copy()
            yield working
            if not working.pending_events:
                return
            try:
                await self._save(working)
            except BaseException:
                # The error does not say whether the events are in the log: the log does.
                with trio.CancelScope(shield=True):
                    self._vms[vm] = await self._read(self._reload, vm)
                raise
            self._vms[vm] = working
            changed, self._changed = self._changed, trio.Event()
            changed.set()

    async def wait_change(self) -> None:
        """Wait until the next change of any VM is durable."""
        await self._changed.wait()

    async def history(
        self, vm: UUID, *, after: int = 0, limit: int = 1000
    ) -> list[Aggregate.Event]:
        """Up to ``limit`` events of a VM with a number greater than ``after``, oldest first."""

        def select() -> list[Any]:
            return list(self._application.events.get(stream_id(vm), gt=after, limit=limit))

        return await self._read(select)

    async def page(
        self, vm: UUID, *, after: int | None, limit: int
    ) -> tuple[list[Aggregate.Event], bool]:
        """Up to ``limit`` events of a VM, oldest first, and whether others had to be left out.

        The newest ones (earlier ones are left out), or with ``after`` the first with a greater number (later ones are).
        """
        if after is not None:
            found = await self.history(vm, after=after, limit=limit + 1)
            return found[:limit], len(found) > limit

        def select() -> list[Any]:
            return list(self._application.events.get(stream_id(vm), desc=True, limit=limit + 1))

        newest = await self._read(select)
        return newest[:limit][::-1], len(newest) > limit

    async def journal_put(self, key: str, value: Any) -> None:
        """Write down what must be undone or taken up after a crash; durable on return."""
        await self._write(self._journal.put, key, msgspec.msgpack.encode(value))

    async def journal_get(self, key: str) -> Any:
        """The value under ``key``, or None."""
        found = await self._read(self._journal.get, key)
        return None if found is None else msgspec.msgpack.decode(found)

    async def journal_delete(self, key: str) -> None:
        """The entry is settled; durable on return."""
        await self._write(self._journal.delete, key)

    def _lock(self, vm: UUID) -> trio.Lock:
        return self._locks.setdefault(vm, trio.Lock())

    def _reload(self, vm: UUID) -> ProtectedVm:
        return self._reload_stream(stream_id(vm))

    def _reload_stream(self, stream: UUID) -> ProtectedVm:
        vm: ProtectedVm = self._application.repository.get(stream, projector_func=_fold)
        return vm

    async def _save(self, vm: ProtectedVm) -> None:
        if vm.pending_events:
            await self._write(self._application.save, vm)

    async def _write(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._writer)

    async def _read(self, function: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._readers)

    def close(self) -> None:
        """Close the environment. Nothing may be under way."""
        self._application.close()
        self._environment.close()


def _open(folder: Path, readonly: bool) -> EventLog:
    environment = LMDBEnvironment.open(folder, readonly=readonly)
    flag = "yes" if readonly else "no"
    application = _VmApplication(
        {"PERSISTENCE_MODULE": "eventstore", "LMDB_PATH": str(folder), "LMDB_READONLY": flag}
    )
    log = EventLog(application, environment)
    log.load()
    return log


@asynccontextmanager
async def open_log(folder: Path, *, readonly: bool = False) -> AsyncIterator[EventLog]:
    """The log in ``folder`` (made if it is not there, unless ``readonly``), closed at the end."""
    log = await trio.to_thread.run_sync(_open, folder, readonly)
    try:
        yield log
    finally:
        log.close()


__all__ = ["EventLog", "MsgpackTranscoder", "open_log"]
