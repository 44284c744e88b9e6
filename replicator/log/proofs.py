# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether the log is what it was: the check of all of it, and proofs that others can check. Everything here blocks.

A proof is a JSON object (docs/json.md). It is worth as much as the head in it: one that the other side has signed, or that
was written down elsewhere, cannot be taken back.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from eventsourcing.persistence import (
    InternalError,
    Notification,
    PersistenceError,
    StoredEvent,
)

from eventstore import merkle
from eventstore.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointKey,
    VerifierKey,
    open_checkpoint,
    sign,
)
from eventstore.mapper import EventMapper
from eventstore.merkle import Frontier
from eventstore.records import canonical_record, originator_key
from eventstore.segments import CanonicalParts, Segment, SegmentError, split_canonical
from eventstore.tree import Leaves, TreeLog, TreeMismatchError
from replicator.domain.views import instant
from replicator.domain.vm import event_kind, event_time_us
from replicator.errors import DamageError, RefusedError, UsageError
from replicator.log.archive import SegmentAwayError
from replicator.log.heads import load_key, signed_head
from replicator.log.peers import Peer
from replicator.log.peers import load as load_peer
from replicator.log.periods import Period
from replicator.log.states import recall
from replicator.log.store import TYPES, LogStore

if TYPE_CHECKING:
    from eventstore.environment import Transaction

#: Events checked in one transaction.
_STRIDE = 1 << 13

#: Whoever made the proof has said so himself.
_OWN_KEY = " (by the key in the proof itself)"

Report = Callable[[int, int], None]


@dataclass(slots=True)
class Checked:
    """What was found to be right. ``away``: segments that are not here and were not looked at.

    ``events`` are all that the log has had, ``read`` those that were looked at.
    """

    events: int
    root: bytes
    read: int = 0
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
        # Asked first: what goes from the live log meanwhile is looked at all the same, and what is gone is sealed below.
        floor = store.recorder.live_first() - 1
        for period in store.archive.sealed():
            _check_segment(store, period, checked)
            report(period.last, head.size)
        _check_live(store, floor, checked, report)
        store.recorder.verify()  # an index that lacks an event hides it from every history, and no tree covers that
        _check_signed(store, checked)
    except (TreeMismatchError, SegmentError, InternalError) as error:
        raise DamageError(f"the log is damaged or was changed: {error}") from error
    return checked


def _check_segment(store: LogStore, period: Period, checked: Checked) -> None:
    path = store.archive.path(period)
    if not path.exists():
        if not store.archive.moved(period).exists():
            raise DamageError(
                f"{path.name} is missing, and was not moved away: events {period.first} to {period.last}"
                " are lost unless a copy of it is brought back with replctl log import FILE"
            )
        checked.away.append(path.name)
        return
    with store.archive.open(period, whatever=True) as segment:
        segment.verify()
        info = segment.info
        if (info.first, info.last) != (period.first, period.last):
            raise DamageError(f"{path.name} holds events {info.first} to {info.last}, not its own")
        if store.root_at(period.last) != info.root:
            raise DamageError(
                f"{path.name} is not what this log sealed: {_blamed(store, period, segment)}"
            )
    checked.segments.append(path.name)
    checked.read += period.last + 1 - period.first


def _blamed(store: LogStore, period: Period, segment: Segment) -> str:
    """Which events of a segment are not in the tree, as closely as the tree's nodes say."""

    def compare(tree: TreeLog, txn: Transaction, leaves: Leaves) -> None:
        count = period.last + 1 - period.first
        hashes = enumerate(segment.leaf_hashes(period.first, count), period.first)
        before = tree.frontier_at(txn, period.first - 1, leaves)
        tree.verify(txn, hashes, before, period.last)

    try:
        store.read_tree(compare)
    except TreeMismatchError as error:
        return str(error)
    return f"one of events {period.first} to {period.last} is another than it was"


def _check_live(store: LogStore, floor: int, checked: Checked, report: Report) -> None:
    frontier = store.read_tree(lambda tree, txn, leaves: tree.frontier_at(txn, floor, leaves))
    going = True
    while going:

        def stride(
            tree: TreeLog, txn: Transaction, leaves: Leaves, frontier: Frontier = frontier
        ) -> tuple[Frontier, bool, int]:
            size = tree.head(txn).size
            stop = min(size, frontier.size + _STRIDE)
            hashes = enumerate(leaves(frontier.size, stop - frontier.size), frontier.size + 1)
            at_end = stop == size
            done = tree.verify(txn, hashes, frontier, None if at_end else stop)
            return done.frontier, not at_end, size

        frontier, going, size = store.read_tree(stride)
        report(frontier.size, size)
    checked.events, checked.root = frontier.size, frontier.root()
    checked.read += frontier.size - floor


