# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes the recorders of an `eventsourcing` application from its environment variables.

``PERSISTENCE_MODULE=eventstore`` selects it. Variables (each also with the application's name and
an underscore in front): ``LMDB_PATH``, the environment's directory; ``LMDB_MAP_SIZE``, bytes of
address space to begin with (default: 1 TiB is reserved; it grows); ``LMDB_MAX_READERS`` (default
126); ``LMDB_READONLY``, for a process beside the writer's; ``LMDB_VERIFY``, to look at every page
before the file is used; ``LMDB_TREE=no`` and
``LMDB_TOPIC_INDEX=no``, no Merkle tree over the events of application and process recorders, and no
index of them by topic; ``CREATE_TABLE=no``, not to make missing databases;
``APPLICATION_RECORDER_TOPIC``, ``TRACKING_RECORDER_TOPIC``, ``PROCESS_RECORDER_TOPIC``, other
classes, which must be subclasses.
"""

from __future__ import annotations

from typing import TypeVar

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    InfrastructureFactoryError,
    ProcessRecorder,
    ProgrammingError,
)
from eventsourcing.utils import Environment, EnvType, resolve_topic, strtobool

from eventstore.environment import LMDBEnvironment
from eventstore.mapping import MAX_READERS_DEFAULT
from eventstore.recorders import (
    LMDBAggregateRecorder,
    LMDBApplicationRecorder,
    LMDBProcessRecorder,
)
from eventstore.tracking import LMDBTrackingRecorder

T = TypeVar("T")


class LMDBFactory(InfrastructureFactory[LMDBTrackingRecorder]):
    """Factory of LMDB recorders. Constructing it opens the environment, `close` gives it up; both
    block.

    Applications of different names can share one path: each has its own log. Raises
    InfrastructureFactoryError for a missing or bad variable, and what `LMDBEnvironment.open`
    raises.
    """

    LMDB_PATH = "LMDB_PATH"
    LMDB_MAP_SIZE = "LMDB_MAP_SIZE"
    LMDB_MAX_READERS = "LMDB_MAX_READERS"
    LMDB_READONLY = "LMDB_READONLY"
    LMDB_VERIFY = "LMDB_VERIFY"
    LMDB_TREE = "LMDB_TREE"
    LMDB_TOPIC_INDEX = "LMDB_TOPIC_INDEX"
    CREATE_TABLE = "CREATE_TABLE"

    def __init__(self, env: Environment | EnvType | None) -> None:
        super().__init__(env)
        path = self.env.get(self.LMDB_PATH)
        if not path:
            keys = ", ".join(self.env.create_keys(self.LMDB_PATH))
            raise InfrastructureFactoryError(f"no path for the event store: set one of {keys}")
        max_readers = self._integer(self.LMDB_MAX_READERS)
        try:
            self.environment = LMDBEnvironment.open(
                path,
                map_size=self._integer(self.LMDB_MAP_SIZE),
                max_readers=MAX_READERS_DEFAULT if max_readers is None else max_readers,
                readonly=self._flag(self.LMDB_READONLY, default="no"),
                verify=self._flag(self.LMDB_VERIFY, default="no"),
            )
        except ProgrammingError as error:
            raise InfrastructureFactoryError(str(error)) from error

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        """A recorder of aggregate events (or snapshots: ``purpose``) of this application."""
        return LMDBAggregateRecorder(
            self.environment, self.env.name, purpose, create=self._create()
        )

    def application_recorder(self) -> ApplicationRecorder:
        """A recorder of this application's events and notifications."""
        recorder_class = self._class(self.APPLICATION_RECORDER_TOPIC, LMDBApplicationRecorder)
        return recorder_class(
            self.environment,
            self.env.name,
            create=self._create(),
            tree=self._flag(self.LMDB_TREE, default="yes"),
            topic_index=self._flag(self.LMDB_TOPIC_INDEX, default="yes"),
        )

    def tracking_recorder(
        self, tracking_recorder_class: type[LMDBTrackingRecorder] | None = None
    ) -> LMDBTrackingRecorder:
        """A recorder of positions, or the view that the class says."""
        found = self._class(
            self.TRACKING_RECORDER_TOPIC, LMDBTrackingRecorder, tracking_recorder_class
        )
        return found(self.environment, self.env.name, create=self._create())

    def process_recorder(self) -> ProcessRecorder:
        """A recorder of events and of the positions that they were made from."""
        recorder_class = self._class(self.PROCESS_RECORDER_TOPIC, LMDBProcessRecorder)
        return recorder_class(
            self.environment,
            self.env.name,
            create=self._create(),
            tree=self._flag(self.LMDB_TREE, default="yes"),
            topic_index=self._flag(self.LMDB_TOPIC_INDEX, default="yes"),
        )

    def _class(self, key: str, default: type[T], given: type[T] | None = None) -> type[T]:
        """The class to make: the one given, else the one that a variable names by its topic."""
        topic = self.env.get(key)
        found = given or (resolve_topic(topic) if topic else default)
        if not (isinstance(found, type) and issubclass(found, default)):
            raise InfrastructureFactoryError(f"{found} is not an {default.__name__}")
        return found

    def close(self) -> None:
        """Give up the environment; the recorders made here raise InterfaceError afterwards."""
        self.environment.close()

    def _create(self) -> bool:
        return self._flag(self.CREATE_TABLE, default="yes")

    def _flag(self, key: str, default: str) -> bool:
        value = self.env.get(key) or default
        try:
            return bool(strtobool(value))
        except ValueError as error:
            raise InfrastructureFactoryError(f"{key}: {value!r} is neither yes nor no") from error

    def _integer(self, key: str) -> int | None:
        value = (self.env.get(key) or "").strip()
        if not value:
            return None
        if not (value.isascii() and value.isdigit() and len(value) < 20):
            raise InfrastructureFactoryError(f"{key}: {value!r} is not a number")
        return int(value)


Factory = LMDBFactory
