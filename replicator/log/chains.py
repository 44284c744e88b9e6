# SPDX-License-Identifier: AGPL-3.0-or-later
"""The chains of backups that Bacula's jobs keep on this host: each has a log of its own, below ``state_dir/bacula/jobs``.

Read only, and beside the backends that write: for lists and metrics. All functions block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from eventsourcing.persistence import PersistenceError

from replicator.domain.backup import Backups, director_name
from replicator.domain.vm import ProtectedVm
from replicator.errors import ReplicatorError
from replicator.log import states
from replicator.log.store import LogStore

_logger = logging.getLogger(__name__)

#: Below the state directory.
FOLDER: Final = "bacula"
JOBS: Final = "jobs"
#: More chains than this are not looked at.
_CHAINS_MAX: Final = 10_000
#: In the journal: what a source has made on a platform.
_OBJECTS: Final = "prism/"


@dataclass(frozen=True, slots=True)
class Chain:
    """The backups of one VM by one of Bacula's jobs: its folder, and the VM with all that its events add up to.

    ``snapshot``: the name of the reference on its cluster, None where it takes nothing; ``expires_at_us``: when it is gone by
    itself, in microseconds since the epoch, 0 if not known.
    """

    folder: Path
    vm: ProtectedVm
    snapshot: str | None = None
    expires_at_us: int = 0

    @property
    def backups(self) -> Backups:
        """What its events add up to."""
        return self.vm.backups

    @property
    def name(self) -> str:
        """What the VM was called at its last backup."""
        last = self.backups.last
        return last.vm if last is not None else self.vm.name

    @property
    def job(self) -> str:
        """The job's name in the Director's configuration."""
        ended = self.backups.last or self.backups.failure
        return director_name(ended.job) if ended is not None else ""


def folders(state_dir: Path) -> list[Path]:
    """The folder of every chain, in the order of their names."""
    found = sorted((state_dir / FOLDER / JOBS).glob("*/*/events"))
    return [path.parent for path in found[:_CHAINS_MAX]]


def read_chain(folder: Path) -> Chain | None:
    """The chain in a folder; None where it has had no job, or where its log cannot be read, which is logged."""
    if not (folder / "events").is_dir():
        return None
    try:
        store = LogStore.open(folder / "events", readonly=True)
        try:
            vm = next(iter(states.recall(store).values()), None)
            if vm is None:
                return None
            for _, value in store.journal.items(_OBJECTS):
                entry: Any = msgspec.msgpack.decode(value)
                if entry.get("reference"):
                    return Chain(folder, vm, str(entry["name"]), int(entry["expires_at_us"]))
            return Chain(folder, vm)
        finally:
            store.close()
    except (OSError, PersistenceError, ReplicatorError, msgspec.DecodeError) as error:
        _logger.warning("the log of the backups in %s cannot be read: %s", folder, error)
        return None


def read_chains(state_dir: Path) -> list[Chain]:
    """Every chain that has had a job, by the VM's name and the job's."""
    found = [read_chain(folder) for folder in folders(state_dir)]
    known = [chain for chain in found if chain is not None and chain.job]
    return sorted(known, key=lambda chain: (chain.name, chain.vm.vm, chain.job))


__all__ = ["FOLDER", "JOBS", "Chain", "folders", "read_chain", "read_chains"]
