# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations that share a transaction, and who is told of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import lmdb
import pytest
from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    StoredEvent,
    Tracking,
)

from eventstore import (
    Journal,
    LMDBApplicationRecorder,
    LMDBEnvironment,
    LMDBProcessRecorder,
    mapping,
)

if TYPE_CHECKING:
    from eventstore.environment import Transaction


def event(originator_id: str, version: int = 1, topic: str = "topic") -> StoredEvent:
    return StoredEvent(originator_id, version, topic, b"state")


class Step:
    """An operation that does what it is told to, and notes what it was asked."""

    def __init__(self, *, check: Exception | None = None, put: Exception | None = None) -> None:
        self.check_error = check
        self.put_error = put
        self.calls: list[str] = []

    def check(self, txn: Transaction) -> None:
        del txn
        self.calls.append("check")
        if self.check_error is not None:
            raise self.check_error

    def put(self, txn: Transaction) -> str:
        self.calls.append("put")
        txn.put(b"from a step that fails", b"", db=None)
        if self.put_error is not None:
            raise self.put_error
        txn.delete(b"from a step that fails", db=None)
        return "result"

    def committed(self) -> None:
        self.calls.append("committed")


def test_a_conflict_fails_only_its_own_operation(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app", tree=True)
    journal = Journal(environment, "work")
    recorder.insert_events([event("a")])
    before = environment.last_transaction()
    results = environment.commit(
        [
            recorder.prepare([event("b"), event("b", 2)]),
            recorder.prepare([event("c"), event("a")]),
            recorder.prepare([event("b", 2)]),
            recorder.prepare([event("d", topic="")]),
            journal.prepare_change({"k": b"v"}),
            recorder.prepare([event("c", topic="new topic")]),
            recorder.prepare([event("e", topic="new topic")]),
        ]
    )
    assert environment.last_transaction() == before + 1
    assert results[0] == [2, 3]
    assert isinstance(results[1], IntegrityError)
    # What those before it wrote is seen.
    assert isinstance(results[2], IntegrityError)
    assert isinstance(results[3], DataError)
    assert results[4:] == [None, [4], [5]]
    assert [n.originator_id for n in recorder.select_notifications(1, 9)] == list("abbce")
    again = LMDBApplicationRecorder(environment, "app")
    assert [n.id for n in again.select_notifications(1, 9, topics=["new topic"])] == [4, 5]
    assert journal.get("k") == b"v"
    assert recorder.verify() == 5


def test_one_that_fails_while_writing_leaves_nothing_and_the_others_are_run_again(
    environment: LMDBEnvironment,
) -> None:
    first, last, fails = Step(), Step(), Step(put=KeyError("mine"))
    refused = Step(check=ValueError("no"))
    results = environment.commit([first, refused, fails, last])
    assert (results[0], results[3]) == ("result", "result")
    assert isinstance(results[1], ValueError)
    assert isinstance(results[2], KeyError)
    assert first.calls == ["check", "put", "check", "put", "committed"]
    assert last.calls == ["check", "put", "committed"]
    assert fails.calls == ["check", "put"]
    assert environment.read(lambda txn: txn.get(b"from a step that fails")) is None


def test_lmdb_errors_of_an_operation_arrive_as_the_librarys(environment: LMDBEnvironment) -> None:
    class TooLong(Step):
        def check(self, txn: Transaction) -> None:
            del txn
            raise lmdb.BadValsizeError("as LMDB says it")

    results = environment.commit([TooLong(), Step()])
    assert isinstance(results[0], DataError)
    assert results[1] == "result"
    with pytest.raises(DataError):
        environment.commit_one(TooLong())


def test_if_all_fail_nothing_is_committed(environment: LMDBEnvironment) -> None:
    before = environment.last_transaction()
    told: list[str] = []
    environment.add_listener(lambda: told.append("commit"))
    for steps in ([], [Step(check=ValueError())], [Step(put=ValueError()), Step(check=KeyError())]):
        results = environment.commit(steps)
        assert [type(r) for r in results] == [type(s.check_error or s.put_error) for s in steps]
    assert environment.last_transaction() == before
    assert told == []


def test_a_map_that_may_not_grow_fails_the_commit_and_not_an_operation(
    environment: LMDBEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fills(Step):
        def put(self, txn: Transaction) -> str:
            del txn
            raise lmdb.MapFullError("full")

    monkeypatch.setattr(mapping, "MAP_SIZE_BYTES_MAX", 1 << 30)
    other = Step()
    with pytest.raises(OperationalError, match="may not grow"):
        environment.commit([other, Fills()])
    assert other.calls == ["check", "put"]


def test_a_read_only_handle_refuses_before_anything_is_run(environment: LMDBEnvironment) -> None:
    step = Step()
    with (
        LMDBEnvironment.open(environment.path, readonly=True) as reader,
        pytest.raises(ProgrammingError, match="read-only"),
    ):
        reader.commit([step])
    assert step.calls == []


def test_listeners_hear_of_every_commit_after_it_and_of_nothing_else(
    environment: LMDBEnvironment,
) -> None:
    database = environment.database("d")
    heard: list[Any] = []

    def listen() -> None:
        # Outside of the transaction: it can read what was committed.
        heard.append(environment.read(lambda txn: txn.get(b"k", db=database)))

    def fail(_: Transaction) -> None:
        raise KeyError

    environment.add_listener(listen)
    environment.add_listener(listen)
    environment.write(lambda txn: txn.put(b"k", b"1", db=database))
    with pytest.raises(KeyError):
        environment.write(fail)
    with LMDBEnvironment.open(environment.path) as other:
        other.write(lambda txn: txn.put(b"k", b"2", db=database))
    environment.remove_listener(listen)
    environment.remove_listener(listen)
    environment.write(lambda txn: txn.put(b"k", b"3", db=database))
    assert heard == [b"1", b"2"]


def test_what_a_listener_raises_is_shown_and_does_not_deny_the_commit(
    environment: LMDBEnvironment, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the loop has ended")

    told: list[str] = []
    environment.add_listener(fail)
    environment.add_listener(lambda: told.append("second"))
    assert environment.write(lambda _: "done") == "done"
    assert told == ["second"]
    assert [(r.levelno, r.exc_text is not None) for r in caplog.records] == [(logging.ERROR, True)]


def test_events_and_position_are_one_change(environment: LMDBEnvironment) -> None:
    recorder = LMDBProcessRecorder(environment, "app")
    assert recorder.insert_events([event("a")], tracking=Tracking("up", 5)) == [1]
    for stale in (5, 4):
        with pytest.raises(IntegrityError, match="not after event 5"):
            recorder.insert_events([event("b")], tracking=Tracking("up", stale))
    with pytest.raises(IntegrityError, match="stored already"):
        recorder.insert_events([event("a")], tracking=Tracking("up", 6))
    assert recorder.insert_events([], tracking=Tracking("up", 9)) == []
    assert (recorder.max_notification_id(), recorder.max_tracking_id("up")) == (1, 9)
    results = environment.commit(
        [
            recorder.prepare([event("c")], Tracking("up", 10)),
            recorder.prepare([event("d")], Tracking("up", 10)),
        ]
    )
    assert results[0] == [2]
    assert isinstance(results[1], IntegrityError)
