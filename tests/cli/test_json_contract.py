# SPDX-License-Identifier: AGPL-3.0-or-later
"""What docs/json.md promises, field by field, against objects made from real events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from eventsourcing.domain import Aggregate

from replicator.domain import model
from replicator.domain.failover import State
from replicator.domain.model import Damage, Point, PointDisk, PushKind, Suspicion
from replicator.domain.views import (
    event_info,
    instant,
    is_shown,
    point_info,
    push_info,
    sampling_info,
    vm_status,
    warnings,
)
from replicator.domain.vm import ProtectedVm
from tests.domain.samples import backup

DOCUMENT = (Path(__file__).parents[2] / "docs" / "json.md").read_text("utf-8")
VM = UUID("2cfe30b1-ed0a-5d2c-b362-ab269447546d")
S = 1_000_000


def is_time(value: object) -> bool:
    return (
        isinstance(value, str)
        and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value) is not None
        and datetime.fromisoformat(value) is not None
    )


CHECKS: dict[str, Callable[[object], bool]] = {
    "string": lambda value: isinstance(value, str),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "list of string": lambda value: (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    ),
    "SamplingInfo": lambda value: isinstance(value, dict),
    "PushProgress": lambda value: isinstance(value, dict),
    "LastCycle": lambda value: isinstance(value, dict),
    "BackupPart": lambda value: isinstance(value, dict),
    "BackupFailure": lambda value: isinstance(value, dict),
    "list of VmPush": lambda value: isinstance(value, list),
    "list of DiskEstimate": lambda value: isinstance(value, list),
}


def section(name: str) -> str:
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


def promised(name: str) -> dict[str, list[str]]:
    """Field to the types that it may have, of the first table in a section."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section(name), re.MULTILINE)
    assert rows
    return {field: kinds.strip().split(" or ") for field, kinds in rows}


def keeps_promise(name: str, value: dict[str, Any]) -> None:
    promise = promised(name)
    assert value.keys() == promise.keys()
    for field, kinds in promise.items():
        assert any(CHECKS[kind](value[field]) for kind in kinds), (field, value[field], kinds)
        if field.endswith("_at") or field == "at":
            assert is_time(value[field])
    assert json.loads(json.dumps(value)) == value


def point(number: int, kind: PushKind = PushKind.CYCLE, epoch: int = 1) -> Point:
    disk = PointDisk("disk-0", "virtio0", 1 << 20, bytes([number]) * 32, 1)
    return Point(
        number=number,
        parent=number - 1,
        push_id=f"push{number}",
        kind=kind,
        epoch=epoch,
        taken_at_us=1_700_000_000 * S + number,
        committed_at_us=1_700_000_002 * S,
        duration_us=2_500_000,
        bytes_pushed=77 * number,
        root=bytes([0xA0 + number]) * 32,
        disks=(disk,),
    )


def lived(role: str = "receiver") -> tuple[ProtectedVm, list[Any]]:
    """A VM that everything happened to, and all of its events; folded anew, as from a log."""
    vm = ProtectedVm.register(VM, "web", role)
    vm.commit(point(1, PushKind.SEED))
    vm.delta_applied(1)
    vm.miss_changes(Suspicion("disk-0", 65536, 1))
    vm.compare_disks(point(1, PushKind.SEED), "tracking lies")
    vm.commit(msgspec.structs.replace(point(2), compared=True))
    vm.lose_tracking("the bitmap is gone")
    vm.commit(point(3))
    vm.release([1])
    vm.point_verified(2, 4096)
    vm.damaged(Damage(3, "disk-0", 65536, 65536, "/s/points/3/disk-0.phcbt", "digest of grain 1"))
    vm.damaged(Damage(3, "disk-0", 0, 65536, "/s/points/3/disk-0.phcbt", "digest of grain 0"))
    vm.abandon_push("push9", 4, "the snapshot is gone")
    vm.breach_rpo(600, 1_700_000_601 * S)
    vm.start_test(model.TestClone("clone1", 2, 1_700_000_003 * S))
    vm.end_test()
    vm.start_promotion(2)
    vm.undo_promotion()
    vm.start_promotion(2)
    vm.finish_promotion()
    vm.make_permanent()
    vm.break_peer("it has 3 events, but it had 5")
    vm.accept_peer()
    vm.commit_backup(backup())
    vm.fail_backup("Nightly.2026-03-04_05.06.07_09", 26, "I", "cancelled")
    vm.restore_done("Restore.2026-03-04_05.06.07_10", 27, "/srv/restored", 4096)
    vm.restore_failed("Restore.2026-03-04_05.06.07_11", 28, "cluster-b", "cancelled")
    events = [*vm.collect_events(), vm.open_period(2)]
    folded: Any = None
    for event in events:
        folded = event.mutate(folded)
    return folded, list(events)


