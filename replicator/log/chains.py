# SPDX-License-Identifier: AGPL-3.0-or-later
"""The chains of backups that Bacula's jobs keep on this host: each has a log of its own, below ``state_dir/bacula/jobs``.

Read only, and beside the backends that write: for lists and metrics. All functions block.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from eventsourcing.persistence import PersistenceError

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


@dataclass(frozen=True, slots=True)
class Chain:
    """The backups of one VM by one of Bacula's jobs: its folder, and the VM with all that its events add up to."""

    folder: Path
    vm: ProtectedVm


def folders(state_dir: Path) -> list[Path]:
    """The folder of every chain, in the order of their names."""
    found = sorted((state_dir / FOLDER / JOBS).glob("*/*/events"))
    return [path.parent for path in found[:_CHAINS_MAX]]


def read_chain(folder: Path) -> ProtectedVm | None:
    """The VM of the chain in a folder; None where it has had no job, or where its log cannot be read, which is logged."""
    if not (folder / "events").is_dir():
        return None
    try:
        store = LogStore.open(folder / "events", readonly=True)
        try:
            return next(iter(states.recall(store).values()), None)
        finally:
            store.close()
    except (OSError, PersistenceError, ReplicatorError) as error:
        _logger.warning("the log of the backups in %s cannot be read: %s", folder, error)
        return None


def read_chains(state_dir: Path) -> list[Chain]:
    """Every chain that has had a job, by folder."""
    found = [(folder, read_chain(folder)) for folder in folders(state_dir)]
    return [Chain(folder, vm) for folder, vm in found if vm is not None]


__all__ = ["FOLDER", "JOBS", "Chain", "folders", "read_chain", "read_chains"]
