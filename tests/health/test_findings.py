# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is judged from what Prism says, without asking it."""

from __future__ import annotations

import pytest

from replicator.health.findings import (
    Finding,
    Probe,
    Report,
    State,
    judge_access,
    judge_clock,
    judge_clusters,
    remedy_for,
    soften,
)
from replicator.prism.errors import (
    PrismAuthError,
    PrismError,
    PrismPermissionError,
    PrismRateLimitedError,
    PrismTlsError,
    PrismUnreachableError,
)
from replicator.prism.types import Access, Cluster


def cluster(name: str, *, available: bool = True) -> Cluster:
    return Cluster(f"uuid-of-{name}", name, "198.51.100.20", None, "7.3", available)


def states(findings: list[Finding]) -> list[State]:
    return [finding.state for finding in findings]


@pytest.mark.parametrize(
    ("skew_s", "expected"), [(None, []), (60.0, []), (-60.0, []), (61.0, [State.WARNING])]
)
def test_clocks_that_differ_are_a_warning(skew_s: float | None, expected: list[State]) -> None:
    assert states(judge_clock(skew_s)) == expected


def test_the_clock_that_is_behind_is_named() -> None:
    assert "600 s behind this host's" in judge_clock(-600.0)[0].text
    assert "600 s ahead of this host's" in judge_clock(600.0)[0].text


def test_a_cluster_that_is_away_is_a_warning_beside_another() -> None:
    a, b = cluster("a"), cluster("b", available=False)
    assert states(judge_clusters([a, b], "")) == [State.OK, State.WARNING]
    assert states(judge_clusters([a, b], "a")) == [State.OK]
    assert states(judge_clusters([a, b], "uuid-of-b")) == [State.FAILED]


def test_no_cluster_and_a_cluster_that_is_not_there() -> None:
    assert states(judge_clusters([], "")) == [State.FAILED]
    (missing,) = judge_clusters([cluster("a"), cluster("b")], "c")
    assert missing.state is State.FAILED
    assert "no cluster c; there are a, b" in missing.text


def test_a_right_that_lacks_is_named_and_one_that_cannot_be_seen_is_a_warning() -> None:
    found = judge_access(
        [
            Access("backup", granted=True, detail="may list"),
            Access("backup", granted=False, lacks="Create_Volume_Group", detail="by its role"),
            Access("backup", granted=False, lacks="Delete_Volume_Group", detail="by its role"),
            Access("vms", granted=True),
            Access("vms", granted=None, detail="its roles cannot be seen"),
            Access("clusters", granted=True, detail="role Prism Admin"),
        ]
    )
    assert states(found) == [State.FAILED, State.WARNING, State.OK]
    assert "Create_Volume_Group, Delete_Volume_Group" in found[0].text
    assert found[0].remedy is not None
    assert "Create_Volume_Group, Delete_Volume_Group" in found[0].remedy
    assert states(judge_access([])) == [State.WARNING]


def test_each_permission_is_named_once_and_an_account_elsewhere_is_no_permission() -> None:
    found = judge_access(
        [
            Access("backup", granted=False, lacks="View_Cluster", detail="may not list"),
            Access("backup", granted=False, lacks="Create_Image, View_Cluster", detail="by role"),
            Access("backup", granted=False, detail="the Element is strange", remedy="know it"),
            Access("vms", granted=False, detail="the Element is strange", remedy="know it"),
            Access("vms", granted=True, detail="by its role"),
        ]
    )
    assert [(each.text, each.remedy) for each in found if "strange" in each.text] == [
        ("backup: the Element is strange", "know it"),
        ("vms: the Element is strange", "know it"),
    ]
    (lacks,) = [each for each in found if "lacks" in each.text]
    assert "the account lacks View_Cluster, Create_Image (may not list)" in lacks.text
    assert states(found) == [State.FAILED] * 3


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PrismTlsError("x"), "prism_ca_cert"),
        (PrismTlsError("x"), "prism_insecure"),
        (PrismUnreachableError("x"), "firewalls"),
        (PrismAuthError("x"), "passfile"),
        (PrismPermissionError("x", "View_Cluster"), "View_Cluster"),
        (PrismRateLimitedError("x"), "prism_rate_rpm"),
        (PrismError("x"), "alerts"),
    ],
)
def test_each_error_has_its_remedy(error: PrismError, expected: str) -> None:
    assert expected in remedy_for(error)


def test_ready_is_everything_looked_at_and_nothing_failed() -> None:
    def report(*found: State) -> Report:
        probes = [Probe("p", 0.1, (Finding(state, ""),)) for state in found]
        return Report("p:9440", "v4", 1.0, tuple(probes))

    assert report(State.OK, State.WARNING).ready
    assert not report(State.OK, State.FAILED).ready
    assert not report(State.OK, State.NOT_RUN).ready
    assert not Report("p:9440", None, 1.0, (Probe("p", 0.0, ()),)).ready


def test_what_fails_for_one_cluster_is_a_warning_where_another_works() -> None:
    found = [Finding(State.FAILED, "a", "do this"), Finding(State.OK, "b")]
    assert soften(found, enough=False) == found
    assert soften(found, enough=True)[0] == Finding(State.WARNING, "a", "do this")
