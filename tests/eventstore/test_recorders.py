# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

import pytest
from eventsourcing.persistence import (
    DataError,
    IntegrityError,
    InternalError,
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    StoredEvent,
    Tracking,
)
from eventsourcing.popo import POPOApplicationRecorder
from hypothesis import given, settings
from hypothesis import strategies as st

from eventstore import (
    Journal,
    LMDBAggregateRecorder,
    LMDBApplicationRecorder,
    LMDBEnvironment,
    records,
    topics,
)

if TYPE_CHECKING:
    from eventstore.environment import Database, Transaction

A = UUID(int=1)
# Each text begins another; as UUID and as text of it they are different aggregates.
IDS: list[UUID | str] = ["a", "aa", "a\0", "ab", "é", UUID(int=1), UUID(int=1 << 120)]
BOUND = st.none() | st.integers(-2, 12) | st.just(1 << 70)
LIMIT = st.none() | st.integers(1, 6)
BATCHES = st.lists(
    st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(["t1", "t2", "t3"])), max_size=6),
    max_size=6,
)


def event(
    originator_id: UUID | str = A, version: int = 1, topic: str = "topic", state: bytes = b"state"
) -> StoredEvent:
    return StoredEvent(originator_id, version, topic, state)


@pytest.fixture
def recorder(environment: LMDBEnvironment) -> LMDBApplicationRecorder:
    return LMDBApplicationRecorder(environment, "app")


@pytest.fixture(scope="module")
def shared_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LMDBEnvironment]:
    with LMDBEnvironment.open(tmp_path_factory.mktemp("model") / "events") as opened:
        yield opened


def drop(database: Database, txn: Transaction) -> None:
    txn.drop(database, delete=False)


def emptied(environment: LMDBEnvironment) -> LMDBApplicationRecorder:
    for part in ("log", "index", "topics", "by-topic"):
        database = environment.database(f"events/model/events/{part}", dupsort=part == "index")
        environment.write(partial(drop, database))
    return LMDBApplicationRecorder(environment, "model")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batches=BATCHES,
    gaps=st.lists(st.integers(1, 3), min_size=36, max_size=36),
    bounds=st.tuples(BOUND, BOUND, LIMIT),
    desc=st.booleans(),
    page=st.tuples(
        BOUND, st.integers(1, 8), BOUND, st.sets(st.sampled_from(["t1", "t2", "other"]))
    ),
    inclusive=st.booleans(),
)
def test_selections_are_those_of_the_librarys_own_recorder(
    *,
    shared_environment: LMDBEnvironment,
    batches: list[list[tuple[UUID | str, str]]],
    gaps: list[int],
    bounds: tuple[int | None, int | None, int | None],
    desc: bool,
    page: tuple[int | None, int, int | None, set[str]],
    inclusive: bool,
) -> None:
    model = POPOApplicationRecorder()
    recorder = emptied(shared_environment)
    steps = iter(gaps)
    versions: dict[UUID | str, int] = {}
    for batch in batches:
        events = []
        for originator_id, topic in batch:
            versions[originator_id] = versions.get(originator_id, -1) + next(steps)
            state = f"{originator_id}/{versions[originator_id]}".encode()
            events.append(event(originator_id, versions[originator_id], topic, state))
        assert recorder.insert_events(events) == model.insert_events(events)
    gt, lte, limit = bounds
    for originator_id in IDS:
        selected = recorder.select_events(originator_id, gt=gt, lte=lte, desc=desc, limit=limit)
        assert selected == model.select_events(
            originator_id, gt=gt, lte=lte, desc=desc, limit=limit
        )
        assert all(type(e.originator_id) is type(originator_id) for e in selected)
    start, limit, stop, topics = page
    assert recorder.select_notifications(
        start, limit, stop, list(topics), inclusive_of_start=inclusive
    ) == model.select_notifications(start, limit, stop, list(topics), inclusive_of_start=inclusive)
    assert recorder.max_notification_id() == model.max_notification_id()


