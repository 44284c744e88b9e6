# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lmdb
import pytest
import trio
from eventsourcing.persistence import (
    DataError,
    InterfaceError,
    InternalError,
    OperationalError,
    PersistenceError,
    ProgrammingError,
    StoredEvent,
)

from eventstore import Journal, LMDBApplicationRecorder, LMDBEnvironment, mapping, shared
from eventstore.errors import library_error
from eventstore.mapping import MAX_DATABASES
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=HANG_S,
        check=True,
    )
    return child.stdout.decode()


def test_handles_share_one_environment_until_the_last_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "events"
    first = LMDBEnvironment.open(path)
    (tmp_path / "alias").symlink_to(path)
    second = LMDBEnvironment.open(tmp_path / "alias")
    assert second.path == first.path
    Journal(first, "a").put("k", b"v")
    first.close()
    first.close()
    assert Journal(second, "a").get("k") == b"v"
    with pytest.raises(InterfaceError, match="closed"):
        first.read(lambda txn: txn.id())
    second.close()
    with pytest.raises(InterfaceError, match="closed"):
        second.write(lambda txn: txn.id())
    # LMDB itself allows this only if the environment is really closed.
    lmdb.Environment(os.fspath(path), max_dbs=2).close()
    with LMDBEnvironment.open(path) as third:
        assert Journal(third, "a").get("k") == b"v"


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with LMDBEnvironment.open(path):
        assert path.stat().st_mode & 0o777 == 0o700
        assert {entry.name: entry.stat().st_mode & 0o777 for entry in path.iterdir()} == {
            "data.mdb": 0o600,
            "lock.mdb": 0o600,
        }


def test_a_path_that_cannot_be_opened_is_an_operational_error(tmp_path: Path) -> None:
    with pytest.raises(OperationalError, match="No such file"):
        LMDBEnvironment.open(tmp_path / "missing" / "events")
    (tmp_path / "file").touch()
    with pytest.raises(OperationalError, match="File exists"):
        LMDBEnvironment.open(tmp_path / "file")


def test_a_file_that_is_not_lmdb_is_an_internal_error(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"\xff" * 16384)
    with pytest.raises(InternalError, match="not an LMDB file"):
        LMDBEnvironment.open(tmp_path)


@pytest.mark.parametrize(("map_size", "max_readers"), [(100, 126), (1 << 50, 126), (None, 0)])
def test_sizes_out_of_bounds_are_refused_before_anything_is_made(
    tmp_path: Path, map_size: int | None, max_readers: int
) -> None:
    with pytest.raises(ProgrammingError, match="is not within"):
        LMDBEnvironment.open(tmp_path / "events", map_size=map_size, max_readers=max_readers)
    assert not (tmp_path / "events").exists()


LIMITED = """
import resource, sys
from eventsourcing.persistence import OperationalError
from eventstore import Journal, LMDBEnvironment
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
try:
    LMDBEnvironment.open(sys.argv[1], map_size=1 << 40)
except OperationalError as error:
    print(error)
with LMDBEnvironment.open(sys.argv[1]) as opened:
    Journal(opened, "a").put("k", b"v")
    print(opened._shared.lmdb.info()["map_size"])
"""


def test_a_limited_address_space_gets_a_smaller_reserve_unless_a_size_was_asked_for(
    tmp_path: Path,
) -> None:
    refusal, size = run_python(LIMITED, os.fspath(tmp_path / "events")).splitlines()
    assert "Cannot allocate memory" in refusal
    assert 1 << 26 <= int(size) < 8 << 30


def test_use_in_a_forked_child_is_refused(environment: LMDBEnvironment) -> None:
    journal = Journal(environment, "a")
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        refusals = 0
        for use in (
            lambda: environment.read(lambda txn: txn.id()),
            lambda: environment.write(lambda txn: txn.id()),
            lambda: journal.put("k", b"child"),
            lambda: LMDBEnvironment.open(environment.path),
        ):
            try:
                use()
            except InterfaceError:
                refusals += 1
        environment.close()
        os._exit(refusals)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    journal.put("k", b"parent")
    assert journal.get("k") == b"parent"


READER = """
import sys
from eventsourcing.persistence import OperationalError, ProgrammingError
from eventstore import Journal, LMDBApplicationRecorder, LMDBEnvironment
from tests.limits import HANG_S
with LMDBEnvironment.open(sys.argv[1], readonly=True) as opened:
    print(Journal(opened, "a").get("k"))
    print(LMDBApplicationRecorder(opened, "app").max_notification_id())
    for refused in (
        lambda: Journal(opened, "a").put("k", b"w"),
        lambda: opened.write(lambda txn: txn.id()),
    ):
        try:
            refused()
        except ProgrammingError as error:
            print("read-only" in str(error))
    try:
        LMDBApplicationRecorder(opened, "nobody").select_notifications(None, 1)
    except OperationalError as error:
        print("has no" in str(error))
"""