def test_status() -> None:
    vm, _ = lived()
    status = vm_status(
        vm,
        1_700_000_060 * S,
        ["the disk is nearly full"],
        rpo_target_s=600,
        rpo_forecast_s=320.5,
    )
    keeps_promise("VmStatus", status)
    keeps_promise("LastCycle", status["last_cycle"])
    assert status == {
        "vm": "web",
        "uuid": str(VM),
        "role": "receiver",
        "state": "permanent",
        "epoch": 3,
        "newest_point": 3,
        "rpo_age_s": 59.999997,
        "rpo_target_s": 600,
        "rpo_forecast_s": 320.5,
        "last_cycle": {
            "point": 3,
            "kind": "cycle",
            "duration_s": 2.5,
            "bytes_pushed": 231,
            "committed_at": "2023-11-14T22:13:22.000Z",
        },
        "sampling": None,
        "push": None,
        "warnings": [
            "recovery point 3 is damaged: disk-0, 65536 bytes at 65536: digest of grain 1, and 1 more",
            "the last push was given up: the snapshot is gone",
            "the disk is nearly full",
        ],
    }


def test_status_before_the_first_point() -> None:
    status = vm_status(ProtectedVm.register(VM, "web", "source"), 5 * S)
    keeps_promise("VmStatus", status)
    assert (status["state"], status["newest_point"], status["rpo_age_s"], status["last_cycle"]) == (
        "unseeded", None, None, None,
    )  # fmt: skip
    assert status["warnings"] == ["no recovery point yet"]


def test_progress_of_a_push() -> None:
    since_us = 1_700_000_000 * S
    sent = push_info(1, "resync", since_us, done=2, total=4, sent=1, eta_s=2.5)
    received = push_info(1, "seed", since_us, received=7)
    for push in (sent, received):
        keeps_promise("PushProgress", push)
        assert is_time(push["since"])
        status = vm_status(ProtectedVm.register(VM, "web", "source"), 5 * S, push=push)
        keeps_promise("VmStatus", status)
        assert status["push"] == push


def test_a_source_does_not_speak_of_a_vm_that_was_named_by_mistake() -> None:
    vm = ProtectedVm.register(VM, "wbe", "source")
    assert not is_shown(vm, "web")
    assert all(is_shown(vm, configured) for configured in ("wbe", " * ", str(VM)))
    vm.commit(point(1, PushKind.SEED))
    assert is_shown(vm, "web")


def test_a_source_whose_clock_is_ahead_has_no_negative_age() -> None:
    vm = ProtectedVm.register(VM, "web", "receiver")
    vm.commit(point(1, PushKind.SEED))
    assert vm_status(vm, 1_699_999_999 * S)["rpo_age_s"] == 0


def test_warnings_end_with_what_caused_them() -> None:
    vm = ProtectedVm.register(VM, "web", "source")
    vm.commit(point(1, PushKind.SEED))
    assert warnings(vm) == []
    vm.lose_tracking("no bitmap")
    vm.abandon_push("p", 2, "cut")
    assert warnings(vm) == [
        "change tracking was lost, digests are compared: no bitmap",
        "the last push was given up: cut",
    ]
    vm.commit(point(2))
    assert warnings(vm) == []


def test_points() -> None:
    vm, _ = lived()
    infos = [point_info(vm, vm.points[number]) for number in sorted(vm.points)]
    for info in infos:
        keeps_promise("PointInfo", info)
    assert infos[0] == {
        "point": 2,
        "taken_at": "2023-11-14T22:13:20.000Z",
        "committed_at": "2023-11-14T22:13:22.000Z",
        "parent": 1,
        "root": "a2" * 32,
        "bytes_pushed": 154,
        "state": "verified",
    }
    assert infos[1]["state"] == "damaged"


def test_the_state_of_a_point_is_the_worst_that_holds() -> None:
    vm = ProtectedVm.register(VM, "web", "receiver")
    first = point(1, PushKind.SEED)
    vm.commit(first)
    assert point_info(vm, first)["parent"] is None
    states = [point_info(vm, first)["state"]]
    vm.point_verified(1, 5)
    states += [point_info(vm, first)["state"], point_info(vm, first, held=True)["state"]]
    vm.damaged(Damage(1, "disk-0", 0, 1, "f", "r"))
    states.append(point_info(vm, first, held=True)["state"])
    assert states == ["ok", "verified", "held", "damaged"]
    assert all(f"`{state}`" in section("PointInfo") for state in states)


def documented_kinds() -> dict[str, set[str]]:
    rows = re.findall(
        r"^\| `([a-z-]+)` \| ((?:`\w+`[^|]*)|none) \|$", section("Event"), re.MULTILINE
    )
    return {
        kind: set(re.findall(r"`(\w+)`", fields))
        for kind, fields in rows
        if kind not in {"id", "at", "kind"}
    }


def event_topic(kind: Any) -> str:
    return str(kind.TOPIC)