def test_a_uuid_and_its_text_are_different_aggregates(recorder: LMDBApplicationRecorder) -> None:
    recorder.insert_events([event(A, 1), event(str(A), 1, state=b"text")])
    assert [e.state for e in recorder.select_events(A)] == [b"state"]
    assert [n.originator_id for n in recorder.select_notifications(1, 9)] == [A, str(A)]


@pytest.mark.parametrize(
    "conflict",
    [
        [event(version=2), event(version=1)],
        [event(version=2), event("x", 1), event(version=2)],
        [event("x", 1, topic="new topic"), event(version=1)],
    ],
)
def test_a_conflict_anywhere_in_a_call_leaves_nothing_of_it(
    recorder: LMDBApplicationRecorder, conflict: list[StoredEvent]
) -> None:
    recorder.insert_events([event(version=1)])
    with pytest.raises(IntegrityError):
        recorder.insert_events(conflict)
    assert recorder.max_notification_id() == 1
    assert recorder.select_events(A, gt=1) == []
    assert recorder.select_events("x") == []
    # The topic number of the refused call is free again, and goes to another topic.
    recorder.insert_events([event(version=2, topic="other topic")])
    again = LMDBApplicationRecorder(recorder.environment, "app")
    assert [n.topic for n in again.select_notifications(1, 9)] == ["topic", "other topic"]


def test_versions_may_have_gaps_and_fill_them_later(recorder: LMDBApplicationRecorder) -> None:
    for version in (5, 0, 3):
        recorder.insert_events([event(version=version)])
    assert [e.originator_version for e in recorder.select_events(A)] == [0, 3, 5]


@pytest.mark.parametrize(
    "bad",
    [
        event(version=-1),
        event(version=1 << 63),
        event(""),
        event("i" * 401),
        event("\ud800"),
        event(topic=""),
        event(topic="t" * 1025),
        event(topic="\ud800"),
        event(state=bytes((16 << 20) + 1)),
        event(state="text"),  # type: ignore[arg-type]
        event(b"bytes"),  # type: ignore[arg-type]
    ],
)
def test_an_event_out_of_bounds_is_refused_with_its_whole_call(
    recorder: LMDBApplicationRecorder, bad: StoredEvent
) -> None:
    with pytest.raises(DataError):
        recorder.insert_events([event("good"), bad])
    assert recorder.max_notification_id() is None
    assert recorder.select_events("good") == []


def test_the_largest_event_comes_back(recorder: LMDBApplicationRecorder) -> None:
    largest = event("i" * 400, (1 << 63) - 1, "t" * 1024, bytes(16 << 20))
    recorder.insert_events([largest])
    assert recorder.select_events("i" * 400, desc=True, limit=1) == [largest]
    assert recorder.select_events("i" * 400, lte=(1 << 63) - 2, desc=True) == []


def test_a_limit_of_nothing_selects_nothing(recorder: LMDBApplicationRecorder) -> None:
    recorder.insert_events([event()])
    assert recorder.select_events(A, limit=0) == []
    assert recorder.select_notifications(None, 0) == []


def test_tracking_is_refused_rather_than_dropped(recorder: LMDBApplicationRecorder) -> None:
    with pytest.raises(NotSupportedError, match="tracking"):
        recorder.insert_events([event()], tracking=Tracking("upstream", 1))
    assert recorder.max_notification_id() is None


def test_applications_and_purposes_are_apart(environment: LMDBEnvironment) -> None:
    logs = [
        LMDBApplicationRecorder(environment, "app"),
        LMDBApplicationRecorder(environment, "app2"),
        LMDBApplicationRecorder(environment, "app", "snapshots"),
    ]
    for number, log in enumerate(logs):
        assert log.insert_events([event(topic=f"topic {number}")]) == [1]
    assert [log.select_events(A)[0].topic for log in logs] == ["topic 0", "topic 1", "topic 2"]
    for bad in ("a/b", "n" * 101):
        with pytest.raises(ProgrammingError, match="slash"):
            LMDBApplicationRecorder(environment, bad)