def _check_signed(store: LogStore, checked: Checked) -> None:
    rows = store.peers.items()
    own = load_key(store.folder).verifier
    size = store.head()  # as of now: another may have been signed while records were read
    for vm, row in rows:
        signer, seen = _signed(vm, row, own)
        if seen is None:
            continue
        if seen.size > size:
            raise DamageError(
                f"the log ends at event {size}, but {signer} has signed one of {seen.size}:"
                " events are missing at its end"
            )
        try:
            root = store.root_at(seen.size)
        except SegmentAwayError:
            continue  # it was signed in the middle of a segment that is named as away
        if root != seen.root:
            raise DamageError(
                f"one of events 1 to {seen.size} is not what it was when {signer} signed the log's head"
            )
        checked.signed_heads += 1


def _signed(vm: str, row: bytes, own: VerifierKey) -> tuple[str, Checkpoint | None]:
    """Who the other side is, and the head of this log that it has signed. Raises DamageError, also for that of another log."""
    try:
        peer = msgspec.msgpack.decode(row, type=Peer)
        signer = VerifierKey.parse(peer.key)
        seen = None if peer.ours is None else open_checkpoint(peer.ours, [own, signer])
    except (msgspec.MsgspecError, CheckpointError) as error:
        raise DamageError(f"the head that the other side signed (VM {vm}): {error}") from error
    return signer.name, seen


def show_heads(store: LogStore, key: CheckpointKey) -> dict[str, Any]:
    """The log's key and its head, signed now; and by VM the other side's key, its head as this side signed it, and this
    side's last head that the other side has signed.
    """
    names = {vm.vm: vm.name for vm in recall(store).values()}
    peers = []
    for vm, *_ in store.peers.items():
        peer = load_peer(store.peers, vm)
        assert peer is not None
        peers.append(
            {"vm": names.get(vm, vm), "key": peer.key, "head": peer.seen, "signed": peer.ours}
        )
    head = signed_head(store, key, 0)
    return {"key": str(key.verifier), "size": head.size, "head": head.text, "peers": peers}


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
    events = store.head()
    size = events if new is None else new
    if not 0 <= old <= size <= events:
        raise RefusedError(f"the log has {events} events: sizes must be in order and within it")

    def read(tree: TreeLog, txn: Transaction, leaves: Leaves) -> tuple[bytes, bytes, list[bytes]]:
        return (
            tree.root_at(txn, old, leaves),
            tree.root_at(txn, size, leaves),
            tree.consistency_proof(txn, old, size, leaves),
        )

    old_root, new_root, proof = store.read_tree(read)
    name = key.verifier.name
    return {
        "old_size": old,
        "old_root": old_root.hex(),
        "new_size": size,
        "new_root": new_root.hex(),
        "proof": [step.hex() for step in proof],
        "head": sign(Checkpoint(name, size, new_root), key),
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

    Needs no log. Raises UsageError for text that is no proof or a key that is none, DamageError for a proof that does not
    prove.
    """
    if key is not None:
        try:
            VerifierKey.parse(key)
        except CheckpointError as error:
            raise UsageError(f"the log's key cannot be read: {error}") from error
    try:
        given = msgspec.json.decode(text, type=_EventProof)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _check_growth(text, key)
    head = _head(given.head, given.key if key is None else key)
    try:
        record = base64.b64decode(given.record, validate=True)
        steps = [bytes.fromhex(step) for step in given.proof]
        if head.size != given.size or given.index != given.event - 1:
            raise DamageError("the proof is of another size or event than it says")
        merkle.verify_inclusion(merkle.leaf_hash(record), given.index, given.size, steps, head.root)
        parts = split_canonical(record)
        if parts.nid != given.event:
            raise DamageError(f"the proof is of event {parts.nid}, not {given.event}")
    except (ValueError, SegmentError) as error:
        raise DamageError(f"the proof does not hold: {error}") from error
    return (
        f"event {given.event} is in log {head.origin} of {head.size} events: {_told(parts)}"
        f"{'' if key is not None else _OWN_KEY}"
    )


def _told(parts: CanonicalParts) -> str:
    """What an event says, for people."""
    stored = StoredEvent(parts.originator_id, parts.version, parts.topic, parts.state)
    try:
        event = EventMapper(types=TYPES).to_domain_event(stored)
    except PersistenceError:
        return parts.topic
    return f"{event_kind(event)}, {instant(event_time_us(event))}"


def _check_growth(text: bytes, key: str | None) -> str:
    try:
        given = msgspec.json.decode(text, type=_GrowthProof)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise UsageError(f"this is no proof: {error}") from error
    head = _head(given.head, given.key if key is None else key)
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
    return (
        f"log {head.origin} of {given.new_size} events continues that of {given.old_size}, whose root is"
        f" {given.old_root}{'' if key is not None else _OWN_KEY}"
    )


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


__all__ = ["Checked", "check_proof", "prove_event", "prove_growth", "show_heads", "verify"]
