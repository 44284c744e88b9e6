# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is kept of the other side's log, by VM: its key and the last head seen, and our own head as the other side signed it.

Each side believes the first head that it is shown, over an authenticated channel, and from then on only what is proven to
continue it. So neither can rewrite what the other has seen. Pure, but for the functions that say that they block.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from eventstore.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointKey,
    VerifierKey,
    check_progress,
    cosign,
    open_checkpoint,
)
from eventstore.journal import Journal
from replicator.errors import DamageError


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """``key``: the other log's, in text form. ``seen``: its last head, signed by it and by us. ``ours``: our last head,
    signed by us and by it.
    """

    key: str
    seen: str
    ours: str | None = None


class PeerBrokenError(Exception):
    """The other side's log is not the one that was seen before. ``why`` says so without saying whose log it is."""

    def __init__(self, what: str, why: Exception) -> None:
        super().__init__(f"the other side{what}: {why}")
        self.why = str(why)


def load(journal: Journal, vm: str) -> Peer | None:
    """What is kept for a VM. Blocks. Raises DamageError."""
    row = journal.get(vm)
    if row is None:
        return None
    try:
        peer = msgspec.msgpack.decode(row, type=Peer)
        _seen(peer)
        signed_size(peer)
        return peer
    except (msgspec.MsgspecError, CheckpointError) as error:
        raise DamageError(f"what is kept of the other side's log ({vm}): {error}") from error


def seen_size(peer: Peer | None) -> int:
    """How many events of the other log were seen; 0 if none was."""
    return 0 if peer is None else _seen(peer).size


def signed_size(peer: Peer | None) -> int:
    """How many events of our log the other side has signed the head of; 0 if none."""
    if peer is None or peer.ours is None:
        return 0
    return open_checkpoint(peer.ours, [VerifierKey.parse(peer.key)]).size


def _seen(peer: Peer) -> Checkpoint:
    return open_checkpoint(peer.seen, [VerifierKey.parse(peer.key)])


def take_head(
    peer: Peer | None, key: str, text: str, proof: Sequence[bytes], own: CheckpointKey
) -> Peer:
    """What to keep after the other side showed this head. Raises PeerBrokenError."""
    try:
        verifier = VerifierKey.parse(key)
        new = open_checkpoint(text, [verifier])
        if new.origin != verifier.name:
            raise CheckpointError(
                f"the head is of log {new.origin!r}, the key of {verifier.name!r}"
            )
        if peer is not None and peer.key != key:
            before = VerifierKey.parse(peer.key).name
            raise CheckpointError(
                f"it is log {verifier.name}, and until now it was {before}: it began anew"
            )
        check_progress(None if peer is None else _seen(peer), new, proof)
        signed = cosign(text, [verifier], own)
    except CheckpointError as error:
        raise PeerBrokenError("'s log cannot be believed", error) from error
    return Peer(key, signed, None if peer is None else peer.ours)


def take_signed(peer: Peer, sent: str, signed: str, own: VerifierKey) -> Peer:
    """What to keep after the other side signed the head that we sent. Raises PeerBrokenError."""
    try:
        theirs = open_checkpoint(signed, [own, VerifierKey.parse(peer.key)])
        if theirs != open_checkpoint(sent, [own]):
            raise CheckpointError("it signed another head than it was sent")
    except CheckpointError as error:
        raise PeerBrokenError(" did not sign our head", error) from error
    return msgspec.structs.replace(peer, ours=signed)


__all__ = [
    "Peer",
    "PeerBrokenError",
    "load",
    "seen_size",
    "signed_size",
    "take_head",
    "take_signed",
]
