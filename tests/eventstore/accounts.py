# SPDX-License-Identifier: AGPL-3.0-or-later
"""A toy aggregate with explicit topics, an event that has had two versions, and events at all kinds of values."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar
from uuid import UUID

from eventsourcing.domain import Aggregate, event

from eventstore.mapper import EventMapper
from eventstore.types import EventTypes

STAMP = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)
ACCOUNT = UUID("3f6c1df0-8c39-4a54-9b1f-0d5a3a1f7e10")


class Account(Aggregate):
    """Money comes and goes."""

    TOPIC = "test:account"

    class Event(Aggregate.Event):
        TOPIC = "test:account.event"

    class Opened(Event, Aggregate.Created):
        TOPIC = "test:account.opened"
        owner: str

    class Credited(Event):
        """Version 1 had whole euros and no reason."""

        TOPIC = "test:account.credited"
        class_version: ClassVar[int] = 2
        FIELDS: ClassVar[dict[int, tuple[str, ...]]] = {1: ("euros",)}
        cents: int
        reason: str

        @staticmethod
        def upcast_v1_v2(state: dict[str, Any]) -> None:
            state["cents"] = state.pop("euros") * 100
            state["reason"] = "unknown"

        def apply(self, aggregate: Account) -> None:
            aggregate.cents += self.cents

    class Noted(Event):
        TOPIC = "test:account.noted"
        note: Any
        proof: bytes
        who: UUID

    @event("Opened")
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.cents = 0

    def credit(self, cents: int, reason: str) -> None:
        self.trigger_event(self.Credited, cents=cents, reason=reason)


TYPES = EventTypes(Account)


class AccountMapper(EventMapper):
    """To be named in MAPPER_TOPIC."""

    event_types = TYPES
