# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which event classes a log may hold, by topic, and in what order their fields are stored.

The library's own look-up imports whatever module a stored topic names; a topic that came from another host must never
do that. Here a topic is a key of a table made from classes that are loaded already. It knows nothing of bytes.

A class says what its stored fields were: ``class_version`` (1 if it has none) numbers its present fields, and
``FIELDS: ClassVar[dict[int, tuple[str, ...]]]`` lists those of each older version, in stored order.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from types import SimpleNamespace
from typing import Any

from eventsourcing.domain import (
    BaseAggregate,
    CanInitAggregate,
    CanMutateAggregate,
    CanSnapshotAggregate,
    HasOriginatorIDVersion,
    Snapshot,
)
from eventsourcing.persistence import MapperDeserialisationError, ProgrammingError

#: A version is one byte of a stored state.
CLASS_VERSION_MAX = 127
#: The library's snapshot class has no TOPIC: this is what it is called in every log.
LIBRARY_SNAPSHOT_TOPIC = "eventsourcing.domain:Snapshot"
#: Stored beside the fields: in the record, or before them.
_COMMON_FIELDS = frozenset({"originator_id", "originator_version", "timestamp"})


class UnknownTopicError(MapperDeserialisationError):
    """A topic that is not registered here. Nothing was imported to find that out."""


@dataclasses.dataclass(frozen=True, slots=True)
class EventType:
    """What is known of one event class.

    ``layouts`` gives for each class version the stored fields in order; ``hints`` the types of the present ones
    (Any where an annotation cannot be read); ``aggregate_field`` the field that holds an aggregate's topic, which
    `mutate` resolves.
    """

    cls: type[Any]
    topic: str
    version: int
    layouts: dict[int, tuple[str, ...]]
    hints: tuple[Any, ...]
    aggregate_field: str | None

    @property
    def fields(self) -> tuple[str, ...]:
        """The stored fields of the present version, in order."""
        return self.layouts[self.version]


class EventTypes:
    """The allow-list of a log: the nested events of aggregate classes, the aggregates themselves (snapshots name them)
    and their snapshot classes; and single event classes.

    Each needs an explicit ``TOPIC`` of its own. An aggregate's base event is left out: it is never stored. Raises
    ProgrammingError where a topic is missing or used twice, or versions and FIELDS do not fit.
    """

    def __init__(self, *classes: type[Any]) -> None:
        self._by_topic: dict[str, EventType] = {}
        self._by_class: dict[type[Any], EventType] = {}
        self._aggregates: dict[str, type[Any]] = {}
        for cls in classes:
            if issubclass(cls, BaseAggregate):
                self._add_aggregate(cls)
            else:
                self._add_event(cls, _own_topic(cls))

    def __iter__(self) -> typing.Iterator[EventType]:
        return iter(self._by_topic.values())

    @property
    def topics(self) -> frozenset[str]:
        """The topics of all event classes."""
        return frozenset(self._by_topic)

    def resolve(self, topic: str) -> type[Any]:
        """The event or aggregate class of a stored topic; imports nothing. Raises UnknownTopicError."""
        found = self._by_topic.get(topic)
        return self.resolve_aggregate(topic) if found is None else found.cls

    def resolve_aggregate(self, topic: str) -> type[Any]:
        """The aggregate class of a stored topic; imports nothing. Raises UnknownTopicError."""
        try:
            return self._aggregates[topic]
        except (KeyError, TypeError):  # a damaged or hostile state can hold anything here
            raise UnknownTopicError(f"topic {topic!r} is not registered here") from None

    def by_topic(self, topic: str) -> EventType:
        """The event type of a stored topic. Raises UnknownTopicError."""
        try:
            return self._by_topic[topic]
        except (KeyError, TypeError):
            raise UnknownTopicError(f"topic {topic!r} is not registered here") from None

    def by_class(self, cls: type[Any]) -> EventType:
        """The event type of a class that is to be stored. Raises ProgrammingError if it is not registered."""
        try:
            return self._by_class[cls]
        except KeyError:
            raise ProgrammingError(f"event class {cls.__qualname__} is not registered") from None

    def _add_aggregate(self, cls: type[Any]) -> None:
        topic = _own_topic(cls)
        if topic in self._by_topic or self._aggregates.setdefault(topic, cls) is not cls:
            raise ProgrammingError(f"topic {topic!r} of {cls.__qualname__} is used twice")
        for name, event in vars(cls).items():
            nested = isinstance(event, type) and issubclass(event, CanMutateAggregate)
            if nested and name != "Event" and not _is_redefined_by_library(cls, name, event):
                self._add_event(event, _own_topic(event))
        snapshot = getattr(cls, "Snapshot", None)
        if snapshot is Snapshot:
            self._add_event(Snapshot, LIBRARY_SNAPSHOT_TOPIC)
        elif snapshot is not None:
            self._add_event(snapshot, _own_topic(snapshot))

    def _add_event(self, cls: type[Any], topic: str) -> None:
        if cls in self._by_class:
            return
        if topic in self._by_topic or topic in self._aggregates:
            raise ProgrammingError(f"topic {topic!r} of {cls.__qualname__} is used twice")
        found = _describe(cls, topic)
        self._by_topic[topic] = self._by_class[cls] = found


