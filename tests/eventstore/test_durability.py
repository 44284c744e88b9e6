# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb.verify
import pytest
from eventsourcing.persistence import OperationalError, StoredEvent

from eventstore import Journal, LMDBApplicationRecorder, LMDBEnvironment, environment, mapping
from eventstore.mapping import StrPath
from tests.eventstore.crash_child import AGGREGATE, BATCH
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]


def run_child(path: Path, steps: int) -> list[list[str]]:
    child = subprocess.run(
        [sys.executable, "-m", "tests.eventstore.crash_child", os.fspath(path), str(steps)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=HANG_S,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL
    return [line.split() for line in child.stdout.decode().splitlines()]


def structural_faults(path: StrPath) -> list[str]:
    faults: list[str] = lmdb.verify.verify(os.fspath(path))  # type: ignore[no-untyped-call]
    return faults


def check_everything(path: Path, lines: list[list[str]]) -> int:
    """Nothing acknowledged is missing, nothing stored by halves; returns the number of events."""
    assert structural_faults(path) == []
    with LMDBEnvironment.open(path) as opened:
        recorder = LMDBApplicationRecorder(opened)
        notifications = recorder.select_notifications(None, 1000)
        count = len(notifications)
        assert [n.id for n in notifications] == list(range(1, count + 1))
        assert count % BATCH == 0
        assert [n.state for n in notifications] == [b"state %d" % n.id for n in notifications]
        assert [e.originator_version for e in recorder.select_events(AGGREGATE)] == [
            n.id for n in notifications
        ]
        acknowledged = [int(words[2]) for words in lines if words[0] == "stored"]
        assert count >= max(acknowledged, default=0)
        entries = dict(Journal(opened, "work").items())
        assert {words[1] for words in lines if words[0] == "journal"} <= entries.keys()
    return count


# Databases are made in 6 commits (12 steps), then events and journal entries take turns.
@pytest.mark.parametrize("steps", range(1, 19))
def test_kill_at_every_commit_step_loses_nothing_acknowledged(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "events"
    lines = run_child(path, steps)
    first = check_everything(path, lines)
    expected_step = "before-commit" if steps % 2 else "after-commit"
    assert lines[-1] == ["killed", expected_step]
    # Before its commit nothing of a batch is there; right after it, all is, acknowledged or not.
    assert first == BATCH * ((steps - 10) // 4 if steps >= 14 else 0)


def test_killed_again_and_again_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events"
    lines: list[list[str]] = []
    counts = []
    for steps in (15, 5, 6, 9):
        lines += run_child(path, steps)
        counts.append(check_everything(path, lines))
    # Only the first run has databases to make.
    assert counts == [3, 6, 12, 18]


def events(version: int, size: int) -> list[StoredEvent]:
    return [StoredEvent(AGGREGATE, version, "topic", b"s" * size)]


def fill(recorder: LMDBApplicationRecorder) -> int:
    """Insert until the store refuses; returns the number of acknowledged events."""
    for count in range(1000):
        try:
            recorder.insert_events(events(count, 2000))
        except OperationalError:
            return count
    raise AssertionError("the store never became full")


def check_after_refusal(path: str, acknowledged: int) -> None:
    with LMDBEnvironment.open(path) as opened:
        recorder = LMDBApplicationRecorder(opened)
        assert recorder.max_notification_id() == acknowledged
        assert len(recorder.select_events(AGGREGATE)) == acknowledged
        assert recorder.insert_events(events(acknowledged, 10)) == [acknowledged + 1]
    assert structural_faults(path) == []


def test_a_map_that_may_not_grow_is_a_clear_error_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "MAP_SIZE_BYTES_MAX", 1 << 18)
    path = os.fspath(tmp_path / "events")
    with LMDBEnvironment.open(path, map_size=1 << 17) as opened:
        recorder = LMDBApplicationRecorder(opened)
        acknowledged = fill(recorder)
        assert acknowledged > 10
        with pytest.raises(OperationalError, match="may not grow over 262144"):
            recorder.insert_events(events(acknowledged, 50_000))
        assert recorder.max_notification_id() == acknowledged
    monkeypatch.undo()
    check_after_refusal(path, acknowledged)


FULL_DISK = """
import resource, sys
from eventstore import LMDBApplicationRecorder, LMDBEnvironment
from tests.eventstore.test_durability import fill
from tests.limits import HANG_S
opened = LMDBEnvironment.open(sys.argv[1])
recorder = LMDBApplicationRecorder(opened)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
count = fill(recorder)
assert recorder.max_notification_id() == count
print(count)
"""


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    # A limit on the file's size stands in for the disk: the same failing write inside the commit.
    path = os.fspath(tmp_path / "events")
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=HANG_S,
        check=True,
    )
    acknowledged = int(child.stdout)
    assert acknowledged > 10
    check_after_refusal(path, acknowledged)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own; needs the right to mount, and fails without it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", os.fspath(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", os.fspath(folder)], check=True)


def test_on_a_full_disk_the_store_is_usable_again_once_there_is_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    with LMDBEnvironment.open(small_disk / "events") as opened:
        recorder = LMDBApplicationRecorder(opened, tree=True)
        acknowledged = fill(recorder)
        assert acknowledged > 100
        with pytest.raises(OperationalError, match="No space left"):
            recorder.insert_events(events(acknowledged, 100_000))
        assert recorder.verify() == acknowledged
        ballast.unlink()
        assert recorder.insert_events(events(acknowledged, 100_000)) == [acknowledged + 1]
        assert recorder.verify() == acknowledged + 1
    assert structural_faults(small_disk / "events") == []


READER = """
import os, signal, sys
from eventstore import LMDBEnvironment
def die(txn):
    print("reading", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
LMDBEnvironment.open(sys.argv[1], readonly=True).read(die)
"""


def test_a_reader_that_was_killed_keeps_pages_only_until_its_slot_is_cleared(
    tmp_path: Path,
) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        journal = Journal(opened, "work")

        def grown_by(commits: int) -> int:
            before = opened.read(lambda _: opened._shared.lmdb.info()["last_pgno"])
            for number in range(commits):
                journal.put("k", b"%d" % number * 500)
            last: int = opened.read(lambda _: opened._shared.lmdb.info()["last_pgno"])
            return last - before

        grown_by(20)
        assert opened.check_readers() == 0
        child = subprocess.run(
            [sys.executable, "-c", READER, opened.path],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            timeout=HANG_S,
            check=False,
        )
        assert child.returncode == -signal.SIGKILL
        assert grown_by(100) > 100
        assert opened.check_readers() == 1
        assert opened.check_readers() == 0
        assert grown_by(100) < 10


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    note: Callable[[str, str], None] = lambda step, path: seen.append((step, path))  # noqa: E731
    monkeypatch.setattr(environment, "observe_commit", note)
    return seen


def test_every_commit_is_observed_on_both_sides_and_reads_are_not(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        recorder = LMDBApplicationRecorder(opened)
        steps.clear()
        recorder.insert_events(events(1, 10))
        recorder.select_events(AGGREGATE)
        recorder.insert_events([])
        assert steps == [("before-commit", opened.path), ("after-commit", opened.path)]


def test_what_is_refused_is_not_observed_as_a_commit(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    def fail(_: object) -> None:
        raise KeyError("mine")

    with LMDBEnvironment.open(tmp_path / "events") as opened:
        with pytest.raises(KeyError, match="mine"):
            opened.write(fail)
        assert steps == []
        opened.write(lambda txn: txn.id())
        assert [step for step, _ in steps] == ["before-commit", "after-commit"]
