# SPDX-License-Identifier: AGPL-3.0-or-later
"""The two sides of a trial, each run in a process of its own, and what must hold in each when it is done."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import msgspec
import trio

from eventstore import environment
from receiver.service import sessions
from receiver.store.layout import expected_files
from receiver.store.verify import verify_point
from receiver.store.vm_store import VmStore
from replicator import durable
from replicator.domain.model import Point, file_stem
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError
from replicator.imagemap import ImageMap
from replicator.log import EventLog, event_log
from replicator.push import connection, journal, patience, sender, spool
from replicator.push.plan import Want
from replicator.sources import image
from replicator.wire import messages as m
from tests.crash.scenario import RETAINED, Layout, Phase, read_points
from tests.sites import ReceiverSite, SourceSite, receiver_site, source_site

#: What a log is made of while nothing is sealed.
LOG_FILES = ("data.mdb", "lock.mdb", "log.key")


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a trial plays: ``folder`` has both sides' state; points that the template lacked read as ``pushed``."""

    folder: Path
    layout: Layout
    pushed: Phase

    def images(self, number: int) -> dict[str, Path]:
        """What a point must read as, by disk."""
        return self.layout.disks(read_points(self.folder).get(number, self.pushed))


class Kill:
    """Counts the durable steps of this process and kills it before the n-th; says which one that was."""

    def __init__(self, at: int, note: Path) -> None:
        self._at = at
        self._note = note
        self._steps = itertools.count(1)

    def install(self) -> None:
        """From here on steps count."""
        durable.observe = self.step
        environment.observe_commit = self.step

    def step(self, step: str, path: str) -> None:
        """One durable step, in any thread."""
        if next(self._steps) == self._at:
            self.now(f"{step} {path}")

    def now(self, what: str) -> None:
        """End this process as a crash does."""
        self._note.write_text(what)
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def remove() -> None:
        """Steps from here on are the test's own."""
        durable.observe = lambda _step, _path: None
        environment.observe_commit = lambda _step, _path: None


def shrink_limits(clones: bool) -> None:
    """Bring acknowledgements, messages and flushes down to the size of these disks; no pause before a new try.

    ``clones``: whether images can be cloned, as on XFS; elsewhere they are read in place, whatever this machine can do.
    """
    sessions.ACK_BYTES = 192 << 10
    # A record of 16 grains and what is not acknowledged yet must fit.
    connection.UNACKED_MAX = (1 << 20) + (448 << 10)
    sender._MESSAGE_TARGET = 128 << 10
    _replace(sender, "DATA_MAX", 128 << 10)
    spool._FLUSH = 256
    # What is kept beside the log has crash tests of its own, and would make steps come in any order.
    _replace(event_log, "PROJECTIONS", ())
    _replace(patience, "pause_s", lambda *_: 0.0)

    def clone(target: int, _request: int, source: int) -> None:
        if not clones:
            raise OSError(errno.EOPNOTSUPP, "no clones here")
        os.copy_file_range(source, target, os.fstat(source).st_size)

    _replace(image, "fcntl", SimpleNamespace(ioctl=clone))


def _replace(where: object, name: str, value: object) -> None:
    """Set what is there already: a name that is gone would mean that nothing is replaced any more."""
    assert hasattr(where, name)
    setattr(where, name, value)


def watch_acks(on_ack: Callable[[], None]) -> list[list[int]]:
    """Call ``on_ack`` after each; the list gets where every session's streams began.

    What was acknowledged in one session is there in the next, as far as this side can go on from there: else the
    receiver lost what it called durable.
    """
    begun: list[list[int]] = []
    acked: dict[str, tuple[int, ...]] = {}
    pushing = ""
    begin, ask = connection.Connection.begin, connection.Connection.ask
    take_ack = connection.Connection._take_ack

    async def checked_ask(self: connection.Connection, message: Any, *want: Any) -> Any:
        nonlocal pushing
        answer = await ask(self, message, *want)
        if isinstance(answer, m.Ready):
            pushing = message.push_id
            had = acked.get(pushing, (0,) * len(message.disks))
            for disk, position, at in zip(message.disks, answer.positions, had, strict=True):
                assert position >= min(disk.have, at), (
                    f"{at} of {disk} was acknowledged and is gone"
                )
        return answer

    def noted_begin(self: connection.Connection, positions: tuple[int, ...], chunk: int) -> None:
        begun.append(list(positions))
        begin(self, positions, chunk)

    def noted_ack(self: connection.Connection, ack: Any) -> None:
        take_ack(self, ack)
        acked[pushing] = self.acked
        on_ack()

    for function, name in ((checked_ask, "ask"), (noted_begin, "begin"), (noted_ack, "_take_ack")):
        _replace(connection.Connection, name, function)
    return begun


# What both sides report


def commit_of(point: Point) -> list[Any]:
    """A committed point as the trial compares it."""
    return [point.number, point.push_id, point.root.hex()]


async def commits(log: EventLog, vm: UUID) -> list[list[Any]]:
    """Every commit event of the log, in order."""
    events = await log.history(vm)
    kinds = (ProtectedVm.SeedCommitted, ProtectedVm.CycleCommitted)
    return [commit_of(msgspec.convert(e.point, Point)) for e in events if isinstance(e, kinds)]


