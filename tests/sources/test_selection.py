# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which VMs ``vm``, ``exclude`` and ``cluster`` choose."""

from __future__ import annotations

import re

import pytest

from replicator.errors import UsageError
from replicator.prism.types import Cluster, VmSummary
from replicator.sources.selection import is_chosen, is_one_vm, select

A, B = "0005b6f1-0000-0000-0000-0000000000aa", "0005b6f1-0000-0000-0000-0000000000bb"
CLUSTERS = [
    Cluster(uuid, name, None, None, "7.3", available=True)
    for uuid, name in ((A, "cluster-a"), (B, "cluster-b"))
]


def uuid(number: int) -> str:
    return f"aaaaaaaa-0000-4000-8000-{number:012d}"


def vm(number: int, name: str, cluster: str = A) -> VmSummary:
    return VmSummary(uuid(number), name, cluster, "ON")


VMS = [
    vm(1, "web-1"),
    vm(2, "web-2", B),
    vm(3, "Web-3"),
    vm(4, "db"),
    vm(5, "twin"),
    vm(6, "twin", B),
    vm(7, "app[1]"),
    vm(8, "a, b"),
]
NAMES = {each.uuid: each.name for each in VMS}


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        ({}, [8, 7, 4, 5, 6, 1, 2, 3]),
        ({"vm": "web-*"}, [1, 2]),
        ({"vm": "[Ww]eb-?"}, [1, 2, 3]),
        ({"vm": " db , web-1,db,, "}, [4, 1]),
        ({"vm": uuid(8)}, [8]),
        ({"vm": uuid(5).upper()}, [5]),
        ({"vm": "app[1]"}, [7]),
        ({"vm": "*", "exclude": "*"}, None),
        ({"vm": "*", "exclude": f"web-*,{uuid(5)}, twin"}, [8, 7, 4, 3]),
        ({"vm": "*", "cluster": "cluster-b"}, [6, 2]),
        ({"vm": "*", "cluster": B.upper()}, [6, 2]),
        ({"vm": "twin", "cluster": "cluster-b"}, [6]),
        ({"vm": "twin", "exclude": uuid(6)}, [5]),
        ({"vm": f"twin,{uuid(5)}", "exclude": uuid(6)}, [5]),
        ({"vm": "web-1", "exclude": "web-*"}, None),
        ({"vm": "WEB-1"}, None),
    ],
)
def test_the_vms_chosen(keys: dict[str, str], chosen: list[int] | None) -> None:
    if chosen is None:
        with pytest.raises(UsageError, match=r"^vm: '.*' chooses none of the [0-9] VM\(s\)"):
            select(VMS, CLUSTERS, **keys)
        return
    by_name = sorted((uuid(number) for number in chosen), key=lambda each: (NAMES[each], each))
    assert [each.uuid for each in select(VMS, CLUSTERS, **keys).vms] == by_name


def test_a_name_that_two_vms_have_is_refused_with_both_uuids() -> None:
    expected = re.escape(f"vm: 'twin' is the name of 2 VMs ({uuid(5)} and {uuid(6)}): name the one")
    with pytest.raises(UsageError, match=expected):
        select(VMS, CLUSTERS, vm="db,twin")
    # A VM may be called what another one's UUID is.
    with pytest.raises(UsageError, match="is the name of 2 VMs"):
        select([*VMS, vm(9, uuid(4))], CLUSTERS, vm=uuid(4))


def test_two_of_one_name_that_a_glob_chose_are_told_apart() -> None:
    found = select(VMS, CLUSTERS, vm="t*,db")
    assert found.labels == {
        uuid(4): "db",
        uuid(5): f"twin ({uuid(5)})",
        uuid(6): f"twin ({uuid(6)})",
    }


def test_what_is_named_and_not_there_is_told() -> None:
    found = select(VMS, CLUSTERS, vm="db,gone,web-9*,web-1", exclude="web-1")
    assert ([each.name for each in found.vms], found.missing) == (["db"], ("gone",))


def test_nothing_chosen_says_out_of_what() -> None:
    with pytest.raises(UsageError) as caught:
        select(VMS, CLUSTERS, vm="x*", exclude="web-*", cluster="cluster-b")
    assert str(caught.value) == (
        "vm: 'x*' chooses none of the 2 VM(s) of cluster cluster-b that Prism lists without those of exclude = web-*"
    )
    with pytest.raises(UsageError, match=r"none of the 0 VM\(s\)"):
        select([], CLUSTERS)


def test_a_cluster_that_is_not_there_or_not_clear_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no cluster 'c' \(known: cluster-a, cluster-b\)"):
        select(VMS, CLUSTERS, cluster="c")
    named = [Cluster(each.uuid, "x", None, None, "", available=True) for each in CLUSTERS]
    with pytest.raises(UsageError, match=rf"'x' is the name of {A} and {B}: give the UUID"):
        select(VMS, named, cluster="x")


@pytest.mark.parametrize(
    ("text", "one"),
    [("web", True), (uuid(1), True), (" web ,", True), ("*", False), ("a,b", False), ("", False)],
)
def test_what_names_one_vm(text: str, one: bool) -> None:
    assert is_one_vm(text) is one


def test_a_vm_by_itself() -> None:
    assert is_chosen(uuid(1), "web-1", "web-*", "")
    assert not is_chosen(uuid(1), "web-1", "web-*", uuid(1))
    assert not is_chosen(uuid(1), "web-1", "", "")