def test_every_kind_of_event_is_documented_with_its_fields() -> None:
    _, events = lived()
    infos = [event_info(event) for event in events]
    assert [info["id"] for info in infos] == list(range(1, len(infos) + 1))
    seen: dict[str, set[str]] = {}
    for info in infos:
        assert is_time(info["at"])
        assert json.loads(json.dumps(info)) == info
        seen[info["kind"]] = info.keys() - {"id", "at", "kind"}
    assert seen == documented_kinds()
    kinds = {
        event_topic(value).removeprefix("replctl:vm.")
        for value in vars(ProtectedVm).values()
        if isinstance(value, type) and issubclass(value, Aggregate.Event)
    } - {"event"}  # their base
    assert seen.keys() == kinds


def test_committed_points_and_damage_in_the_history() -> None:
    _, events = lived()
    infos = {info["kind"]: info for info in map(event_info, events)}
    seed = infos["seed-committed"]
    assert (seed["point"], seed["parent"], seed["root"], seed["duration_s"]) == (
        1,
        None,
        "a1" * 32,
        2.5,
    )
    assert seed["disks"] == [
        {"disk": "disk-0", "identity": "virtio0", "size": 1 << 20, "root": "01" * 32, "since": 1}
    ]
    assert all(f"`{field}`" in section("Event") for field in seed["disks"][0])
    keeps_promise("Damage", infos["point-damaged"]["damage"])
    part = infos["backup-committed"]["backup"]
    assert (part["number"], part["level"], part["duration_s"]) == (1, "F", 9000.0)
    assert all(f"`{field}`" in section("Event") for field in part)
    assert infos["test-started"]["clone"] == {
        "clone_id": "clone1", "point": 2, "started_at": "2023-11-14T22:13:23.000Z",
    }  # fmt: skip


@pytest.mark.parametrize(("clean", "missed"), [(0, 0), (1024, 0), (1024, 2)])
def test_sampling(clean: int, missed: int) -> None:
    info = sampling_info(clean, missed)
    keeps_promise("SamplingInfo", info)
    assert (info["sampled"], info["missed"], info["days"]) == (clean, missed, 7)
    assert (info["missed_percent_max"] is None) == (not clean or missed > 0)
    status = vm_status(lived()[0], 5 * S, sampling=info)
    keeps_promise("VmStatus", status)
    assert status["sampling"] == info


@pytest.mark.parametrize("role", ["source", "receiver"])
def test_points_that_may_lack_changes(role: str) -> None:
    """Those since the last one that is sure; the receiver holds them, the source says what it will do."""
    vm = ProtectedVm.register(VM, "web", role)
    vm.commit(point(1, PushKind.SEED))
    vm.commit(msgspec.structs.replace(point(2), compared=True))
    vm.commit(point(3))
    vm.commit(point(4))
    vm.miss_changes(Suspicion("disk-0", 65536, 4))
    events: list[Any] = list(vm.collect_events())
    missed = event_info(events[-1])
    assert (missed["kind"], missed["missed"]) == (
        "changes-missed",
        {"disk": "disk-0", "offset": 65536, "point": 4},
    )
    states = {number: point_info(vm, each)["state"] for number, each in vm.points.items()}
    said = warnings(vm)
    at = "change tracking missed a change (disk-0, byte 65536, found after point 4)"
    if role == "source":
        assert states == {4: "suspect"}
        assert said == [f"{at}: the next push does what on_reference_loss says"]
    else:
        assert states == {1: "ok", 2: "ok", 3: "suspect", 4: "suspect"}
        assert said == [
            f"{at}: the source is to compare all disks",
            "recovery points 3, 4 may lack changes that change tracking at the source missed",
        ]
    # What is built on it meanwhile is in doubt as well; what was compared is not, and ends it.
    vm.commit(point(5))
    vm.commit(msgspec.structs.replace(point(6), compared=True))
    assert vm.suspect is None
    assert vm.doubtful == (frozenset() if role == "source" else {3, 4, 5})
    if role == "receiver":
        vm.release([3])
        assert vm.doubtful == {4, 5}


def test_many_doubtful_points_are_one_line() -> None:
    vm = ProtectedVm.register(VM, "web", "receiver")
    vm.commit(point(1, PushKind.SEED))
    for number in range(2, 20):
        vm.commit(point(number))
    vm.miss_changes(Suspicion("disk-0", 0, 19))
    assert warnings(vm)[-1].startswith("recovery points 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more ")


def test_every_state_is_documented() -> None:
    assert all(f"`{state.value}`" in section("VmStatus") for state in State)


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (999_999, "1970-01-01T00:00:00.999Z"),
        (4_102_444_799_999_999, "2099-12-31T23:59:59.999Z"),
    ],
)
def test_times_are_cut_to_the_millisecond(time_us: int, text: str) -> None:
    assert instant(time_us) == text
