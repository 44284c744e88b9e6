# SPDX-License-Identifier: AGPL-3.0-or-later
"""Moving a closed period into its segment. Blocks.

The segment is written, durable, read back in full and named; then the period's row says so; then the live rows go, in
bounded steps. A crash between any two leaves something that the next start takes up again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import trio

from eventstore.checkpoint import Checkpoint, CheckpointKey, sign
from eventstore.records import originator_key
from eventstore.segments import CanonicalParts, Segment, SegmentError, write_segment
from eventstore.tree import BLOCK_LEAVES, Leaves, TreeLog
from replicator import durable
from replicator.errors import DamageError
from replicator.log import peers
from replicator.log.periods import Ends, Period
from replicator.log.store import LogStore

if TYPE_CHECKING:
    from eventstore.environment import Transaction

#: Rows that go in one transaction.
DROP_ROWS = 2000
#: Blocks kept of heads that were seen: 8 KiB each, in a row of at most 1 MiB. Many sides have seen the same.
SEEN_BLOCKS_MAX = 100


def seal(store: LogStore, key: CheckpointKey, period: Period) -> tuple[Period, Ends]:
    """The closed period as it is when its segment is there, and its ends.

    In a trio thread a cancellation is heard now and then; nothing is left of the segment then.

    Raises OSError and the event store's errors: a full disk, say; to be tried again.
    """
    path = store.archive.path(period)
    root = store.root_at(period.last)
    if path.exists():  # from before a crash: its row was not written any more
        try:
            with Segment.open(path) as segment:
                segment.verify()
                good = (segment.info.first, segment.info.root) == (period.first, root)
        except SegmentError as error:
            raise DamageError(f"{path} is in the way: {error}") from error
        if not good:
            raise DamageError(f"{path} is there, and is not what this log would seal")
    else:
        durable.make_dir(store.archive.folder)
        before = store.read_tree(
            lambda tree, txn, leaves: tree.frontier_at(txn, period.first - 1, leaves)
        )
        origin = key.verifier.name
        write_segment(
            path,
            origin=origin,
            label=period.label,
            first=period.first,
            last=period.last,
            frontier=before.hashes,
            checkpoint=sign(Checkpoint(origin, period.last, root), key),
            records=_records(store, period),
            root=root,
        )
    return msgspec.structs.replace(period, segment=path.name, root=root), _ends(store, period)


def _ends(store: LogStore, period: Period) -> Ends:
    lead_end = -(-(period.first - 1) // BLOCK_LEAVES) * BLOCK_LEAVES
    lead_end = min(max(lead_end, period.first - 1), period.last)
    tail_first = max(period.last // BLOCK_LEAVES * BLOCK_LEAVES, lead_end) + 1
    seen = _seen_blocks(store, lead_end + 1, tail_first - 1)

    def read(_tree: TreeLog, txn: Transaction, _leaves: Leaves) -> Ends:
        hashes = store.recorder.leaf_hashes
        lead = hashes(txn, period.first, lead_end + 1 - period.first)
        tail = hashes(txn, tail_first, period.last + 1 - tail_first)
        blocks = {first: b"".join(hashes(txn, first, BLOCK_LEAVES)) for first in seen}
        return Ends(b"".join(lead), b"".join(tail), blocks)

    return store.read_tree(read)


def _seen_blocks(store: LogStore, first: int, last: int) -> list[int]:
    """The first events of the tree's whole blocks within these in which a head ends that another side has signed."""
    found = set()
    for vm, *_ in store.peers.items():
        size = peers.signed_size(peers.load(store.peers, vm))
        begin = (size - 1) // BLOCK_LEAVES * BLOCK_LEAVES + 1
        if size and first <= begin and begin + BLOCK_LEAVES - 1 <= last:
            found.add(begin)
    return sorted(found)[-SEEN_BLOCKS_MAX:]


def _records(store: LogStore, period: Period) -> Iterator[CanonicalParts]:
    for note in store.notifications(period.first, period.last):
        if not note.id % 512:
            trio.from_thread.check_cancelled()
        yield CanonicalParts(
            note.id,
            originator_key(note.originator_id),
            note.originator_version,
            note.topic,
            note.state,
        )


__all__ = ["DROP_ROWS", "seal"]
