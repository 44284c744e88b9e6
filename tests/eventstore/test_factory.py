# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest
import trio
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import (
    InfrastructureFactory,
    InfrastructureFactoryError,
    InterfaceError,
    OperationalError,
    ProgrammingError,
)
from eventsourcing.popo import POPOTrackingRecorder
from eventsourcing.utils import Environment, get_topic

from eventstore import (
    LMDBAggregateRecorder,
    LMDBApplicationRecorder,
    LMDBFactory,
    LMDBProcessRecorder,
    LMDBTrackingRecorder,
)


class Counter(Aggregate):
    def __init__(self) -> None:
        self.number = 0

    @event("Counted")
    def count(self) -> None:
        self.number += 1


class Counters(Application[UUID]):
    pass


class OtherCounters(Application[UUID]):
    pass


class OwnRecorder(LMDBApplicationRecorder):
    pass


def variables(path: Path, **more: str) -> dict[str, str]:
    return {"PERSISTENCE_MODULE": "eventstore", "LMDB_PATH": os.fspath(path), **more}


def make_factory(path: Path, **more: str) -> InfrastructureFactory[LMDBTrackingRecorder]:
    made = InfrastructureFactory[LMDBTrackingRecorder].construct(
        Environment("app", variables(path, **more))
    )
    assert isinstance(made, LMDBFactory)
    return made


async def test_an_application_in_a_trio_program(tmp_path: Path) -> None:
    """The way in which the program uses it: every call in a worker thread, one for writes."""
    writes = trio.CapacityLimiter(1)
    path = tmp_path / "events"

    def create() -> UUID:
        counter = Counter()
        counter.count()
        with Counters(env=variables(path)) as application:
            application.save(counter)
        application.close()
        return counter.id

    def load(counter_id: UUID) -> Counter:
        application = Counters(env=variables(path))
        try:
            return application.repository.get(counter_id)
        finally:
            application.close()

    counter_id = await trio.to_thread.run_sync(create, limiter=writes)
    counter = await trio.to_thread.run_sync(load, counter_id)
    assert counter.number == 1


def test_applications_share_a_path_and_not_a_log(tmp_path: Path) -> None:
    path = tmp_path / "events"
    first = Counters(env=variables(path))
    second = OtherCounters(env=variables(path))
    assert [r.notification.id for r in first.save(Counter(), Counter())] == [1, 2]
    assert [r.notification.id for r in second.save(Counter())] == [1]
    first.close()
    assert len(second.recorder.select_notifications(None, 9)) == 1
    second.close()
    with pytest.raises(InterfaceError, match="closed"):
        second.recorder.max_notification_id()


def test_a_snapshot_is_stored_apart_and_used(tmp_path: Path) -> None:
    application = Counters(env=variables(tmp_path / "events", IS_SNAPSHOTTING_ENABLED="y"))
    counter = Counter()
    counter.count()
    application.save(counter)
    application.take_snapshot(counter.id)
    assert application.snapshots is not None
    assert len(list(application.snapshots.get(counter.id))) == 1
    assert application.recorder.max_notification_id() == 2
    loaded: Counter = application.repository.get(counter.id)
    assert loaded.number == 1
    application.close()


def test_a_reader_beside_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "events"
    application = Counters(env=variables(path))
    counter = Counter()
    application.save(counter)
    reader = Counters(env=variables(path, LMDB_READONLY="yes"))
    loaded: Counter = reader.repository.get(counter.id)
    assert loaded.id == counter.id
    with pytest.raises(ProgrammingError, match="read-only"):
        reader.save(Counter())
    reader.close()
    application.close()


@pytest.mark.parametrize(
    "more",
    [
        {"LMDB_PATH": ""},
        {"LMDB_MAP_SIZE": "-1"},
        {"LMDB_MAP_SIZE": "1e9"},
        {"LMDB_MAP_SIZE": "1"},
        {"LMDB_MAP_SIZE": "9" * 30},
        {"LMDB_MAX_READERS": "0"},
        {"LMDB_READONLY": "perhaps"},
    ],
)
def test_a_bad_variable_is_named_and_nothing_is_made(tmp_path: Path, more: dict[str, str]) -> None:
    with pytest.raises(InfrastructureFactoryError, match=r"LMDB"):
        make_factory(tmp_path / "events", **more)
    assert list(tmp_path.iterdir()) == []


def test_sizes_come_from_the_variables(tmp_path: Path) -> None:
    factory = make_factory(tmp_path / "events", APP_LMDB_MAP_SIZE="100000", LMDB_MAX_READERS="7")
    assert isinstance(factory, LMDBFactory)
    info = factory.environment._shared.lmdb.info()
    assert (info["map_size"], info["max_readers"]) == (102400, 7)
    factory.close()


def test_recorder_classes_come_from_the_variables_and_must_be_ours(tmp_path: Path) -> None:
    factory = make_factory(tmp_path / "events", APPLICATION_RECORDER_TOPIC=get_topic(OwnRecorder))
    assert type(factory.application_recorder()) is OwnRecorder
    assert type(factory.aggregate_recorder()) is LMDBAggregateRecorder
    assert type(factory.tracking_recorder()) is LMDBTrackingRecorder
    assert type(factory.process_recorder()) is LMDBProcessRecorder
    with pytest.raises(InfrastructureFactoryError, match="not an LMDBTrackingRecorder"):
        factory.tracking_recorder(POPOTrackingRecorder)  # type: ignore[arg-type]
    factory.close()
    wrong = make_factory(tmp_path / "events", APPLICATION_RECORDER_TOPIC=get_topic(Counter))
    with pytest.raises(InfrastructureFactoryError, match="not an LMDBApplicationRecorder"):
        wrong.application_recorder()
    wrong.close()


def test_an_events_log_has_a_tree_unless_told_otherwise_and_snapshots_have_none(
    tmp_path: Path,
) -> None:
    factory = make_factory(tmp_path / "with")
    for recorder in (factory.application_recorder(), factory.process_recorder()):
        assert isinstance(recorder, LMDBApplicationRecorder)
        assert recorder.tree is not None
    snapshots = factory.aggregate_recorder("snapshots")
    assert isinstance(snapshots, LMDBAggregateRecorder)
    assert snapshots.tree is None
    factory.close()
    without = make_factory(tmp_path / "without", LMDB_TREE="no")
    recorder = without.application_recorder()
    assert isinstance(recorder, LMDBApplicationRecorder)
    assert recorder.tree is None
    without.close()


def test_create_table_no_gives_a_recorder_that_makes_nothing(tmp_path: Path) -> None:
    factory = make_factory(tmp_path / "events", CREATE_TABLE="f")
    recorder = factory.application_recorder()
    with pytest.raises(OperationalError, match="has no"):
        recorder.max_notification_id()
    factory.close()
