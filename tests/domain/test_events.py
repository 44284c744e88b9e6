# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is stored of events: bytes that every later version must read, names that never change, little of both.

To add an event, add its example to samples.py and its stored bytes to golden_events.json. Bytes that are there stay: logs
hold such bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from eventsourcing.persistence import StoredEvent

from eventstore.mapper import EventMapper
from replicator.domain.backup import Backups, LevelSum, PartName
from replicator.domain.model import Balance, Point, PushKind, RpoBreach, Suspicion, plain, stream_id
from replicator.domain.vm import ProtectedVm, event_kind, event_time_us
from replicator.log.store import TYPES
from tests.domain.samples import FIELDS, VM, backup, balance, event, point

GOLDEN: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("golden_events.json").read_text("utf-8")
)
MAPPER = EventMapper(types=TYPES)
KINDS = {
    name: kind
    for name, kind in vars(ProtectedVm).items()
    if isinstance(kind, type) and issubclass(kind, ProtectedVm.Event)
    # The base, and what the library adds to it: neither is ever stored.
    if name not in {"Event", "Created"}
}


def test_every_event_has_an_example_and_golden_bytes() -> None:
    assert set(KINDS) == set(FIELDS) == set(GOLDEN)


def test_topics_are_explicit_and_unique() -> None:
    topics = {name: vars(kind)["TOPIC"] for name, kind in KINDS.items()}
    assert len(set(topics.values())) == len(topics)
    assert topics == {name: golden["topic"] for name, golden in GOLDEN.items()}
    assert vars(ProtectedVm)["TOPIC"] == "replctl:vm"


@pytest.mark.parametrize("name", GOLDEN)
def test_stored_bytes_are_read_for_ever(name: str) -> None:
    golden = GOLDEN[name]
    stored = StoredEvent(stream_id(VM, 1), 7, golden["topic"], bytes.fromhex(golden["state"]))
    assert MAPPER.to_domain_event(stored) == event(name)


@pytest.mark.parametrize("name", GOLDEN)
def test_an_event_is_stored_as_it_always_was(name: str) -> None:
    stored = MAPPER.to_stored_event(event(name))
    assert (stored.topic, stored.state.hex()) == (GOLDEN[name]["topic"], GOLDEN[name]["state"])


def test_a_cycle_of_two_disks_is_small() -> None:
    assert len(MAPPER.to_stored_event(event("CycleCommitted")).state) < 400


def test_fields_that_were_added_are_stored_where_they_say_something() -> None:
    """And what lacks them, as older logs do, reads as it was."""
    old = plain(point(3, PushKind.CYCLE, parent=2))
    new = msgspec.structs.replace(point(3, PushKind.CYCLE, parent=2), sampled=1024, compared=True)
    assert plain(new) == [*old, 1024, True]
    assert msgspec.convert(plain(new), Point) == new
    assert msgspec.convert(old, Point) == point(3, PushKind.CYCLE, parent=2)
    doubted = msgspec.structs.replace(
        balance(), suspect=Suspicion("disk-0", 5, 5), doubtful=(5,), points=(new,), newest=new
    )
    assert msgspec.convert(plain(doubted), Balance) == doubted
    restored = ProtectedVm.restore(doubted, 9, event("Registered").timestamp)
    assert restored.balance() == doubted


def test_a_balance_carries_the_backups() -> None:
    """And one of a VM that has none, as all older ones, is what it was."""
    assert plain(balance()) == plain(msgspec.structs.replace(balance(), backups=None))
    known = Backups().committed(backup()).committed(backup(2, "00000001", "I"))
    whole = msgspec.structs.replace(balance(), backups=known)
    assert msgspec.convert(plain(whole), Balance) == whole
    restored = ProtectedVm.restore(whole, 9, event("Registered").timestamp)
    assert restored.balance() == whole
    assert restored.backups == known


def test_the_parts_that_a_part_needs() -> None:
    first, second = backup(), backup(2, "00000001", "I")
    known = Backups().committed(first).committed(second)
    assert known.line == (first.name, second.name)
    assert (known.last, known.full, known.next_number) == (second, first, 3)
    since_full = backup(3, "00000001", "D")
    assert known.committed(since_full).line == (first.name, since_full.name)
    third = backup(3, "00000002", "I")
    assert known.committed(third).line == (first.name, second.name, third.name)
    again = backup(3, level="I")  # every disk in full, though an Incremental was asked for
    assert known.committed(again).line == (again.name,)
    assert known.committed(again).full == first
    # The last Full is not among the parts of that line, and a Differential may go on from it.
    after = known.committed(again).committed(backup(4, "00000001", "D"))
    assert after.line == (first.name, PartName(4, "00000004"))


def test_the_kind_and_the_time_that_operators_see() -> None:
    assert event_kind(event("CycleCommitted")) == "cycle-committed"
    assert event_time_us(event("CycleCommitted")) == 1_772_600_767_890_123


def test_folding_golden_bytes_gives_the_state() -> None:
    """A history of one of each, as it might have been."""
    order = ["Registered", "DisksCompared", "SeedCommitted", "TrackingLost", "CycleCommitted"]
    order += ["DeltaApplied"]
    order += ["TestStarted", "TestEnded", "PointDamaged", "PointVerified", "PushAbandoned"]
    order += ["PointsReleased", "PromotionStarted", "PromotionUndone", "Promoted", "MadePermanent"]
    order += ["PeerLogBroken", "PeerLogAccepted", "ChangesMissed"]
    order += ["RpoBreached", "BackupCommitted", "BackupFailed", "RestoreDone", "RestoreFailed"]
    assert {*order, "PeriodOpened"} == set(GOLDEN)
    vm: ProtectedVm | None = None
    for version, name in enumerate(order, 1):
        # The examples are all of version 7; in a stream each has its own.
        whole: Any = MAPPER.to_domain_event(
            StoredEvent(
                stream_id(VM, 1), 7, GOLDEN[name]["topic"], bytes.fromhex(GOLDEN[name]["state"])
            )
        )
        object.__setattr__(whole, "originator_version", version)
        vm = whole.mutate(vm)
    assert vm is not None
    assert (vm.vm, vm.name, vm.role) == (str(VM), "web", "receiver")
    assert (vm.state.value, vm.epoch, vm.applied) == ("permanent", 2, 2)
    assert vm.points == {2_000_000: point(2_000_000, PushKind.CYCLE, parent=1_999_999)}
    assert vm.newest == vm.points[2_000_000]
    assert (vm.damages, vm.test, vm.tracking_lost) == ([], None, None)
    assert vm.abandoned == "snapshot is gone"
    assert vm.breach == RpoBreach(2, 601, 600, 1_772_600_600_000_000)
    assert vm.suspect == Suspicion("disk-1", 65536, 3)
    assert vm.doubtful == {2_000_000}
    assert vm.verified == {2: event_time_us(event("PointVerified"))}
    assert vm.version == len(order)
    known = vm.backups
    assert known.last == known.full == backup()
    assert known.line == (PartName(1, "00000001"),)
    assert known.sums == (LevelSum("F", 1, 123_456_789_012),)
    assert known.failure is not None
    assert (known.failure.reason, known.failed) == ("cancelled", 1)
    assert (known.restored, known.restores_failed) == (1, 1)
