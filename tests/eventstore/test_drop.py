# SPDX-License-Identifier: AGPL-3.0-or-later
"""A log's beginning that has been moved away, its tree, and its topic index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from eventsourcing.persistence import IntegrityError, InternalError, ProgrammingError, StoredEvent

from eventstore import (
    LMDBAggregateRecorder,
    LMDBApplicationRecorder,
    LMDBEnvironment,
    operations,
    records,
    topics,
)
from eventstore.merkle import Frontier, leaf_hash
from eventstore.tree import Head

if TYPE_CHECKING:
    from eventstore.environment import Transaction

COUNT = 600


def fill(recorder: LMDBAggregateRecorder, count: int = COUNT) -> list[StoredEvent]:
    events = [
        StoredEvent(f"a{nid % 7}", nid, "rare" if nid % 50 == 3 else f"t{nid % 3}", b"%d" % nid)
        for nid in range(1, count + 1)
    ]
    for first in range(0, count, 37):
        recorder.insert_events(events[first : first + 37])
    return events


def head(recorder: LMDBAggregateRecorder) -> Head:
    tree = recorder.tree
    assert tree is not None
    return recorder.environment.read(tree.head)


def expected_root(events: Sequence[StoredEvent]) -> bytes:
    frontier = Frontier()
    frontier.extend(
        leaf_hash(
            records.canonical_record(
                nid,
                records.originator_key(event.originator_id),
                event.originator_version,
                event.topic,
                event.state,
            )
        )
        for nid, event in enumerate(events, start=1)
    )
    return frontier.root()


def dropped(recorder: LMDBApplicationRecorder, through: int, limit: int) -> int:
    return recorder.environment.commit_one(recorder.prepare_drop(through, limit))


def test_what_is_dropped_is_gone_at_once_and_deleted_in_steps(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        recorder = LMDBApplicationRecorder(opened, "app", tree=True)
        fill(recorder)
        before = head(recorder)
        counts = []
        while count := dropped(recorder, 500, 200):
            counts.append(count)
            # The same after every step: the floor is what counts.
            assert recorder.first_nid() == 501
            assert [n.id for n in recorder.select_notifications(None, 2)] == [501, 502]
            assert [n.id for n in recorder.select_notifications(9, 9, stop=501)] == [501]
            assert [n.id for n in recorder.select_notifications(9, 9, topics=["rare"])] == [
                503,
                553,
            ]
            assert [e.originator_version for e in recorder.select_events("a1")][:2] == [505, 512]
            assert recorder.select_events("a1", lte=500, desc=True) == []
            assert recorder.verify() == 100
        assert counts == [200, 200, 100]
        assert head(recorder) == before
        # A lower floor later changes nothing.
        assert dropped(recorder, 3, 10) == 0
        assert recorder.first_nid() == 501
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        again = LMDBApplicationRecorder(opened, "app", tree=True)
        assert again.insert_events([StoredEvent("a1", 1000, "t", b"")]) == [COUNT + 1]
        with pytest.raises(IntegrityError):
            again.insert_events([StoredEvent("a1", 505, "t", b"")])
        assert head(again).size == COUNT + 1


def test_a_crash_between_the_steps_costs_nothing(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        recorder = LMDBApplicationRecorder(opened, "app")
        fill(recorder, 60)
        assert dropped(recorder, 50, 20) == 20
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        again = LMDBApplicationRecorder(opened, "app")
        assert dropped(again, 0, 100) == 30
        assert dropped(again, 0, 100) == 0
        assert again.verify() == 10


def test_the_last_event_and_its_number_stay(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app", tree=True)
    for through in (1, 2):
        with pytest.raises(ProgrammingError, match="cannot be dropped"):
            dropped(recorder, through, 10)
    fill(recorder, 5)
    with pytest.raises(ProgrammingError, match="ends at 5"):
        dropped(recorder, 5, 10)
    for through, limit in ((-1, 1), (1, 0)):
        with pytest.raises(ProgrammingError):
            recorder.prepare_drop(through, limit)
    assert dropped(recorder, 4, 10) == 4
    log = environment.database("events/app/events/log")
    environment.write(lambda txn: txn.drop(log, delete=False))
    # Were even the last row gone, no number would be given twice.
    assert recorder.max_notification_id() == 4


def test_a_damaged_floor_is_not_believed(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app")
    fill(recorder, 5)
    dropped(recorder, 2, 1)
    rows = environment.database("events/app/events/topics")
    environment.write(lambda txn: txn.put(b"floor", bytes(16), db=rows))
    with pytest.raises(InternalError, match="damaged"):
        recorder.select_notifications(1, 1)
    with pytest.raises(InternalError, match="damaged"):
        recorder.select_events("a1")


def test_the_tree_covers_every_event_of_every_call(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app", tree=True)
    events = fill(recorder)
    assert head(recorder) == (COUNT, expected_root(events))
    # A refused call leaves none either.
    with pytest.raises(IntegrityError):
        recorder.insert_events([StoredEvent("new", 1, "t", b""), events[0]])
    assert head(recorder) == (COUNT, expected_root(events))
    leaves = environment.read(lambda txn: recorder.leaf_hashes(txn, 257, 256))
    frontier = Frontier()
    tree = recorder.tree
    assert tree is not None
    frontier.extend(leaves)
    assert frontier.root() == environment.read(lambda txn: tree.node(txn, 8, 1, _no_leaves))
    with pytest.raises(InternalError, match="not all there"):
        environment.read(lambda txn: recorder.leaf_hashes(txn, COUNT, 2))


def _no_leaves(first: int, count: int) -> Sequence[bytes]:
    raise AssertionError(f"leaves {first}, {count} are not needed")


def test_a_log_that_was_begun_without_them_gets_tree_and_topic_index(
    environment: LMDBEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_CATCH_UP_EVENTS", 100)
    plain = LMDBAggregateRecorder(environment, "app")
    events = fill(plain, 300)
    assert plain.tree is None
    recorder = LMDBApplicationRecorder(environment, "app", tree=True)
    assert [n.id for n in recorder.select_notifications(1, 2, topics=["rare"])] == [3, 53]
    more = [StoredEvent("b", 1, "rare", b"")]
    recorder.insert_events(more)
    assert head(recorder) == (301, expected_root(events + more))
    # Who knew nothing of them keeps them too.
    last = [StoredEvent("b", 2, "rare", b"")]
    plain.insert_events(last)
    assert head(recorder) == (302, expected_root(events + more + last))
    assert [n.id for n in recorder.select_notifications(300, 9, topics=["rare"])] == [301, 302]
    assert recorder.verify() == 302


def test_a_tree_that_has_more_than_the_log_is_not_written_to(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app", tree=True)
    fill(recorder, 5)
    tree = recorder.tree
    assert tree is not None
    environment.write(lambda txn: tree.extend(txn, 6, [bytes(32)]))
    with pytest.raises(InternalError, match="does not follow"):
        recorder.insert_events([StoredEvent("b", 1, "t", b"")])
    assert recorder.max_notification_id() == 5


def test_the_topic_index_gives_the_same_as_reading_all(environment: LMDBEnvironment) -> None:
    indexed = LMDBApplicationRecorder(environment, "indexed")
    plain = LMDBApplicationRecorder(environment, "plain", topic_index=False)
    fill(indexed)
    fill(plain)
    for wanted in (["rare"], ["t1"], ["t0", "rare", "none"], ["none"]):
        for low in (1, 3, 4, 255, 256, 257, 599, 601):
            for limit, stop in ((3, None), (1000, 400), (1000, None)):
                assert indexed.select_notifications(
                    low, limit, stop, wanted
                ) == plain.select_notifications(low, limit, stop, wanted)


def test_a_damaged_topic_index_is_found(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app")
    fill(recorder, 60)
    database = environment.database("events/app/events/by-topic")
    rows = environment.read(lambda txn: list(txn.cursor(database)))

    def put(txn: Transaction, key: bytes, value: bytes | None) -> None:
        if value is None:
            txn.delete(key, db=database)
        else:
            txn.put(key, value, db=database)

    rare = next(key for key, value in rows if topics._bitmap(key, value) >> 3 & 1)
    value = dict(rows)[rare]
    for damaged in (value[:-1] + b"\x01", value[:-1], value + b"\0"):
        environment.write(lambda txn, row=damaged: put(txn, rare, row))  # type: ignore[misc]
        with pytest.raises(InternalError, match="topic index row"):
            recorder.select_notifications(1, 9, topics=["rare"])
        with pytest.raises(InternalError, match="topic index row"):
            recorder.verify()
    # A whole row that lies: only with a look at the records can these be found.
    for bits, error in ((1 << 4, "does not have the topic"), (1 << 99, "event 99 is missing")):
        row = topics._sealed(rare, bits)
        environment.write(lambda txn, row=row: put(txn, rare, row))  # type: ignore[misc]
        with pytest.raises(InternalError, match=error):
            recorder.select_notifications(1, 9, topics=["rare"])
    environment.write(lambda txn: put(txn, rare, None))
    with pytest.raises(InternalError, match="event 3 is missing from the topic index"):
        recorder.verify()
    environment.write(lambda txn: put(txn, rare, value))
    assert recorder.verify() == 60
    more = topics._KEY.pack(9, 0)
    environment.write(lambda txn: put(txn, more, topics._sealed(more, 2)))
    with pytest.raises(InternalError, match="the topic index has 61 entries for 60 events"):
        recorder.verify()


def test_an_index_that_hides_an_event_is_found(environment: LMDBEnvironment) -> None:
    recorder = LMDBApplicationRecorder(environment, "app")
    fill(recorder, 10)
    index = environment.database("events/app/events/index", dupsort=True)
    key = records.originator_key("a3")
    environment.write(lambda txn: txn.put(key, records.pack_entry(99, 3), db=index))
    with pytest.raises(InternalError, match="the index has 11 entries for 10 events"):
        recorder.verify()
    environment.write(lambda txn: txn.delete(key, db=index))
    with pytest.raises(InternalError, match="event 3 is missing from the index"):
        recorder.verify()


def test_the_canonical_record_is_the_documented_one() -> None:
    # Fixed for ever: every root that has left this machine depends on it.
    text = records.canonical_record(7, records.originator_key("id"), 2, "topic", b"state")
    assert text.hex() == (
        "010000000000000007000000000000000200050005000000050100026964746f7069637374617465"
    )
