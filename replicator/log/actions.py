# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an operator asks of the log, as `replctl log` and the control socket show it. What takes a LogStore blocks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import UUID

from eventstore.segments import Segment, SegmentError, export_json_lines
from replicator import durable
from replicator.domain.model import stream_id
from replicator.domain.views import instant
from replicator.errors import DamageError, RefusedError, StateError
from replicator.log import past, periods, states
from replicator.log.archive import SegmentDamagedError
from replicator.log.event_log import EventLog
from replicator.log.periods import Period
from replicator.log.store import LogStore, find_vm

_COPY_BYTES = 1 << 20


async def seal(log: EventLog) -> dict[str, Any]:
    """Close the open period, if there is anything in it, and seal every closed one."""
    before = {period.number for period in log.periods if period.segment is not None}
    await log.close_period()
    await log.seal()
    # Also what the log's own task has sealed meanwhile.
    sealed = [p for p in log.periods if p.segment is not None and p.number not in before]
    return {"sealed": [_shown(log.store, period) for period in sealed]}


async def accept(log: EventLog, vm: str) -> dict[str, Any]:
    """Believe the other side's log again. Raises RefusedError."""
    found = log.find(vm)
    await log.accept_peer(UUID(found.vm))
    return {"vm": found.name}


def list_periods(store: LogStore) -> list[dict[str, Any]]:
    """All periods, oldest first."""
    return [_shown(store, period) for period in periods.load(store.periods)]


def _shown(store: LogStore, period: Period) -> dict[str, Any]:
    path = store.archive.path(period)
    sealed = period.segment is not None
    there = sealed and path.exists()
    return {
        "number": period.number,
        "label": period.label,
        "opened_at": instant(period.opened_at_us),
        "first": period.first,
        "last": period.last or store.head(),
        "state": _state(store, period, there=there),
        "file": path.name if sealed else None,
        "bytes": path.stat().st_size if there else None,
    }


def _state(store: LogStore, period: Period, *, there: bool) -> str:
    if period.segment is None:
        return "closed" if period.last else "open"
    if there:
        return "sealed"
    return "away" if store.archive.moved(period).exists() else "missing"


def find(store: LogStore, name: str) -> Period:
    """The sealed period that an operator calls so: its file, its label or its number. Raises RefusedError."""
    sealed = store.archive.sealed()
    for period in sealed:
        if name in (store.archive.path(period).name, period.label, str(period.number)):
            return period
    have = ", ".join(period.label for period in sealed) or "none"
    raise RefusedError(f"no sealed segment {name!r} here (sealed: {have})")


def export(store: LogStore, name: str, target: Path, *, move: bool) -> dict[str, Any]:
    """Copy a segment to a new file, or write it as JSON lines; verified first. Raises RefusedError if the file exists."""
    period = find(store, name)
    path = store.archive.path(period)
    if target.exists():
        raise RefusedError(f"{target} exists already")
    with store.archive.open(period) as segment, _new_file(target) as file:
        segment.verify()
        if segment.info.root != store.root_at(period.last):
            raise DamageError(f"{path.name} is not what this log sealed")
        if target.suffix == ".jsonl":
            export_json_lines(segment, file, mapper=store.mapper)
        else:
            _copy(path, file)
    if move:
        with Segment.open(target) as copied:
            copied.verify()
        _mark(store.archive.moved(period), target)
        durable.unlink(path)
    return _shown(store, period)


def _mark(mark: Path, target: Path) -> None:
    """Write down, durably, that a segment is away on purpose, before it goes."""
    try:
        durable.write_file(mark, f"{target}\n".encode())
    except OSError as error:
        raise StateError(f"{mark}: {error.strerror or error}") from error


@contextmanager
def _new_file(target: Path) -> Iterator[BinaryIO]:
    """A file that is named so, durably, when all is in it; after an error nothing is left of it. Raises StateError."""
    # A name of its own: two at once, or one that was killed, are in nobody's way.
    partial = target.with_name(f".{target.name}.{os.getpid()}.building")
    try:
        with partial.open("xb") as file:
            partial.chmod(0o600)  # as the log itself: for its owner only
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.rename(partial, target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        durable.sync_dir(target.parent)
    except OSError as error:
        where = partial if isinstance(error, FileExistsError) else target
        raise StateError(f"{where}: {error.strerror or error}") from error


def _copy(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as reader:
        while piece := reader.read(_COPY_BYTES):
            target.write(piece)


def bring_back(store: LogStore, source: Path) -> dict[str, Any]:
    """Put a segment back where it belongs, verified against the log's own tree. Raises RefusedError, DamageError."""
    with _given(source) as segment:
        info = segment.info
        period = next(
            (p for p in store.archive.sealed() if (p.first, p.last) == (info.first, info.last)),
            None,
        )
        if period is None:
            raise RefusedError(
                f"this log has sealed no segment of events {info.first} to {info.last}"
            )
        path = store.archive.path(period)
        if path.exists() and _is_good(store, period):
            raise RefusedError(f"{path.name} is here already, and good")
        segment.verify()
        if info.root != store.root_at(period.last):
            raise DamageError(f"{source} is not what this log sealed as {path.name}")
    with _alone(store.archive.folder, path.name):
        with _new_file(path) as file:
            _copy(source, file)
            file.flush()
            with Segment.open(file.name) as copied:
                copied.verify()
                if copied.info.root != info.root:
                    raise DamageError(f"{source} has changed while it was read")
        store.archive.moved(period).unlink(missing_ok=True)
    return _shown(store, period)


@contextmanager
def _given(path: Path) -> Iterator[Segment]:
    """A segment from elsewhere. Raises DamageError."""
    try:
        with Segment.open(path) as segment:
            yield segment
    except SegmentError as error:
        raise DamageError(f"{path}: {error}") from error


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Be the only import into this folder, rid of what imports that were cut have left. Raises RefusedError, StateError."""
    try:
        durable.make_dir(folder)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror or error}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.glob(f".{name}.*.building"):
            left.unlink()
        yield
    except BlockingIOError as error:
        raise RefusedError("another import is under way") from error
    finally:
        os.close(fd)


def _is_good(store: LogStore, period: Period) -> bool:
    """Whether the segment that is there is what this log sealed."""
    try:
        with store.archive.open(period) as segment:
            segment.verify()
            return bool(segment.info.root == store.root_at(period.last))
    except SegmentDamagedError:
        return False


def number_of(store: LogStore, name: str, event: int) -> int:
    """The number in the log of a VM's event. Raises RefusedError."""
    vm = find_vm(states.recall(store).values(), name)
    uuid = UUID(vm.vm)
    found, _ = past.page(store, uuid, past.Wanted(limit=1, after=event - 1))
    if found and found[0].originator_version == event:
        stream = found[0].originator_id
        (period,) = [p for p in periods.load(store.periods) if stream_id(uuid, p.number) == stream]
        for note in store.notifications(period.first, period.last or None):
            if (note.originator_id, note.originator_version) == (stream, event):
                return note.id
    raise RefusedError(f"VM {vm.name} has no event {event}")


__all__ = ["accept", "bring_back", "export", "find", "list_periods", "number_of", "seal"]
