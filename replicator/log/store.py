# SPDX-License-Identifier: AGPL-3.0-or-later
"""The log of one side as blocking code: what is in it, and how events and VMs come out of it again.

Reads only; whoever writes goes through ``EventLog``. Sealed periods are read from their segments as if they were here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from eventsourcing.persistence import Notification, StoredEvent

from eventstore.environment import LMDBEnvironment
from eventstore.journal import Journal
from eventstore.mapper import EventMapper
from eventstore.projector import fold
from eventstore.tree import Leaves, TreeLog
from eventstore.types import EventTypes
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError
from replicator.log.archive import Archive, WholeRecorder

if TYPE_CHECKING:
    from eventstore.environment import Transaction

T = TypeVar("T")

TYPES = EventTypes(ProtectedVm)
#: Notifications read in one transaction.
PAGE = 500


class LogStore:
    """An open log: its environment, recorder and mapper. ``open`` makes one; ``close`` ends it."""

    def __init__(self, folder: Path, environment: LMDBEnvironment) -> None:
        self.folder = folder
        self.environment = environment
        self.mapper = EventMapper(types=TYPES)
        #: What must be undone or taken up after a crash.
        self.journal = Journal(environment, "journal")
        #: The periods of the log (replicator.log.periods).
        self.periods = Journal(environment, "periods")
        #: What is known of the other sides' logs (replicator.log.peers).
        self.peers = Journal(environment, "peers")
        self.archive = Archive(folder, self.periods)
        #: Live and sealed events alike.
        self.recorder = WholeRecorder(environment, "replctl", self.archive)

    @classmethod
    def open(cls, folder: Path, *, readonly: bool) -> LogStore:
        """Raises the event store's errors (eventsourcing.persistence)."""
        environment = LMDBEnvironment.open(folder, readonly=readonly)
        try:
            return cls(folder, environment)
        except BaseException:
            environment.close()
            raise

    def close(self) -> None:
        """Nothing may be under way."""
        self.environment.close()

    @property
    def tree(self) -> TreeLog:
        """The Merkle tree over the log."""
        tree = self.recorder.tree
        assert tree is not None, "the recorder was made with one"
        return tree

    def root_at(self, size: int) -> bytes:
        """The tree's root when the log had so many events."""
        return self.read_tree(lambda tree, txn, leaves: tree.root_at(txn, size, leaves))

    def read_tree(self, function: Callable[[TreeLog, Transaction, Leaves], T]) -> T:
        """What ``function`` finds in the tree in one read transaction, with the leaves of any event, sealed or live."""
        # Databases must be opened before the transaction that uses them.
        tree = self.tree
        self.archive.sealed()
        return self.environment.read(lambda txn: function(tree, txn, self.recorder.leaves(txn)))

    def event(self, stored: StoredEvent | Notification) -> Any:
        """The event of a row. Raises the event store's errors for one that is no event of ours."""
        return self.mapper.to_domain_event(stored)

    def notifications(self, start: int, stop: int | None = None) -> Iterator[Notification]:
        """The rows of the log from ``start`` to ``stop``, page by page, oldest first."""
        while page := self.recorder.select_notifications(start, PAGE, stop):
            yield from page
            start = page[-1].id + 1

    def head(self) -> int:
        """The number of the last event, 0 if there is none."""
        return self.recorder.max_notification_id() or 0


def find_vm(vms: Iterable[ProtectedVm], name: str) -> ProtectedVm:
    """The VM of that name or UUID. Raises RefusedError that lists what there is."""
    known = sorted(vms, key=lambda vm: (vm.name, vm.vm))
    for vm in known:
        if name in (vm.name, vm.vm):
            return vm
    have = ", ".join(vm.name for vm in known) or "none"
    raise RefusedError(f"no VM {name!r} here (known: {have})")


def fold_stream(events: Iterable[Any]) -> ProtectedVm | None:
    """One VM from the events of its stream in one period."""
    vm: ProtectedVm | None = fold(None, events)
    return vm


class Fold:
    """All VMs from events in the order of the log, whichever stream each belongs to."""

    def __init__(self, vms: Iterable[ProtectedVm] = ()) -> None:
        self.vms: dict[UUID, ProtectedVm] = {UUID(vm.vm): vm for vm in vms}
        self._streams = {vm.id: vm for vm in self.vms.values()}

    def add(self, event: Any) -> ProtectedVm:
        """Take one more event in; returns its VM."""
        vm: ProtectedVm = event.mutate(self._streams.get(event.originator_id))
        if event.originator_id not in self._streams:
            known = self.vms.get(UUID(vm.vm))
            if known is not None:
                del self._streams[known.id]
            self._streams[vm.id] = self.vms[UUID(vm.vm)] = vm
        return vm


__all__ = ["TYPES", "Fold", "LogStore", "find_vm", "fold_stream"]
