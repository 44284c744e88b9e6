# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes the recorders of an `eventsourcing` application from its environment variables.

``PERSISTENCE_MODULE=eventstore`` selects it. Variables (each also with the application's name and
an underscore in front): ``LMDB_PATH``, the environment's directory; ``LMDB_MAP_SIZE``, most bytes
that the data may take (default: 1 TiB of address space is reserved); ``LMDB_MAX_READERS`` (default
126); ``LMDB_READONLY``, for a process beside the writer's; ``CREATE_TABLE=no``, not to make missing
databases.
"""

from __future__ import annotations

from typing import NoReturn

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    InfrastructureFactoryError,
    NotSupportedError,
    ProcessRecorder,
    ProgrammingError,
    TrackingRecorder,
)
from eventsourcing.utils import Environment, EnvType, resolve_topic, strtobool

from eventstore.environment import MAX_READERS_DEFAULT, LMDBEnvironment
from eventstore.recorders import LMDBAggregateRecorder, LMDBApplicationRecorder


class LMDBFactory(InfrastructureFactory[TrackingRecorder]):
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
        topic = self.env.get(self.APPLICATION_RECORDER_TOPIC)
        recorder_class = resolve_topic(topic) if topic else LMDBApplicationRecorder
        if not issubclass(recorder_class, LMDBApplicationRecorder):
            raise InfrastructureFactoryError(f"{topic} is not an LMDB application recorder")
        recorder: LMDBApplicationRecorder = recorder_class(
            self.environment, self.env.name, create=self._create()
        )
        return recorder

    def tracking_recorder(
        self, tracking_recorder_class: type[TrackingRecorder] | None = None
    ) -> NoReturn:
        """Not supported: raises NotSupportedError."""
        del tracking_recorder_class
        raise NotSupportedError("the LMDB event store has no tracking recorder")

    def process_recorder(self) -> ProcessRecorder:
        """Not supported: raises NotSupportedError."""
        raise NotSupportedError("the LMDB event store has no process recorder")

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
