# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.disk import Extent
from replicator.errors import SourceError
from replicator.prism.errors import PrismAnswerError
from replicator.prism.types import (
    Capability,
    Consistency,
    DiskSnapshot,
    Found,
    Kind,
    Vm,
    VmDisk,
    VmSnapshot,
)
from replicator.sources.nutanix import plan
from replicator.sources.nutanix.expose import targets_of
from replicator.sources.nutanix.ledger import Entry
from replicator.sources.nutanix.names import ObjectName
from replicator.sources.nutanix.regions import RegionMap
from replicator.sources.nutanix.site import make_secrets
from replicator.sources.nutanix.sweep import Why, judge

DISK = DiskSnapshot("d0", "b0", "h0", "p0", 1000)
HOUR_US = 3_600_000_000


def vm(**changes: Any) -> Vm:
    disks = (
        VmDisk("z0", "b0", "SCSI", 0, 1000, "ct"),
        VmDisk("a1", "b1", "SCSI", 10, 1000, "ct"),
        VmDisk("b2", "b2", "SCSI", 2, 1000, "ct"),
    )
    whole = Vm("vm1", "app01", "cA", "ON", disks, quiesce=True, migrating=False, config={})
    return msgspec.structs.replace(whole, **changes)


def entry(**changes: Any) -> Entry:
    name = ObjectName("1a2b3c4d", "p1", Kind.SNAPSHOT, 0)
    whole = Entry(
        kind=Kind.SNAPSHOT,
        name=str(name),
        request_id="6f1c2b0e-7a53-4a0a-9d43-7f0d1b1f0a11",
        vm="vm1",
        cluster="cA",
        push_id="p1",
        intended_at_us=0,
        uuid="rp1",
        disks=(DISK,),
    )
    return msgspec.structs.replace(whole, **changes)


def snapshot(**changes: Any) -> VmSnapshot:
    whole = VmSnapshot("rp2", "n", "vm1", "cA", 1, Consistency.CRASH, (DISK,))
    return msgspec.structs.replace(whole, **changes)


def test_no_snapshot_of_a_vm_that_migrates_or_has_no_disk() -> None:
    with pytest.raises(SourceError, match="on its way to another cluster"):
        plan.disks_of(vm(migrating=True))
    with pytest.raises(SourceError, match="no disk of its own"):
        plan.disks_of(vm(disks=()))


def test_disks_of_volume_groups_are_named() -> None:
    shared = VmDisk("s", "b", "SCSI", 5, 10, None, volume_group="vg1")
    some = vm(disks=(*vm().disks, shared))
    assert len(plan.disks_of(some)) == 3
    assert "SCSI.5 of volume group vg1" in str(plan.left_out(some))
    assert plan.left_out(vm()) is None


@pytest.mark.parametrize(
    ("wanted", "quiesce", "power", "asked", "told"),
    [
        ("false", True, "ON", Consistency.CRASH, False),
        ("true", True, "ON", Consistency.APPLICATION, False),
        ("try", True, "ON", Consistency.APPLICATION, False),
        ("try", False, "ON", Consistency.CRASH, True),
        ("true", False, "OFF", Consistency.CRASH, False),
        ("true", True, "OFF", Consistency.CRASH, False),
    ],
)
def test_consistency(
    wanted: str, quiesce: bool, power: str, asked: Consistency, told: bool
) -> None:
    found, why = plan.choose_consistency(wanted, vm(quiesce=quiesce, power=power))
    assert (found, why is not None) == (asked, told)


def test_application_consistency_that_cannot_be_had() -> None:
    with pytest.raises(SourceError, match="application_consistent = try"):
        plan.choose_consistency("true", vm(quiesce=False))


def test_a_reference_outlives_two_intervals_and_an_outage() -> None:
    until = plan.expiry_us(5, 300, 3600)
    assert until == 5 + (600 + 3600) * 1_000_000
    old = entry(expires_at_us=until)
    assert not plan.is_expiring(old, 5 + 3_600_000_000, 300)
    assert plan.is_expiring(old, 6 + 3_600_000_000, 300)
    assert not plan.is_expiring(entry(), 1 << 60, 300)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (None, "no snapshot of push p1 is known"),
        (entry(uuid=None), "no snapshot of push p1 is known"),
        (entry(vm="vm2"), "of another VM"),
        (entry(cluster="cB"), "on cluster cB, the VM on cA"),
    ],
)
def test_a_reference_of_no_use_says_why(reference: Entry | None, words: str) -> None:
    why = plan.why_lost(reference, "p1", snapshot(), Capability.V3)
    assert why is not None
    assert why.startswith("reference_snapshot not found")
    assert words in why
    assert plan.why_lost(entry(), "p1", snapshot(), Capability.V3) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disk": "d9"}, "added since push p1"),
        ({"backing": "b9"}, "after a restore or a migration"),
        ({"size": 999}, "shrank from 1000 to 999"),
    ],
)
def test_a_disk_that_is_another_one_now_says_why(changes: dict[str, Any], words: str) -> None:
    why = plan.reference_disk(entry(), msgspec.structs.replace(DISK, **changes))
    assert isinstance(why, str)
    assert why.startswith("reference_snapshot not found for disk")
    assert words in why
    assert plan.reference_disk(entry(), msgspec.structs.replace(DISK, size=2000)) == DISK