def test_recorders_of_one_log_learn_each_others_topics(environment: LMDBEnvironment) -> None:
    first = LMDBApplicationRecorder(environment, "app")
    second = LMDBApplicationRecorder(environment, "app")
    first.insert_events([event(version=1, topic="t1")])
    second.insert_events([event(version=2, topic="t2"), event(version=3, topic="t1")])
    first.insert_events([event(version=4, topic="t3"), event(version=5, topic="t2")])
    for log in (first, second, LMDBApplicationRecorder(environment, "app")):
        assert [e.topic for e in log.select_events(A)] == ["t1", "t2", "t1", "t3", "t2"]


def test_topics_are_bounded(
    recorder: LMDBApplicationRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topics, "TOPICS_MAX", 1)
    recorder.insert_events([event(version=1)])
    with pytest.raises(OperationalError, match="topics"):
        recorder.insert_events([event(version=2, topic="one more")])
    recorder.insert_events([event(version=2)])


def test_a_log_that_was_not_to_be_made_is_found_once_it_is(environment: LMDBEnvironment) -> None:
    waiting = LMDBAggregateRecorder(environment, "app", create=False)
    with pytest.raises(OperationalError, match="has no"):
        waiting.select_events(A)
    LMDBAggregateRecorder(environment, "app").insert_events([event()])
    assert waiting.select_events(A) == [event()]


def overwrite(recorder: LMDBApplicationRecorder, part: str, key: bytes, value: bytes) -> None:
    database = recorder.environment.database(f"events/app/events/{part}")
    recorder.environment.write(lambda txn: txn.put(key, value, db=database))


def stored(recorder: LMDBApplicationRecorder, part: str, key: bytes) -> bytes:
    database = recorder.environment.database(f"events/app/events/{part}")
    value = recorder.environment.read(lambda txn: txn.get(key, db=database))
    assert value is not None
    return value


def test_a_flipped_bit_anywhere_in_a_record_is_found_and_named(
    recorder: LMDBApplicationRecorder,
) -> None:
    recorder.insert_events([event(version=1), event("text id", 1), event(version=2)])
    record = stored(recorder, "log", records.pack_u64(2))
    for position in range(len(record)):
        damaged = bytearray(record)
        damaged[position] ^= 0x10
        overwrite(recorder, "log", records.pack_u64(2), bytes(damaged))
        with pytest.raises(InternalError, match="event 2 is damaged"):
            recorder.select_notifications(1, 10)
        with pytest.raises(InternalError, match="event 2 is damaged"):
            recorder.select_notifications(1, 10, topics=["topic"])
        with pytest.raises(InternalError, match="event 2 is damaged"):
            recorder.select_events("text id")
    for length in range(len(record)):
        overwrite(recorder, "log", records.pack_u64(2), record[:length])
        with pytest.raises(InternalError, match="event 2 is damaged"):
            recorder.select_notifications(2, 1)
    # The other aggregate is not taken down.
    assert len(recorder.select_events(A)) == 2


def test_a_whole_record_in_anothers_place_is_found(recorder: LMDBApplicationRecorder) -> None:
    recorder.insert_events([event(version=1), event(version=2)])
    overwrite(recorder, "log", records.pack_u64(2), stored(recorder, "log", records.pack_u64(1)))
    with pytest.raises(InternalError, match="event 2 is damaged"):
        recorder.select_events(A)


def test_a_record_missing_from_the_log_is_found(recorder: LMDBApplicationRecorder) -> None:
    recorder.insert_events([event(version=version) for version in (1, 2, 3)])
    log = recorder.environment.database("events/app/events/log")
    recorder.environment.write(lambda txn: txn.delete(records.pack_u64(2), db=log))
    with pytest.raises(InternalError, match="event 2 is missing"):
        recorder.select_notifications(1, 10)
    with pytest.raises(InternalError, match="event 2 is missing"):
        recorder.select_notifications(2, 10)
    with pytest.raises(InternalError, match="event 2 is missing"):
        recorder.select_events(A)