def _own_topic(cls: type[Any]) -> str:
    # An inherited one names the parent: both would be stored under it.
    topic = vars(cls).get("TOPIC")
    if not isinstance(topic, str) or not topic:
        raise ProgrammingError(f"{cls.__qualname__} has no TOPIC of its own")
    return topic


def _is_redefined_by_library(cls: type[Any], name: str, event: type[Any]) -> bool:
    """True of an inherited event class that the library put again under ``cls``, below its base event."""
    if "TOPIC" in vars(event):
        return False
    inherited = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
    return inherited in event.__bases__ and not vars(event).get("__annotations__")


def _describe(cls: type[Any], topic: str) -> EventType:
    what = cls.__qualname__
    is_event: bool = issubclass(cls, HasOriginatorIDVersion) and dataclasses.is_dataclass(cls)
    if not is_event:
        raise ProgrammingError(f"{what} is not one of the library's event classes")
    declared = {field.name: field.type for field in dataclasses.fields(cls)}
    if not declared.keys() >= _COMMON_FIELDS:
        raise ProgrammingError(f"{what} has no {', '.join(_COMMON_FIELDS - declared.keys())}")
    names = tuple(name for name in declared if name not in _COMMON_FIELDS)
    version: Any = getattr(cls, "class_version", 1)
    if not isinstance(version, int) or not 1 <= version <= CLASS_VERSION_MAX:
        raise ProgrammingError(f"{what}: class_version is not within 1..{CLASS_VERSION_MAX}")
    # Only the class's own: a parent's list is of the parent's fields.
    older: dict[int, tuple[str, ...]] = vars(cls).get("FIELDS", {})
    missing = set(range(1, version)) - older.keys()
    if missing or any(number not in range(1, version + 1) for number in older):
        raise ProgrammingError(f"{what}: FIELDS must list the versions 1..{version - 1}")
    layouts = {**older, version: older.get(version, names)}
    if set(layouts[version]) != set(names):
        raise ProgrammingError(f"{what}: FIELDS of version {version} are not its fields")
    for number, layout in layouts.items():
        if len(set(layout)) != len(layout) or not _COMMON_FIELDS.isdisjoint(layout):
            raise ProgrammingError(f"{what}: FIELDS of version {number} repeat a name")
    for number in range(1, version):
        if not callable(getattr(cls, f"upcast_v{number}_v{number + 1}", None)):
            raise ProgrammingError(f"{what} has no upcast_v{number}_v{number + 1}")
    hints = tuple(_hint(cls, name, declared[name]) for name in layouts[version])
    return EventType(cls, topic, version, layouts, hints, _aggregate_field(cls))


def _aggregate_field(cls: type[Any]) -> str | None:
    if issubclass(cls, CanInitAggregate):
        return "originator_topic"
    return "topic" if issubclass(cls, CanSnapshotAggregate) else None


def _hint(cls: type[Any], name: str, annotation: Any) -> Any:
    """The type that an annotation names, Any if its names cannot be found from here."""
    owner = next(base for base in cls.__mro__ if name in vars(base).get("__annotations__", {}))
    names = {"typing": typing} | vars(sys.modules[owner.__module__])
    holder = SimpleNamespace(__annotations__={name: annotation})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)[name]
    except (NameError, TypeError, AttributeError, SyntaxError):
        return Any


__all__ = ["EventType", "EventTypes", "UnknownTopicError"]
