# SPDX-License-Identifier: AGPL-3.0-or-later
"""The probes against the simulator, over real sockets: both interfaces, accounts of all kinds, what is broken."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.health import Report, State, Wanted, check_health
from replicator.health.checking import CLUSTERS, DATA_SERVICES, PROBES, REACH, RIGHTS, SIGN_IN
from replicator.prism.settings import Account, PrismSettings
from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import ClusterSpec, Scenario, VmSpec
from tests.limits import HANG_S

IQN = "iqn.2026-01.org.example:dr-service-01"


@asynccontextmanager
async def simulated(
    tmp_path: Path, *clusters: ClusterSpec, **changes: Any
) -> AsyncGenerator[Simulator, None]:
    if clusters:
        changes = {"clusters": list(clusters), "vms": [VmSpec(name="a", cluster=clusters[0].name)], **changes}  # fmt: skip
    with trio.fail_after(HANG_S):
        async with running_simulator(tmp_path / "sim", Scenario(**changes)) as sim:
            yield sim


async def checked(
    sim: Simulator, user: str = "backup", *, iscsi: bool = True, **changes: Any
) -> Report:
    given: dict[str, Any] = {
        "host": sim.address,
        "port": sim.port,
        "account": Account(user, sim.password(user)),
        "ca": sim.ca_path,
        **changes,
    }
    return await check_health(Wanted(settings=PrismSettings(**given), initiator=IQN, iscsi=iscsi))


def states(report: Report) -> dict[str, State]:
    return {probe.name: probe.state for probe in report.probes}


def found(report: Report, name: str) -> str:
    (probe,) = [probe for probe in report.probes if probe.name == name]
    return " | ".join(f"{each.text} -> {each.remedy}" for each in probe.findings)


@pytest.mark.parametrize("api", ["v3", "v4"])
@pytest.mark.parametrize("user", ["admin", "prism-admin", "backup"])
async def test_ready(tmp_path: Path, api: str, user: str) -> None:
    """With a role of its own too: what counts are its permissions."""
    async with simulated(tmp_path) as sim:
        report = await checked(sim, user, api_version=api)
        assert report.ready, report
        assert report.api == api
        assert states(report) == dict.fromkeys(PROBES, State.OK)


@pytest.mark.parametrize("api", ["v3", "v4"])
async def test_a_viewer_is_not_enough(tmp_path: Path, api: str) -> None:
    async with simulated(tmp_path) as sim:
        report = await checked(sim, "viewer", api_version=api)
    assert states(report)[RIGHTS] is State.FAILED
    assert "the account lacks Create_" in found(report, RIGHTS)


async def test_disks_are_read_over_rest_alone_only_by_v3(tmp_path: Path) -> None:
    async with simulated(tmp_path) as sim:
        report = await checked(sim, iscsi=False)
        assert report.api == "v4"
        assert states(report) == {**dict.fromkeys(PROBES, State.OK), DATA_SERVICES: State.FAILED}
        assert "set data_path = iscsi or prism_api_version = v3" in found(report, DATA_SERVICES)
        assert (await checked(sim, iscsi=False, api_version="v3")).ready


async def test_by_v3_the_account_must_be_known_to_the_element(tmp_path: Path) -> None:
    async with simulated(tmp_path) as sim:
        user = "central-only"
        report = await checked(sim, user, api_version="v3")
        assert states(report)[RIGHTS] is State.FAILED
        assert "prism_element_user" in found(report, RIGHTS)
        other = Account("backup", sim.password("backup"))
        better = await checked(sim, user, api_version="v3", element_account=other)
        assert "prism_element_user" not in found(better, RIGHTS)


async def test_a_wrong_password_is_tried_so_seldom_that_no_account_is_locked(
    tmp_path: Path,
) -> None:
    async with simulated(tmp_path) as sim:
        report = await checked(sim, account=Account("backup", "wrong"))
    assert states(report)[SIGN_IN] is State.FAILED
    assert "passfile" in found(report, SIGN_IN)


def no_address(*names: str) -> Callable[[str], ClusterSpec]:
    return lambda name: ClusterSpec(name=name, data_services=name not in names)


async def test_clusters_without_data_services(tmp_path: Path) -> None:
    make = no_address("cluster-b")
    async with simulated(tmp_path, make("cluster-a"), make("cluster-b")) as sim:
        both = await checked(sim)
        assert both.ready
        assert states(both)[DATA_SERVICES] is State.WARNING
        one = await checked(sim, cluster="cluster-b")
        assert states(one)[DATA_SERVICES] is State.FAILED
        assert "cluster-b: it has no data services address" in found(one, DATA_SERVICES)


async def test_a_cluster_that_is_not_available(tmp_path: Path) -> None:
    async with simulated(tmp_path) as sim:
        sim.cluster("cluster-a").available = False
        assert states(await checked(sim))[CLUSTERS] is State.WARNING
        assert states(await checked(sim, cluster="cluster-a"))[CLUSTERS] is State.FAILED


async def test_a_busy_prism_is_waited_for_and_one_that_stays_so_is_told(tmp_path: Path) -> None:
    async with simulated(tmp_path) as sim:
        sim.faults.add("rate-limit", "clusters", count=1, value=1)
        assert (await checked(sim, "admin")).ready
        sim.faults.add("rate-limit", "clusters", count=None, value=60)
        report = await checked(sim, "admin", api_version="v3")
        assert states(report)[SIGN_IN] is State.FAILED
        assert "prism_rate_rpm" in found(report, SIGN_IN)


async def test_a_certificate_of_somebody_else(tmp_path: Path) -> None:
    async with simulated(tmp_path) as sim:
        report = await checked(sim, ca=None)
    assert states(report)[REACH] is State.FAILED
    assert "prism_ca_cert" in found(report, REACH)
