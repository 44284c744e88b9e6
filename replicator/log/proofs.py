# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether the log is what it was: the check of all of it, and proofs that others can check. Everything here blocks.

A proof is a JSON object (docs/json.md). It is worth as much as the head in it: one that the other side has signed, or that
was written down elsewhere, cannot be taken back.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from eventsourcing.persistence import InternalError, Notification

from eventstore import merkle
from eventstore.checkpoint import CheckpointError, CheckpointKey, VerifierKey, open_checkpoint
from eventstore.merkle import Frontier
from eventstore.records import canonical_record, originator_key
from eventstore.segments import SegmentError
from eventstore.tree import Leaves, TreeLog, TreeMismatchError
from replicator.errors import DamageError, RefusedError, UsageError
from replicator.log.heads import signed_head
from replicator.log.peers import Peer
from replicator.log.periods import Period
from replicator.log.store import LogStore

if TYPE_CHECKING:
    from eventstore.environment import Transaction

#: Events checked in one transaction.
_STRIDE = 1 << 13

Report = Callable[[int, int], None]


@dataclass(slots=True)
class Checked:
    """What was found to be right. ``away``: segments that are not here and were not looked at."""

    events: int
    root: bytes
    segments: list[str] = field(default_factory=list)
    away: list[str] = field(default_factory=list)
    #: Heads of this log that the other side has signed, and that this log continues.
    signed_heads: int = 0


def verify(store: LogStore, report: Report = lambda _done, _total: None) -> Checked:
    """Compute the tree again from every record that is here, sealed or live, and hold it against the log's head and the
    heads that other sides have signed. Raises DamageError naming the first record that does not fit, as closely as it shows.
    """
    try:
        head = store.read_tree(lambda tree, txn, _: tree.head(txn))
        checked = Checked(head.size, head.root)
        for period in store.archive.sealed():
            _check_segment(store, period, checked)
            report(period.last, head.size)
        _check_live(store, report)
        _check_signed(store, checked)
    except (TreeMismatchError, SegmentError, InternalError) as error:
        raise DamageError(f"the log is damaged or was changed: {error}") from error
    return checked


def _check_segment(store: LogStore, period: Period, checked: Checked) -> None:
    path = store.archive.path(period)
    if not path.exists():
        checked.away.append(path.name)
        return
    with store.archive.open(period) as segment:
        segment.verify()
        info = segment.info
        if (info.first, info.last) != (period.first, period.last):
            raise DamageError(f"{path.name} holds events {info.first} to {info.last}, not its own")
    if store.root_at(period.last) != info.root:
        raise DamageError(
            f"{path.name} is not what this log sealed: one of events {period.first} to {period.last}"
            " is another than it was"
        )
    checked.segments.append(path.name)


def _check_live(store: LogStore, report: Report) -> None:
    floor = store.recorder.live_first() - 1
    frontier = store.read_tree(lambda tree, txn, leaves: tree.frontier_at(txn, floor, leaves))
    going = True
    while going:

        def stride(
            tree: TreeLog, txn: Transaction, _: Leaves, frontier: Frontier = frontier
        ) -> tuple[Frontier, bool, int]:
            size = tree.head(txn).size
            stop = min(size, frontier.size + _STRIDE)
            leaves = _leaves(store, txn, frontier.size, stop)
            at_end = stop == size
            done = tree.verify(txn, leaves, frontier, None if at_end else stop)
            return done.frontier, not at_end, size

        frontier, going, size = store.read_tree(stride)
        report(frontier.size, size)


def _leaves(
    store: LogStore, txn: Transaction, after: int, stop: int
) -> Iterator[tuple[int, bytes]]:
    hashes = store.recorder.leaf_hashes(txn, after + 1, stop - after)
    return zip(range(after + 1, stop + 1), hashes, strict=True)


def _check_signed(store: LogStore, checked: Checked) -> None:
    for vm, row in store.peers.items():
        peer = msgspec.msgpack.decode(row, type=Peer)
        if peer.ours is None:
            continue
        signer = VerifierKey.parse(peer.key)
        try:
            seen = open_checkpoint(peer.ours, [signer])
        except CheckpointError as error:
            raise DamageError(f"the head that {signer.name} signed (VM {vm}): {error}") from error
        if seen.size > checked.events:
            raise DamageError(
                f"the log ends at event {checked.events}, but {signer.name} has signed one of {seen.size}:"
                " events are missing at its end"
            )
        if store.root_at(seen.size) != seen.root:
            raise DamageError(
                f"one of events 1 to {seen.size} is not what it was when {signer.name} signed the log's head"
            )
        checked.signed_heads += 1


