# SPDX-License-Identifier: AGPL-3.0-or-later
"""The library's own conformance classes: written by others, so an outside judge."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from unittest import TestCase, mock
from uuid import UUID, uuid4

import pytest
from eventsourcing.tests.application import ApplicationTestCase, ExampleApplicationTestCase
from eventsourcing.tests.persistence import (
    AggregateRecorderTestCase,
    ApplicationRecorderTestCase,
    NonInterleavingNotificationIDsBaseCase,
)

from eventstore import LMDBAggregateRecorder, LMDBApplicationRecorder, LMDBEnvironment


class InFreshEnvironment(TestCase):
    def setUp(self) -> None:
        super().setUp()
        folder = TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.environment = LMDBEnvironment.open(Path(folder.name) / "events")
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
        return LMDBApplicationRecorder(self.environment)


class TestApplicationRecorderText(WithTextIds, TestApplicationRecorder):
    pass


class TestNonInterleaving(InFreshEnvironment, NonInterleavingNotificationIDsBaseCase):
    def create_recorder(self) -> LMDBApplicationRecorder:
        return LMDBApplicationRecorder(self.environment)


class TestNonInterleavingText(WithTextIds, TestNonInterleaving):
    pass


class WithVariables(InFreshEnvironment):
    """The library's application tests read the process's variables and close nothing."""

    variables: ClassVar[dict[str, str]] = {"PERSISTENCE_MODULE": "eventstore"}

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


# Else the runner collects the abstract classes too.
del AggregateRecorderTestCase, ApplicationRecorderTestCase, NonInterleavingNotificationIDsBaseCase
del ApplicationTestCase, ExampleApplicationTestCase
