# SPDX-License-Identifier: AGPL-3.0-or-later
"""The map grows under readers and writers of this process and of others, and nobody notices."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
import trio
from eventsourcing.persistence import OperationalError, StoredEvent
from trio.testing import wait_all_tasks_blocked

from eventstore import LMDBApplicationRecorder, LMDBEnvironment
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]
MAP_SIZE = 1 << 18


def events(name: str, version: int, size: int = 2000) -> list[StoredEvent]:
    return [StoredEvent(name, version, "topic", b"s" * size)]


def size_of(opened: LMDBEnvironment) -> int:
    return opened._shared.map_size


def test_a_request_larger_than_several_doublings_succeeds(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events", map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened)
        assert recorder.insert_events(events("a", 1, 3 << 20)) == [1]
        assert size_of(opened) == 4 << 20
        assert len(recorder.select_events("a")[0].state) == 3 << 20


async def test_growing_waits_for_readers_and_lets_none_in_meanwhile(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events", map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened)
        recorder.insert_events(events("a", 1))
        begun, proceed = trio.Event(), trio.Event()
        order: list[str] = []

        def read_slowly() -> None:
            def look(txn: lmdb.Transaction[bytes]) -> None:
                trio.from_thread.run_sync(begun.set)
                trio.from_thread.run(proceed.wait)
                # Still valid: the map did not change under it.
                assert txn.stat()["entries"]
                order.append("first reader")

            opened.read(look)

        def write() -> None:
            recorder.insert_events(events("a", 2, 1 << 20))
            order.append("writer")

        def read_late() -> None:
            assert opened.read(lambda _: size_of(opened)) > MAP_SIZE
            order.append("late reader")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read_slowly)
            await begun.wait()
            nursery.start_soon(trio.to_thread.run_sync, write)
            while not opened._shared.growing:
                await trio.lowlevel.checkpoint()
            nursery.start_soon(trio.to_thread.run_sync, read_late)
            await wait_all_tasks_blocked()
            assert order == []
            proceed.set()
        assert order[0] == "first reader"
        assert sorted(order[1:]) == ["late reader", "writer"]


async def test_many_writers_and_readers_grow_it_together(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events", map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened, tree=True)

        def write(name: str) -> None:
            for version in range(10):
                recorder.insert_events(events(name, version, 8000))

        def read() -> None:
            for _ in range(50):
                assert all(len(n.state) == 8000 for n in recorder.select_notifications(1, 100))

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(trio.to_thread.run_sync, write, f"w{number}")
                nursery.start_soon(trio.to_thread.run_sync, read)
        assert recorder.verify() == 60
        assert size_of(opened) >= 1 << 20


def test_a_thread_that_would_wait_for_itself_is_refused(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events", map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened)
        with pytest.raises(OperationalError, match="MDB_MAP_FULL"):
            opened.read(lambda _: recorder.insert_events(events("a", 1, 1 << 20)))
        assert recorder.insert_events(events("a", 1, 1 << 20)) == [1]


def test_no_address_space_is_a_clear_error_and_the_store_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with LMDBEnvironment.open(tmp_path / "events", map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened)
        with monkeypatch.context() as patch:
            patch.setattr(mmap, "mmap", refuse)
            with pytest.raises(OperationalError, match="no address space for 524288 bytes"):
                recorder.insert_events(events("a", 1, 1 << 20))
        assert recorder.max_notification_id() is None
        assert recorder.insert_events(events("a", 1, 1 << 20)) == [1]


OTHER = """
import sys
from eventstore import LMDBApplicationRecorder, LMDBEnvironment
from tests.eventstore.test_growth import events
with LMDBEnvironment.open(sys.argv[1], map_size=1 << 18, readonly=sys.argv[2] == "read") as opened:
    recorder = LMDBApplicationRecorder(opened, tree=True)
    for line in sys.stdin:
        if sys.argv[2] == "write":
            recorder.insert_events(events("other", int(line), 8000))
        print(recorder.max_notification_id(), len(recorder.select_notifications(1, 1000)), flush=True)
"""


@pytest.mark.parametrize("what", ["read", "write"])
def test_another_process_follows_a_map_that_grows(tmp_path: Path, what: str) -> None:
    path = os.fspath(tmp_path / "events")
    with LMDBEnvironment.open(path, map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened, tree=True)
        recorder.insert_events(events("a", 0))
        with subprocess.Popen(
            [sys.executable, "-c", OTHER, path, what],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            count = 1
            # In turns, so that each finds that the other one has made the map larger.
            for version in range(1, 40):
                recorder.insert_events(events("a", version, 16_000))
                child.stdin.write(f"{version}\n")
                child.stdin.flush()
                count += 2 if what == "write" else 1
                assert child.stdout.readline().split() == [str(count), str(count)]
                assert recorder.max_notification_id() == count
            child.stdin.close()
            assert child.wait(HANG_S) == 0
        assert recorder.verify() == count
        assert size_of(opened) >= 1 << 20


def test_two_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "events")
    with LMDBEnvironment.open(path, map_size=MAP_SIZE) as opened:
        recorder = LMDBApplicationRecorder(opened, tree=True)
        with subprocess.Popen(
            [sys.executable, "-c", OTHER, path, "write"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("0\n")
            child.stdin.flush()
            assert child.stdout.readline()
            # It is running now, and takes these while we write ours.
            child.stdin.write("".join(f"{n}\n" for n in range(1, 60)))
            child.stdin.close()
            for version in range(60):
                recorder.insert_events(events("a", version, 8000))
            assert len(child.stdout.readlines()) == 59
            assert child.wait(HANG_S) == 0
        assert recorder.verify() == 120
