# SPDX-License-Identifier: AGPL-3.0-or-later
"""The library's own conformance classes: written by others, so an outside judge."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest import TestCase, mock
from uuid import UUID, uuid4

import pytest
from eventsourcing.persistence import Tracking
from eventsourcing.tests.application import ApplicationTestCase, ExampleApplicationTestCase
from eventsourcing.tests.persistence import (
    AggregateRecorderTestCase,
    ApplicationRecorderTestCase,
    InfrastructureFactoryTestCase,
    NonInterleavingNotificationIDsBaseCase,
    ProcessRecorderTestCase,
    TrackingRecorderTestCase,
)
from eventsourcing.tests.projection import (
    AggregateEventCountersProjectionTestCase,
    EventCountersView,
    EventCountersViewTestCase,
    EventSourcedProjectionTestCase,
)
from eventsourcing.utils import Environment

from eventstore import (
    LMDBAggregateRecorder,
    LMDBApplicationRecorder,
    LMDBEnvironment,
    LMDBFactory,
    LMDBProcessRecorder,
    LMDBTrackingRecorder,
)

# Small, so that the concurrency tests also exercise growth.
MAP_SIZE = 1 << 20


class InFreshEnvironment(TestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.environment = LMDBEnvironment.open(Path(folder.name) / "events", map_size=MAP_SIZE)
        self.addCleanup(self.environment.close)


class WithTextIds:
    def new_originator_id(self) -> UUID | str:
        return f"test-{uuid4()}"


class TestAggregateRecorder(InFreshEnvironment, AggregateRecorderTestCase):
    def create_recorder(self) -> LMDBAggregateRecorder:
        return LMDBAggregateRecorder(self.environment)


class TestAggregateRecorderText(WithTextIds, TestAggregateRecorder):
    pass


class TestApplicationRecorder(
    InFreshEnvironment, ApplicationRecorderTestCase[LMDBApplicationRecorder]
):
    def create_recorder(self) -> LMDBApplicationRecorder:
        return LMDBApplicationRecorder(self.environment, tree=True)

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


class TestApplicationRecorderText(WithTextIds, TestApplicationRecorder):
    pass


class TestTrackingRecorder(InFreshEnvironment, TrackingRecorderTestCase):
    def create_recorder(self) -> LMDBTrackingRecorder:
        return LMDBTrackingRecorder(self.environment)


class TestProcessRecorder(InFreshEnvironment, ProcessRecorderTestCase):
    def create_recorder(self) -> LMDBProcessRecorder:
        return LMDBProcessRecorder(self.environment, tree=True)


class TestProcessRecorderText(WithTextIds, TestProcessRecorder):
    pass


class TestNonInterleaving(InFreshEnvironment, NonInterleavingNotificationIDsBaseCase):
    def create_recorder(self) -> LMDBApplicationRecorder:
        return LMDBApplicationRecorder(self.environment, tree=True)


class View(LMDBTrackingRecorder):
    """What a factory makes when told to by topic."""


class TestFactory(InfrastructureFactoryTestCase[LMDBFactory]):
    def setUp(self) -> None:
        # Its base makes the factory from ``env``, so that comes first.
        folder = TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.env = Environment(
            "TestCase",
            {
                "PERSISTENCE_MODULE": "eventstore",
                "LMDB_PATH": os.path.join(folder.name, "events"),
                "LMDB_MAP_SIZE": str(MAP_SIZE),
            },
        )
        super().setUp()

    def expected_factory_class(self) -> type[LMDBFactory]:
        return LMDBFactory

    def expected_aggregate_recorder_class(self) -> type[LMDBAggregateRecorder]:
        return LMDBAggregateRecorder

    def expected_application_recorder_class(self) -> type[LMDBApplicationRecorder]:
        return LMDBApplicationRecorder

    def expected_tracking_recorder_class(self) -> type[LMDBTrackingRecorder]:
        return LMDBTrackingRecorder

    def tracking_recorder_subclass(self) -> type[LMDBTrackingRecorder]:
        return View

    def expected_process_recorder_class(self) -> type[LMDBProcessRecorder]:
        return LMDBProcessRecorder


class WithVariables(InFreshEnvironment):
    """The library's application tests read the process's variables and close nothing."""

    variables: ClassVar[dict[str, str]] = {
        "PERSISTENCE_MODULE": "eventstore",
        "LMDB_MAP_SIZE": str(MAP_SIZE),
    }

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.dict(os.environ, self.variables | {"LMDB_PATH": self.environment.path})
        patch.start()
        self.addCleanup(patch.stop)


class TestExampleApplication(WithVariables, ExampleApplicationTestCase):
    expected_factory_topic = "eventstore.factory:LMDBFactory"


# One of them records a deprecation warning itself, which a filter that raises would keep from it.
@pytest.mark.filterwarnings("always::DeprecationWarning")
class TestApplication(WithVariables, ApplicationTestCase):
    pass


class CountersView(LMDBTrackingRecorder, EventCountersView):
    """The view that the library's projection tests ask for, as a view over LMDB is written."""

    def __init__(self, environment: LMDBEnvironment, application: str = "", **more: Any) -> None:
        super().__init__(environment, application, **more)
        self._rows = environment.database(f"view/{application}/counters")

    def _get(self, key: bytes) -> int:
        return self.read(lambda txn: int(txn.get(key, b"0", db=self._rows)))

    def _increment(self, key: bytes, tracking: Tracking) -> None:
        self.write(
            lambda txn: txn.put(
                key, b"%d" % (int(txn.get(key, b"0", db=self._rows)) + 1), db=self._rows
            ),
            tracking,
        )

    def get_created_event_counter(self) -> int:
        return self._get(b"created")

    def get_subsequent_event_counter(self) -> int:
        return self._get(b"subsequent")

    def incr_created_event_counter(self, tracking: Tracking) -> None:
        self._increment(b"created", tracking)

    def incr_subsequent_event_counter(self, tracking: Tracking) -> None:
        self._increment(b"subsequent", tracking)


class TestEventCountersView(InFreshEnvironment, EventCountersViewTestCase):
    def construct_event_counters_view(self) -> EventCountersView:
        return CountersView(self.environment)


class TestAggregateEventCountersProjection(WithVariables, AggregateEventCountersProjectionTestCase):
    view_class = CountersView


class TestEventSourcedProjection(WithVariables, EventSourcedProjectionTestCase):
    pass


# Else the runner collects the abstract classes too.
del AggregateRecorderTestCase, ApplicationRecorderTestCase, NonInterleavingNotificationIDsBaseCase
del ApplicationTestCase, ExampleApplicationTestCase, InfrastructureFactoryTestCase
del TrackingRecorderTestCase, ProcessRecorderTestCase, EventCountersViewTestCase
del AggregateEventCountersProjectionTestCase, EventSourcedProjectionTestCase