def prove_event(store: LogStore, key: CheckpointKey, number: int) -> dict[str, Any]:
    """The record of an event, its place in the tree, and the signed head. Raises RefusedError if it is not there."""
    found = store.recorder.select_notifications(number, 1, number)
    if not found:
        raise RefusedError(f"the log has no event {number}: it ends at {store.head()}")
    note = found[0]

    head = signed_head(store, key, 0)
    proof = store.read_tree(
        lambda tree, txn, leaves: tree.inclusion_proof(txn, number - 1, head.size, leaves)
    )
    return {
        "event": number,
        "record": _base64(_record(note)),
        "index": number - 1,
        "size": head.size,
        "proof": [step.hex() for step in proof],
        "head": head.text,
        "key": str(key.verifier),
    }


def prove_growth(store: LogStore, key: CheckpointKey, old: int, new: int | None) -> dict[str, Any]:
    """That the log of ``new`` events (None: all) continues that of ``old``. Raises RefusedError for sizes it never had."""
    head = signed_head(store, key, 0)
    new = head.size if new is None else new
    if not 0 <= old <= new <= head.size:
        raise RefusedError(f"the log has {head.size} events: sizes must be in order and within it")
    size = new

    def read(tree: TreeLog, txn: Transaction, leaves: Leaves) -> tuple[bytes, bytes, list[bytes]]:
        return (
            tree.root_at(txn, old, leaves),
            tree.root_at(txn, size, leaves),
            tree.consistency_proof(txn, old, size, leaves),
        )

    old_root, new_root, proof = store.read_tree(read)
    return {
        "old_size": old,
        "old_root": old_root.hex(),
        "new_size": size,
        "new_root": new_root.hex(),
        "proof": [step.hex() for step in proof],
        "head": head.text,
        "key": str(key.verifier),
    }


class _EventProof(msgspec.Struct, frozen=True):
    event: int
    record: str
    index: int
    size: int
    proof: tuple[str, ...]
    head: str
    key: str


class _GrowthProof(msgspec.Struct, frozen=True):
    old_size: int
    old_root: str
    new_size: int
    new_root: str
    proof: tuple[str, ...]
    head: str
    key: str


def check_proof(text: bytes, key: str | None) -> str:
    """What a proof shows, in one line. ``key``: the log's, if it is known from elsewhere; else the proof's own is believed.

    Needs no log. Raises UsageError for text that is no proof, DamageError for one that does not prove.
    """
    try:
        given = msgspec.json.decode(text, type=_EventProof)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _check_growth(text, key)
    head = _head(given.head, key or given.key)
    try:
        record = base64.b64decode(given.record, validate=True)
        steps = [bytes.fromhex(step) for step in given.proof]
        if head.size != given.size or given.index != given.event - 1:
            raise DamageError("the proof is of another size or event than it says")
        merkle.verify_inclusion(merkle.leaf_hash(record), given.index, given.size, steps, head.root)
    except ValueError as error:
        raise DamageError(f"the proof does not hold: {error}") from error
    return f"event {given.event} is in log {head.origin} of {head.size} events"


def _check_growth(text: bytes, key: str | None) -> str:
    try:
        given = msgspec.json.decode(text, type=_GrowthProof)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"this is no proof: {error}") from error
    head = _head(given.head, key or given.key)
    try:
        steps = [bytes.fromhex(step) for step in given.proof]
        old_root, new_root = bytes.fromhex(given.old_root), bytes.fromhex(given.new_root)
        merkle.verify_consistency(given.old_size, old_root, given.new_size, new_root, steps)
    except ValueError as error:
        raise DamageError(f"the proof does not hold: {error}") from error
    if (head.size, head.root) != (given.new_size, new_root):
        raise DamageError(
            f"the signed head is of {head.size} events, the proof of {given.new_size}"
        )
    return f"log {head.origin} of {given.new_size} events continues that of {given.old_size}"


def _head(text: str, key: str) -> Any:
    try:
        verifier = VerifierKey.parse(key)
        head = open_checkpoint(text, [verifier])
    except CheckpointError as error:
        raise DamageError(f"the head of the proof cannot be believed: {error}") from error
    if head.origin != verifier.name:
        raise DamageError(f"the head is of log {head.origin}, the key of {verifier.name}")
    return head


def _record(note: Notification) -> bytes:
    key = originator_key(note.originator_id)
    return canonical_record(note.id, key, note.originator_version, note.topic, note.state)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


__all__ = ["Checked", "check_proof", "prove_event", "prove_growth", "verify"]
