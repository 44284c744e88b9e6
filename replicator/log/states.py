# SPDX-License-Identifier: AGPL-3.0-or-later
"""The projection of every VM's state, so that a start folds only what came after it. It can be thrown away.

A VM's row is its balance, with the number and time of the event that it goes up to. One of a VM with thousands of points
takes more room than a projection's row may have, so it is kept in pieces: under the id of the VM's stream and a number.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
from eventsourcing.persistence import Notification, PersistenceError

from eventstore.projection_rows import DATABASE
from eventstore.projections import Projection, View, list_projections, read_projection
from replicator.domain.model import Balance, stream_id
from replicator.domain.vm import EPOCH, ProtectedVm, time_us
from replicator.errors import StateError
from replicator.log.store import Fold, LogStore

_logger = logging.getLogger(__name__)

NAME = "vms"
#: Bytes of a row that are kept together.
PIECE = 1 << 20
#: How often the beginning of the log may move away under the reader.
_TRIES = 5


class _Row(msgspec.Struct, frozen=True, array_like=True):
    version: int
    modified_us: int
    balance: Balance


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Row)


def encode(vm: ProtectedVm) -> bytes:
    """A VM as a row."""
    return _encoder.encode(_Row(vm.version, time_us(vm.modified_on), vm.balance()))


def decode(row: bytes) -> ProtectedVm:
    """The VM of a row. Raises msgspec.MsgspecError."""
    found = _decoder.decode(row)
    modified = EPOCH + timedelta(microseconds=found.modified_us)
    return ProtectedVm.restore(found.balance, found.version, modified)


class VmStates(Projection):
    """Keeps ``vms``: a row for each VM. ``event`` decodes a row of the log."""

    name = NAME
    revision = 2
    topics: Sequence[str] = ()

    def __init__(self, event: Callable[[Notification], Any]) -> None:
        self._event = event
        #: What the transaction of this view has touched: decoded once, written once.
        self._view: View | None = None
        self._touched: dict[bytes, ProtectedVm] = {}

    def apply(self, view: View, notification: Notification) -> None:
        """Fold one event into its VM."""
        if view is not self._view:  # a transaction that was given up leaves nothing behind
            self._view, self._touched = view, {}
        event = self._event(notification)
        key = event.originator_id.bytes
        vm = self._touched.get(key)
        if vm is None and (row := _get(view, key)):
            vm = decode(row)
        vm = event.mutate(vm)
        assert vm is not None
        if isinstance(event, ProtectedVm.PeriodOpened):
            before = stream_id(UUID(vm.vm), vm.period - 1).bytes
            self._touched.pop(before, None)
            _put(view, before, b"")
        self._touched[key] = vm

    def finish(self, view: View) -> None:
        """Write the rows of the VMs that had events."""
        if view is self._view:
            for key, vm in self._touched.items():
                _put(view, key, encode(vm))
        self._view, self._touched = None, {}


def _pieces(key: bytes) -> Iterator[bytes]:
    """The keys of a row's pieces, in order."""
    for number in itertools.count():
        yield key + number.to_bytes(2)


def _get(view: View, key: bytes) -> bytes:
    """A row; nothing if there is none."""
    pieces = (view.get(piece) for piece in _pieces(key))
    return b"".join(itertools.takewhile(bool, pieces))  # type: ignore[arg-type]


def _put(view: View, key: bytes, row: bytes) -> None:
    """Keep a row, and no piece of a longer one that was there; nothing removes it."""
    for number, piece in enumerate(_pieces(key)):
        part = row[number * PIECE : (number + 1) * PIECE]
        if part:
            view.put(piece, part)
        elif not view.delete(piece):
            return


def _all(view: View) -> list[ProtectedVm]:
    rows: dict[bytes, bytes] = {}
    for piece, part in view.items():
        rows[piece[:16]] = rows.get(piece[:16], b"") + part
    return [decode(row) for row in rows.values()]


def recall(store: LogStore) -> dict[UUID, ProtectedVm]:
    """All VMs: from the rows, and the events after them. Blocks.

    Where there are no rows that this program can use, from the first events of the live log, which are openings.
    """
    for _ in range(_TRIES):
        position, vms = _rows(store)
        fold = Fold(vms)
        for note in store.notifications(position + 1):
            fold.add(store.event(note))
        if store.recorder.live_first() <= position + 1:
            return fold.vms
    raise StateError("the log's beginning moves away faster than it can be read")


def _rows(store: LogStore) -> tuple[int, list[ProtectedVm]]:
    """The VMs of the rows, and the event that these go up to."""
    try:
        for _ in range(_TRIES):
            before = _position(store)
            # Rows that are not made yet, or made anew after they were lost, may be behind the live log's beginning.
            if before is None or before + 1 < store.recorder.live_first():
                break
            vms = read_projection(store.environment, NAME, _all)
            if _position(store) == before:
                return before, vms
    except (PersistenceError, msgspec.MsgspecError) as error:
        # They can be thrown away: the log has everything.
        _logger.warning("the projection %s cannot be used, the log is read: %s", NAME, error)
    return store.recorder.live_first() - 1, []


def _position(store: LogStore) -> int | None:
    """How far the rows go; None if there are none of this revision."""
    if store.environment.find_database(DATABASE) is None:
        return None
    for state in list_projections(store.recorder):
        if state.name == NAME and state.revision == VmStates.revision:
            return state.position
    return None


__all__ = ["NAME", "PIECE", "VmStates", "recall"]