def test_disks_come_in_the_order_of_the_vm() -> None:
    made = [msgspec.structs.replace(DISK, disk=each) for each in ("a1", "b2", "z0")]
    assert [disk.disk for disk in plan.in_order(vm(), made)] == ["z0", "b2", "a1"]


def test_a_snapshot_that_lacks_a_disk_is_no_point() -> None:
    with pytest.raises(SourceError, match="lacks the VM's disk z0"):
        plan.check_disks(vm().disks, snapshot())
    with pytest.raises(SourceError, match="twice"):
        plan.check_disks((), snapshot(disks=(DISK, DISK)))


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    found, at = [], 0
    for _ in range(draw(st.integers(0, 40))):
        at += draw(st.sampled_from([0, 1, 70_000, 300_000]))
        length = draw(st.sampled_from([1, 512, 65536]))
        found.append(Extent(at, length, zero=draw(st.booleans())))
        at += length
    return found


@given(extents(), st.integers(1, 12))
def test_a_map_is_small_and_covers_all(given_: list[Extent], count_max: int) -> None:
    size = given_[-1].end if given_ else 1
    found = RegionMap(size, count_max=count_max)
    for extent in given_:
        found.add(extent)
    kept = list(found)
    assert len(kept) <= count_max
    assert all(one.end <= two.offset for one, two in itertools.pairwise(kept))
    for extent in given_:
        over = [each for each in kept if each.offset < extent.end and each.end > extent.offset]
        assert (
            sum(min(e.end, extent.end) - max(e.offset, extent.offset) for e in over)
            == extent.length
        )
        # Data is never called zero.
        assert extent.zero or not any(each.zero for each in over)
    for zero in (each for each in kept if each.zero):
        told = [e for e in given_ if e.zero and e.offset < zero.end and e.end > zero.offset]
        assert sum(e.length for e in told) == zero.length


def test_a_map_out_of_order_is_no_map() -> None:
    found = RegionMap(1000)
    found.add(Extent(100, 100))
    for extent in (Extent(150, 10), Extent(990, 11)):
        with pytest.raises(PrismAnswerError):
            found.add(extent)


def test_secrets_are_sixteen_characters_and_never_the_same() -> None:
    mutual = make_secrets("mutual")
    assert mutual is not None
    assert mutual.client is not None
    assert {len(mutual.target), len(mutual.client)} == {16}
    assert mutual.target not in repr(mutual)
    one_way = make_secrets("one-way")
    assert one_way is not None
    assert one_way.client is None
    assert one_way.target != mutual.target
    assert make_secrets("none") is None


def test_targets_of_one_group() -> None:
    start = "iqn.2010-06.com.nutanix:drx-1-aa"
    offered = [f"{start}-tgt0", f"{start}b-tgt0", "iqn.2010-06.com.nutanix:other-tgt0", start]
    assert targets_of(offered, "DRX-1-aa") == [f"{start}-tgt0", start]


def _found(installation: str, push: str, kind: Kind, uuid: str, age_us: int = 0) -> Found:
    return Found(kind, uuid, str(ObjectName(installation, push, kind, 10 * HOUR_US - age_us)))


def test_why_an_object_is_there() -> None:
    now = 10 * HOUR_US
    reference = entry(push_id="p1", reference=True, uuid="r")
    reference = msgspec.structs.replace(
        reference, name=str(ObjectName("1a2b3c4d", "p1", Kind.SNAPSHOT, now))
    )
    begun = entry(push_id="p2", uuid=None, kind=Kind.VOLUME_GROUP)
    begun = msgspec.structs.replace(
        begun, name=str(ObjectName("1a2b3c4d", "p2", Kind.VOLUME_GROUP, now))
    )
    found = [
        _found("1a2b3c4d", "p1", Kind.SNAPSHOT, "r"),
        _found("1a2b3c4d", "p1", Kind.SNAPSHOT, "twin"),
        _found("1a2b3c4d", "p2", Kind.VOLUME_GROUP, "v"),
        _found("1a2b3c4d", "p0", Kind.IMAGE, "young", HOUR_US - 1_000_000),
        _found("1a2b3c4d", "p0", Kind.IMAGE, "old", HOUR_US),
        _found("1a2b3c4d", "p0", Kind.VM, "restored", HOUR_US),
        _found("99999999", "p0", Kind.SNAPSHOT, "theirs", 9 * HOUR_US),
        Found(Kind.SNAPSHOT, "mine", "drx-1a2b3c4d-backup-of-bob"),
    ]

    def why(live: dict[str, set[str]]) -> dict[str, Why]:
        judged = judge(found, [reference, begun], "1a2b3c4d", live, now, spoken=Capability.V3)
        assert [each.kind for each in judged][:2] == [Kind.VOLUME_GROUP, Kind.IMAGE]
        return {each.uuid: each.why for each in judged}

    all_live = why({"vm1": {"p1", "p2"}})
    assert all_live == {
        "r": Why.REFERENCE,
        "twin": Why.LEFT,
        "v": Why.PUSH,
        "young": Why.YOUNG,
        "old": Why.LEFT,
        "restored": Why.VM,
        "theirs": Why.OTHERS,
    }
    none_live = why({"vm2": {"p1", "p2"}})
    assert none_live["r"] == none_live["v"] == Why.LEFT
    assert none_live["theirs"] is Why.OTHERS
