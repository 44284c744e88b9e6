# SPDX-License-Identifier: AGPL-3.0-or-later
"""The projection of every VM's state, so that a start folds only what came after it. It can be thrown away.

A row is one VM's balance, with the number and time of the event that it goes up to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
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
    """Keeps ``vms``: one row for each VM, under the id of its stream. ``event`` decodes a row of the log."""

    name = NAME
    revision = 1
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
        if vm is None and (row := view.get(key)) is not None:
            vm = decode(row)
        vm = event.mutate(vm)
        assert vm is not None
        if isinstance(event, ProtectedVm.PeriodOpened):
            before = stream_id(UUID(vm.vm), vm.period - 1).bytes
            self._touched.pop(before, None)
            view.delete(before)
        self._touched[key] = vm

    def finish(self, view: View) -> None:
        """Write the rows of the VMs that had events."""
        if view is self._view:
            for key, vm in self._touched.items():
                view.put(key, encode(vm))
        self._view, self._touched = None, {}


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
        before = _position(store)
        if before is None:
            return store.recorder.live_first() - 1, []
        vms = read_projection(
            store.environment, NAME, lambda view: [decode(row) for _, row in view.items()]
        )
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


__all__ = ["NAME", "VmStates", "recall"]
