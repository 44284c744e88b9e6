# SPDX-License-Identifier: AGPL-3.0-or-later
"""After a commit, source and receiver show each other the heads of their logs, and sign what they believe (docs/wire.md).

A log that does not continue what was seen of it is an event and a warning here. It stops no push: the data is checked by
itself, and an operator decides what a changed history means.
"""

from __future__ import annotations

import logging
from uuid import UUID

from eventsourcing.persistence import PersistenceError

from replicator.errors import PeerRefusedError, ReplicatorError
from replicator.log import EventLog
from replicator.log.peers import PeerBrokenError, seen_size, take_head, take_signed
from replicator.push.connection import Connection
from replicator.wire import messages as m

_logger = logging.getLogger(__name__)


async def compare_heads(connection: Connection, log: EventLog, vm: UUID, name: str) -> None:
    """The source's side. What goes wrong with it is logged: the push before it is committed all the same."""
    try:
        await _compare(connection, log, vm, name)
    except (ReplicatorError, PersistenceError) as error:
        if isinstance(error, PeerRefusedError) and error.code == "log-broken":
            _logger.error(
                "%s: the receiver does not believe this side's log: %s", name, error.reason
            )
            return
        _logger.warning("%s: the heads of the logs were not compared: %s", name, error)


async def _compare(connection: Connection, log: EventLog, vm: UUID, name: str) -> None:
    peer = await log.peer(vm)
    asked = m.Compare(str(vm), name, seen_size(peer))
    answer = await connection.ask(asked, m.ReceiverHead)
    taken = None
    try:
        taken = take_head(peer, answer.key, answer.head, answer.proof, log.key)
    except PeerBrokenError as error:
        await note_broken(log, vm, str(error))
    else:
        await log.keep_peer(vm, taken)
    head = await log.head(answer.seen)
    own = log.key.verifier
    sent = m.SourceHead(str(own), head.text, head.proof, taken.seen if taken else None)
    signed = await connection.ask(sent, m.Signed)
    if taken is None:
        return
    try:
        await log.keep_peer(vm, take_signed(taken, head.text, signed.head, own))
    except PeerBrokenError as error:
        await note_broken(log, vm, str(error))


async def note_broken(log: EventLog, vm: UUID, reason: str) -> None:
    """Make it an event, and an error in the log, once."""
    async with log.change(vm) as changing:
        if changing.peer_broken is None:
            _logger.error("%s: %s", changing.name, reason)
            changing.break_peer(reason)


__all__ = ["compare_heads", "note_broken"]