def test_an_index_that_names_the_wrong_record_is_found(recorder: LMDBApplicationRecorder) -> None:
    recorder.insert_events([event("a", 1), event("b", 1)])
    index = recorder.environment.database("events/app/events/index", dupsort=True)
    key = records.originator_key("a")

    def put(entry: bytes, txn: Transaction) -> None:
        txn.put(key, entry, db=index)

    def delete(entry: bytes, txn: Transaction) -> None:
        txn.delete(key, entry, db=index)

    for entry in (records.pack_entry(2, 2), records.pack_entry(2, 1), b"short"):
        recorder.environment.write(partial(put, entry))
        with pytest.raises(InternalError, match=r"not the one that the index|damaged index"):
            recorder.select_events("a")
        recorder.environment.write(partial(delete, entry))
    assert recorder.select_events("a") == [event("a", 1)]


def test_a_damaged_or_missing_topic_is_found(recorder: LMDBApplicationRecorder) -> None:
    recorder.insert_events([event()])
    number = bytes(4)
    row = stored(recorder, "topics", number)
    overwrite(recorder, "topics", number, row[:-1] + b"k")
    with pytest.raises(InternalError, match="topic 00000000 is damaged"):
        LMDBApplicationRecorder(recorder.environment, "app").select_events(A)
    topics = recorder.environment.database("events/app/events/topics")
    recorder.environment.write(lambda txn: txn.delete(number, db=topics))
    with pytest.raises(InternalError, match="event 1 has topic number 0"):
        LMDBApplicationRecorder(recorder.environment, "app").select_events(A)


def resealed(record: bytes, head: bytes) -> bytes:
    """A record with another head and the checksum for it, under notification id 1."""
    body = record[len(head) + 8 :]
    return head + records._check(records.pack_u64(1), head, body) + body


def test_records_of_a_later_version_are_refused_by_that_name() -> None:
    record = records.encode_record(1, 0, 1, records.originator_key(A), b"state")
    head = record[:14]
    for later in (b"\x02" + head[1:], head[:1] + b"\x02" + head[2:]):
        with pytest.raises(NotSupportedError, match="event 1 was written by a later version"):
            records.decode_record(1, resealed(record, later))
    # A text id longer than the record: a writer's fault that no checksum can see.
    with pytest.raises(InternalError, match="cut off"):
        records.decode_record(1, resealed(record[:22] + b"\xff\xff", head[:1] + b"\x01" + head[2:]))


def test_the_layout_is_the_documented_one() -> None:
    # Stored for ever: a change of layout must fail here.
    text = records.encode_record(7, 3, 2, records.originator_key("id"), b"state")
    assert text[:14].hex() == "0101" + "00000003" + "0000000000000002"
    assert text[14:22].hex() == "20bf32ccbd0411b8"
    assert text[22:] == b"\x00\x02idstate"
    uuid = uuid5(UUID(int=0), "layout")
    plain = records.encode_record(1, 0, 0, records.originator_key(uuid), b"")
    assert plain[:2] == b"\x01\x00"
    assert plain[14:22].hex() == "e8bb534ba07a14d8"
    assert plain[22:] == uuid.bytes
    assert records.decode_record(7, text) == (3, 2, b"\x01\x00\x02id", b"state")


def test_the_journal_and_the_events_share_an_environment(tmp_path: Path) -> None:
    with LMDBEnvironment.open(tmp_path / "events") as opened:
        LMDBApplicationRecorder(opened, "work").insert_events([event()])
        Journal(opened, "work").put("k", b"v")
        assert LMDBApplicationRecorder(opened, "work").select_events(A) == [event()]