def test_another_process_reads_while_the_writer_has_it_open(environment: LMDBEnvironment) -> None:
    Journal(environment, "a").put("k", b"v")
    LMDBApplicationRecorder(environment, "app").insert_events([StoredEvent("i", 1, "t", b"")])
    assert run_python(READER, environment.path).splitlines() == ["b'v'", "1"] + ["True"] * 3


def test_reading_where_there_is_nothing_is_a_clear_error_and_makes_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "events", tmp_path):
        with pytest.raises(OperationalError, match="there is no event store"):
            LMDBEnvironment.open(path, readonly=True)
    (tmp_path / "data.mdb").touch()
    with pytest.raises(OperationalError, match="there is no event store"):
        LMDBEnvironment.open(tmp_path, readonly=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.mdb"]


def test_read_only_and_writing_handles_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "events"
    with LMDBEnvironment.open(path) as writer:
        Journal(writer, "a").put("k", b"v")
        with LMDBEnvironment.open(path, readonly=True) as reader:
            assert Journal(reader, "a").get("k") == b"v"
            with pytest.raises(ProgrammingError, match="read-only"):
                Journal(reader, "a").put("k", b"w")
            with pytest.raises(OperationalError, match="has no"):
                Journal(reader, "never made").items()
    with (
        LMDBEnvironment.open(path, readonly=True),
        pytest.raises(InterfaceError, match="read-only in this process"),
    ):
        LMDBEnvironment.open(path)


def test_a_write_inside_a_write_and_a_close_inside_a_transaction_are_refused(
    environment: LMDBEnvironment,
) -> None:
    with pytest.raises(ProgrammingError, match="inside another"):
        environment.write(lambda _: environment.write(lambda txn: txn.id()))
    with pytest.raises(InterfaceError, match="inside a transaction"):
        environment.read(lambda _: environment.close())
    with pytest.raises(ProgrammingError, match="before the transaction"):
        environment.write(lambda _: environment.database("late"))
    # None of them did harm, and a read inside a write sees what is committed.
    database = environment.database("d")
    environment.write(lambda txn: txn.put(b"k", b"old", db=database))

    def write(txn: lmdb.Transaction[bytes]) -> bytes | None:
        txn.put(b"k", b"new", db=database)
        return environment.read(lambda reader: reader.get(b"k", db=database))

    assert environment.write(write) == b"old"
    assert environment.read(lambda txn: txn.get(b"k", db=database)) == b"new"


async def test_close_waits_for_the_transactions_of_other_threads(tmp_path: Path) -> None:
    opened = LMDBEnvironment.open(tmp_path / "events")
    journal = Journal(opened, "a")
    database = opened.database("journal/a")
    begun, proceed = trio.Event(), trio.Event()
    order: list[str] = []

    def read_slowly() -> None:
        def look(txn: object) -> None:
            assert isinstance(txn, lmdb.Transaction)
            trio.from_thread.run_sync(begun.set)
            trio.from_thread.run(proceed.wait)
            order.append(str(txn.get(b"k", db=database) is not None))

        opened.read(look)

    def close() -> None:
        opened.close()
        order.append("closed")

    journal.put("k", b"v")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, read_slowly)
        await begun.wait()
        nursery.start_soon(trio.to_thread.run_sync, close)
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        proceed.set()
    assert order == ["True", "closed"]


async def test_writers_in_threads_take_turns(environment: LMDBEnvironment) -> None:
    database = environment.database("counter")

    def increment() -> None:
        def add(txn: lmdb.Transaction[bytes]) -> None:
            number = int(txn.get(b"n", b"0", db=database))
            txn.put(b"n", b"%d" % (number + 1), db=database)

        for _ in range(5):
            environment.write(add)

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(trio.to_thread.run_sync, increment)
    assert environment.read(lambda txn: txn.get(b"n", db=database)) == b"40"


def test_too_many_databases_are_an_operational_error(environment: LMDBEnvironment) -> None:
    for number in range(MAX_DATABASES):
        environment.database(f"d{number}")
    with pytest.raises(OperationalError, match="DBS_FULL"):
        environment.database("one more")


def test_lmdb_errors_inside_a_transaction_arrive_as_the_librarys(
    environment: LMDBEnvironment,
) -> None:
    with pytest.raises(DataError):
        environment.write(lambda txn: txn.put(b"k" * 600, b"v"))
    kept = environment.read(lambda txn: txn)
    with pytest.raises(InterfaceError, match="closed"):
        environment.read(lambda _: kept.get(b"k"))
    # What the function itself raises is not ours to rename.
    with pytest.raises(FileNotFoundError):
        environment.read(lambda _: Path("/nonexistent/file").read_bytes())


