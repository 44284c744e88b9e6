# SPDX-License-Identifier: AGPL-3.0-or-later
"""The log's own word: its key, its signed head, and proofs of both. Everything here blocks.

The key is made with the log and stays beside it (mode 0600). A signature says whose head it is, not that it is true: what
cannot be taken back is a head that the other side has seen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from eventstore.checkpoint import Checkpoint, CheckpointError, CheckpointKey, sign
from eventstore.tree import Leaves, TreeLog
from replicator import durable
from replicator.errors import StateError
from replicator.log.archive import FOLDER, SUFFIX
from replicator.log.store import LogStore

if TYPE_CHECKING:
    from eventstore.environment import Transaction

_logger = logging.getLogger(__name__)

KEY = "log.key"


@dataclass(frozen=True, slots=True)
class SignedHead:
    """The log's head, signed, with the proof that it continues the log as of ``since`` events (empty if it cannot)."""

    size: int
    text: str
    since: int
    proof: tuple[bytes, ...]


def check_begun(folder: Path) -> None:
    """Raise StateError where a log has been and is gone: a new one in its place would hide that. Blocks."""
    data = folder / "data.mdb"
    try:
        gone = not data.exists() or data.stat().st_size == 0
        left = (folder / KEY).exists() or any((folder / FOLDER).glob(f"*{SUFFIX}"))
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}") from error
    if gone and left:
        raise StateError(
            f"the log in {folder} is gone, but its key or its segments are there: put data.mdb back from a copy,"
            f" or move {folder} away to begin a new log"
        )


def ensure_key(folder: Path, events: int) -> CheckpointKey:
    """The log's key, made now if the log (of so many events) has none. Raises StateError where it cannot be used."""
    path = folder / KEY
    if not path.exists():
        if events:
            _logger.warning(
                "%s is missing, a new key is made: the other side will not believe this log until"
                " replctl log accept there; put the old one back if there is a copy",
                path,
            )
        partial = path.with_suffix(".new")
        try:
            partial.unlink(missing_ok=True)
            CheckpointKey.generate(f"replctl-{uuid4().hex[:12]}").save(partial)
            durable.rename(partial, path)
        except OSError as error:
            raise StateError(f"{path}: {error.strerror}") from error
    return load_key(folder)


def load_key(folder: Path) -> CheckpointKey:
    """The log's key. Raises StateError where it cannot be used."""
    path = folder / KEY
    try:
        return CheckpointKey.load(path)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    except CheckpointError as error:
        text = str(error)
        raise StateError(text if str(path) in text else f"{path}: {text}") from error


def signed_head(store: LogStore, key: CheckpointKey, since: int) -> SignedHead:
    """The head of now. Raises the event store's errors where the log does not fit its tree."""

    def read(tree: TreeLog, txn: Transaction, leaves: Leaves) -> SignedHead:
        size, root = tree.head(txn)
        proof: tuple[bytes, ...] = ()
        if 0 < since <= size:
            proof = tuple(tree.consistency_proof(txn, since, size, leaves))
        text = sign(Checkpoint(key.verifier.name, size, root), key)
        return SignedHead(size, text, since, proof)

    return store.read_tree(read)