async def abandoned(log: EventLog, vm: UUID) -> list[str]:
    """The pushes that were given up."""
    events = await log.history(vm)
    return [e.push_id for e in events if isinstance(e, ProtectedVm.PushAbandoned)]


async def check_fold(log: EventLog, vm: UUID) -> None:
    """Folding the log from empty gives what this process shows; the log holds no damage."""
    folded: Any = None
    for event in await log.history(vm):
        assert not isinstance(event, ProtectedVm.PointDamaged), vars(event)
        folded = event.mutate(folded)
    shown = log.get(vm)
    assert shown is not None
    assert not shown.pending_events
    assert vars(folded) == vars(shown)


async def journal_entries(log: EventLog) -> list[str]:
    """Keys of what is not settled."""
    entries = await trio.to_thread.run_sync(log.store.journal.items)
    return [key for key, _ in entries]


def files_below(folder: Path) -> set[Path]:
    """Every file; an empty folder that nobody needs shows as itself."""
    return {path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())}


# The receiver


async def run_receiver(
    stage: Stage, listener: socket.socket, end: int, apply: str
) -> dict[str, Any]:
    """Serve until ``end`` is readable and all is settled; then check and report."""
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
    state = stage.folder / "receiver"
    retained = str(RETAINED)
    restarted = durable.observe is durable._nothing
    started: list[list[Any]] = []
    async with receiver_site(
        state, listeners=listeners, dr_restore_points=retained, push_apply_remote=apply
    ) as site:
        if restarted and site.stores.all:
            started = await commits(site.log, site.store.uuid)
            await check_contents(site, stage)
        await trio.lowlevel.wait_readable(end)
        store = await site.settled()
        Kill.remove()
        assert store.trouble is None
        assert await journal_entries(site.log) == []
        check_receiver_files(store, state)
        await check_contents(site, stage)
        for number in store.vm.points:
            result = await verify_point(store, number)
            assert result.good, result
            assert result.map_faults == []
        await check_fold(site.log, store.uuid)
        assert len(store.vm.points) <= RETAINED
        assert store.vm.applied == (max if apply == "yes" else min)(store.vm.points)
        return {"started": started, "commits": await commits(site.log, store.uuid)}


async def check_contents(site: ReceiverSite, stage: Stage) -> None:
    """Every point reads back byte for byte, also those that retention is about to let go of, if it has not begun to."""
    for number in sorted(site.store.vm.points):
        surplus = sorted(site.store.vm.points)[:-RETAINED]
        try:
            async with site.store.hold(number) as point:
                images = stage.images(number)
                assert [disk.disk for disk in point.disks] == list(images)
                for name, path in images.items():
                    same = await site.read(number, name) == path.read_bytes()
                    assert same, f"point {number}, {name}: not what was pushed"
        except RefusedError:
            assert number in surplus or number not in site.store.vm.points


def check_receiver_files(store: VmStore, state_dir: Path) -> None:
    """The state directory holds what the log says, and nothing else."""
    must, _ = expected_files(store.vm, store.paths)
    events = {state_dir / "events" / name for name in LOG_FILES}
    # A point's folder may be empty: the newest one's, once it is applied.
    own = {*store.paths.folders, *map(store.paths.point, store.vm.points)}
    found, wanted = files_below(state_dir) - own, must | events
    assert found == wanted, f"left over: {found - wanted}, missing: {wanted - found}"


# The source


async def run_source(stage: Stage, port: int, on_ack: Callable[[], None]) -> dict[str, Any]:
    """Push the images of a phase once; then check and report. ``on_ack`` is called after each acknowledgement."""
    begun = watch_acks(on_ack)
    disks = stage.layout.disks(stage.pushed)
    async with source_site(stage.folder / "source", port, disks) as site:
        before = site.log.vms[0].newest if site.log.vms else None
        entry = await journal.load(site.log, site.log.vms[0].vm) if site.log.vms else None
        # A source without a log may be another host's: it goes on only when told to.
        fresh = all(vm.newest is None for vm in site.log.vms)
        told = Want.RESYNC if stage.pushed is Phase.RESYNC else Want.SEED
        outcome = await site.push(told if fresh else Want.RUN)
        Kill.remove()
        assert await journal_entries(site.log) == []
        check_source_files(site, outcome.point)
        await check_fold(site.log, site.uuid)
        return {
            "before": commit_of(before) if before is not None else None,
            "unsettled": entry.push_id if entry is not None and entry.disks is not None else None,
            "pushed": commit_of(outcome.point),
            "begun": begun,
            "abandoned": await abandoned(site.log, site.uuid),
            "commits": await commits(site.log, site.uuid),
        }


def check_source_files(site: SourceSite, newest: Point) -> None:
    """Maps of the newest point's disks, the log, and nothing else: no spool, no snapshot, no clone."""
    state = site.config.state_dir
    maps = {
        state / "maps" / str(site.uuid) / f"{file_stem(disk.disk, disk.since)}.map": disk
        for disk in newest.disks
    }
    events = {state / "events" / name for name in LOG_FILES}
    found, wanted = files_below(state), maps.keys() | events | {state / "work"}
    assert found == wanted, f"left over: {found - wanted}, missing: {wanted - found}"
    for path, disk in maps.items():
        with ImageMap.open(path) as known:
            assert (known.point, known.root()) == (newest.number, disk.root)
            assert list(known.check()) == []