class FileSystemError(lmdb.Error):
    """Stands for a plain `lmdb.Error` that carries an errno."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lmdb.MapFullError, OperationalError),
        (lmdb.MapResizedError, OperationalError),
        (lmdb.ReadersFullError, OperationalError),
        (lmdb.DiskError, OperationalError),
        (lmdb.LockError, OperationalError),
        (lmdb.BadValsizeError, DataError),
        (lmdb.CorruptedError, InternalError),
        (lmdb.VersionMismatchError, InternalError),
        (lmdb.InvalidError, InternalError),
        (lmdb.PanicError, InternalError),
        (lmdb.ReadonlyError, ProgrammingError),
        (FileSystemError, OperationalError),
        (lmdb.Error, InterfaceError),
        (lmdb.KeyExistsError, PersistenceError),
    ],
)
def test_the_library_class_of_each_lmdb_error(
    error: type[lmdb.Error], expected: type[PersistenceError]
) -> None:
    made = error("what")
    if error is FileSystemError:
        made = lmdb.Error("what")
        made.__dict__["code"] = errno.EIO
    mapped = library_error(made, "/path")
    assert type(mapped) is expected
    assert "/path" in str(mapped)


def test_a_handle_that_the_collector_closes_in_the_middle_of_an_open_is_closed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The collector may run at any allocation, so also where this thread holds the registry's lock.
    forgotten = LMDBEnvironment.open(tmp_path / "forgotten")
    closed = LMDBEnvironment.open(tmp_path / "forgotten")
    closed.close()
    open_lmdb = mapping._open_lmdb

    def collect_then_open(*args: Any, **kwargs: Any) -> lmdb.Environment:
        closed.close()
        forgotten.close()
        assert forgotten.read(lambda _: "still open") == "still open"
        return open_lmdb(*args, **kwargs)

    monkeypatch.setattr(mapping, "_open_lmdb", collect_then_open)
    with LMDBEnvironment.open(tmp_path / "other"):
        with pytest.raises(InterfaceError, match="is closed"):
            forgotten.read(lambda _: None)
        monkeypatch.undo()
        with LMDBEnvironment.open(tmp_path / "forgotten") as again:
            assert again.read(lambda _: "open again") == "open again"


def test_a_handle_that_the_collector_closes_in_the_middle_of_anything_waits_for_its_end(
    tmp_path: Path,
) -> None:
    # Were it closed at once, this thread would wait for locks that the other one holds, which waits
    # for what this thread holds.
    opened = LMDBEnvironment.open(tmp_path / "events")
    forgotten = LMDBEnvironment.open(tmp_path / "forgotten")
    again = LMDBEnvironment.open(tmp_path / "events")

    def in_transaction(_: object) -> str:
        again.close()
        assert again.read(lambda _: "open") == "open"
        return forgotten.read(lambda _: "still open")

    with opened._shared.guard:
        forgotten.close()
        assert forgotten.read(lambda _: "still open") == "still open"
    assert opened.read(in_transaction) == "still open"
    for handle in (forgotten, again):
        with pytest.raises(InterfaceError, match="is closed"):
            handle.read(lambda _: None)
    assert os.path.realpath(tmp_path / "forgotten") not in shared.registry.shared
    opened.close()


async def test_two_threads_that_forget_handles_of_each_others_stores_do_not_wait_for_each_other(
    tmp_path: Path,
) -> None:
    first = LMDBEnvironment.open(tmp_path / "first")
    second = LMDBEnvironment.open(tmp_path / "second")
    both = [trio.Event(), trio.Event()]

    def use(own: LMDBEnvironment, other: LMDBEnvironment, place: int) -> None:
        def collect(_: object) -> None:
            trio.from_thread.run_sync(both[place].set)
            trio.from_thread.run(both[1 - place].wait)
            # The other store is in the middle of a transaction, as this one is.
            other.close()

        own.read(collect)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.to_thread.run_sync, use, first, LMDBEnvironment.open(second.path), 0
        )
        nursery.start_soon(
            trio.to_thread.run_sync, use, second, LMDBEnvironment.open(first.path), 1
        )
    first.close()
    second.close()
    assert not {first.path, second.path} & shared.registry.shared.keys()


def test_the_id_of_the_last_transaction_moves_with_every_commit_and_nothing_else(
    environment: LMDBEnvironment,
) -> None:
    before = environment.last_transaction()
    environment.read(lambda txn: txn.id())
    environment.write(lambda _: None)
    assert environment.last_transaction() == before
    environment.write(lambda txn: txn.put(b"k", b"v"))
    assert environment.last_transaction() == before + 1


def test_a_database_is_opened_beside_a_writer_and_not_inside_a_transaction(
    environment: LMDBEnvironment,
) -> None:
    # The binding's own way to open one holds the interpreter's lock while it waits for the writer.
    child = """
import sys, threading
from eventstore import LMDBEnvironment
opened = LMDBEnvironment.open(sys.argv[1])
writing, go = threading.Event(), threading.Event()
def write(txn):
    writing.set()
    go.wait()
thread = threading.Thread(target=opened.write, args=(write,))
thread.start()
writing.wait()
threading.Timer(0, go.set).start()
print(opened.find_database("nothing"))
thread.join()
"""
    assert run_python(child, environment.path) == "None\n"
    for transaction in (environment.read, environment.write):
        with pytest.raises(ProgrammingError, match="before the transaction"):
            transaction(lambda _: environment.database("late"))
