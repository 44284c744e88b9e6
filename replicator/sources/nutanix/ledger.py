# SPDX-License-Identifier: AGPL-3.0-or-later
"""What we have made on clusters, or have begun to make: written down before it is made, struck out when it is gone.

It stands in the event log's journal, so that it is as durable as the events. An entry without an id says that the object may
or may not be there: whoever finds it looks for the object by its name. What is in memory only (the secrets of CHAP) dies with
the process; a later one makes a new object.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol
from uuid import UUID

import msgspec

from replicator.errors import StateError
from replicator.prism.types import Capability, Consistency, DiskSnapshot, Kind, VmSnapshot
from replicator.sources.nutanix import names

_logger = logging.getLogger(__name__)

#: The journal's key of this installation's id.
INSTALLATION: Final = "installation"
#: What the keys of objects begin with.
OBJECTS: Final = "prism/"


class JournalStore(Protocol):
    """A durable journal: a change is on disk when its call returns. An ``EventLog`` is one."""

    async def journal_put(self, key: str, value: Any) -> None:
        """Store an entry, in place of the one under ``key``."""
        ...

    async def journal_get(self, key: str) -> Any:
        """The entry under ``key``, or None."""
        ...

    async def journal_delete(self, key: str) -> None:
        """Remove it; fine where it is not there."""
        ...

    async def journal_items(self, prefix: str) -> Mapping[str, Any]:
        """All entries whose key begins so."""
        ...


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An object on a cluster. ``vm`` and ``cluster`` are Prism's ids; ``intended_at_us``: when this was written down.

    ``uuid``: None until Prism has said that it is made. ``reference``: it is the snapshot of the last committed point.
    ``dropped``: nobody wants it any more; it stands here because it was not found yet, or cannot be removed now.
    ``capability``: the interface that it was made through; None: written before that was noted, and taken for the one that is
    spoken. ``kept_as``: a restored VM is its operator's from here on, under this name. ``expires_at_us``: when a snapshot is gone
    by itself; 0: not known. The rest is what a snapshot needs to be opened again, and compared with.
    """

    kind: Kind
    name: str
    request_id: str
    vm: str
    cluster: str
    push_id: str
    intended_at_us: int
    uuid: str | None = None
    reference: bool = False
    dropped: bool = False
    capability: Capability | None = None
    kept_as: str | None = None
    expires_at_us: int = 0
    taken_at_us: int = 0
    consistency: Consistency = Consistency.CRASH
    disks: tuple[DiskSnapshot, ...] = ()

    @property
    def request(self) -> UUID:
        """The request id, for Prism."""
        return UUID(self.request_id)

    def is_out_of_reach(self, spoken: Capability) -> bool:
        """Whether the other interface made it, so that this one answers "not found" though it is there.

        Only snapshots are: volume groups and images are the same objects, with the same ids, in both.
        """
        return self.kind is Kind.SNAPSHOT and self.capability not in {None, spoken}

    def has_expired(self, now_us: int) -> bool:
        """Whether its cluster has removed it by itself."""
        return 0 < self.expires_at_us <= now_us

    def as_snapshot(self) -> VmSnapshot:
        """The snapshot that this entry describes, as Prism described it when it was made. Only where ``uuid`` is there."""
        assert self.kind is Kind.SNAPSHOT
        assert self.uuid is not None
        return VmSnapshot(
            self.uuid,
            self.name,
            self.vm,
            self.cluster,
            self.taken_at_us,
            self.consistency,
            self.disks,
        )


def read_entries(items: Mapping[str, Any]) -> list[Entry]:
    """The entries among a journal's items, the oldest first. Raises StateError for one that cannot be read."""
    found = []
    for key, value in items.items():
        if not key.startswith(OBJECTS):
            continue
        try:
            found.append(msgspec.convert(value, Entry))
        except msgspec.ValidationError as error:
            raise StateError(
                f"the log's journal holds an entry {key!r} that is none: {error}"
            ) from None
    return sorted(found, key=lambda entry: (entry.intended_at_us, entry.name))


class Ledger:
    """This installation's objects on clusters. One object for all VMs of a process."""

    def __init__(self, store: JournalStore, installation: str) -> None:
        self._store = store
        self.installation = installation
        #: Names of what was warned of in this process.
        self.told: set[str] = set()

    @classmethod
    async def open(cls, store: JournalStore) -> Ledger:
        """The ledger in this journal; the installation's id is made, durable, where there is none. Raises StateError."""
        installation = await store.journal_get(INSTALLATION)
        if installation is None:
            installation = names.new_installation()
            await store.journal_put(INSTALLATION, installation)
        if not names.is_installation(installation):
            raise StateError("the log's journal holds an installation id that is none")
        return cls(store, installation)

    async def entries(self, vm: str | None = None) -> Sequence[Entry]:
        """All objects, or those of one VM, the oldest first."""
        return read_entries(
            await self._store.journal_items(OBJECTS if vm is None else f"{OBJECTS}{vm}/")
        )

    async def unused(self, vm: str, name: names.ObjectName) -> str:
        """This name, or the same with a later time: an attempt that failed a moment ago may have left an object of that name, and
        its entry must stay.
        """
        taken = {entry.name for entry in await self.entries(vm)}
        while str(name) in taken:
            name = dataclasses.replace(name, made_at_us=name.made_at_us + 1_000_000)
        return str(name)

    async def write(self, entry: Entry) -> None:
        """Write it down, or what is new of it; durable on return."""
        await self._store.journal_put(_key(entry), msgspec.to_builtins(entry))

    async def settle(self, entry: Entry) -> None:
        """It is gone from the cluster, or was never there; durable on return. Can be repeated."""
        await self._store.journal_delete(_key(entry))
        self.told.discard(entry.name)
        _logger.debug("settled: %s %s", entry.kind, entry.name)


def _key(entry: Entry) -> str:
    return f"{OBJECTS}{entry.vm}/{entry.name}"


__all__ = ["INSTALLATION", "OBJECTS", "Entry", "JournalStore", "Ledger", "read_entries"]
