# SPDX-License-Identifier: AGPL-3.0-or-later
"""The five probes against a scripted Prism that speaks v3, and a real iSCSI target."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.health import Report, State, Wanted, check_health
from replicator.health.checking import CLUSTERS, DATA_SERVICES, PROBES, REACH, RIGHTS, SIGN_IN
from replicator.iscsi import Portal
from replicator.prism.settings import Account
from tests.iscsi.lab import INITIATOR, target_daemon
from tests.prism import lab
from tests.prism.lab import PE, Asked, Said, Script
from tests.prism_v3.fake import Fake, central_entity, cluster_entity, refused

NOW = 1_800_000_000.0


@asynccontextmanager
async def served(handler: lab.Handler) -> AsyncGenerator[Script, None]:
    async with trio.open_nursery() as nursery:
        yield Script(nursery, handler)
        nursery.cancel_scope.cancel()


async def checked(
    tmp_path: Path,
    fake: Fake,
    *,
    portal: Portal | None = None,
    iscsi: bool = False,
    handler: lab.Handler | None = None,
    **changes: Any,
) -> Report:
    async with served(handler or fake) as script:
        changes = {"api_version": "v3", "rate_rpm": 30, **changes}
        wanted = Wanted(
            settings=lab.settings(tmp_path, **changes),
            initiator=INITIATOR,
            data_services=portal,
            iscsi=iscsi,
            dial=script.dial,
            clock=lambda: NOW,
        )
        return await check_health(wanted)


def states(report: Report) -> dict[str, State]:
    return {probe.name: probe.state for probe in report.probes}


def found(report: Report, name: str) -> str:
    """What a probe found, and what to do, in one text."""
    (probe,) = [probe for probe in report.probes if probe.name == name]
    return " | ".join(f"{each.text} -> {each.remedy}" for each in probe.findings)


async def test_all_is_well(tmp_path: Path) -> None:
    async with target_daemon() as daemon:
        await daemon.add_target()
        report = await checked(tmp_path, Fake(), portal=daemon.portal, iscsi=True)
    assert report.ready, report
    assert states(report) == dict.fromkeys(PROBES, State.OK)
    assert (report.prism, report.api) == ("prism.example.test:9440", "v3")
    assert f"offers 1 target to {INITIATOR}" in found(report, DATA_SERVICES)


async def test_auto_falls_back_to_v3_and_stays_within_the_burst_of_requests(tmp_path: Path) -> None:
    """At 30 requests a minute the 31st of a host would have to wait."""
    fake = Fake()
    asked: dict[str, int] = {}

    async def counting(request: Asked) -> Said:
        asked[request.host] = asked.get(request.host, 0) + 1
        return await fake(request)

    report = await checked(tmp_path, fake, handler=counting, api_version="auto")
    assert (report.ready, report.api) == (True, "v3")
    assert max(asked.values()) <= 30


async def test_each_probe_is_told_when_it_is_done(tmp_path: Path) -> None:
    told: list[str] = []
    async with served(Fake()) as script:
        settings = lab.settings(tmp_path, api_version="v3")
        wanted = Wanted(settings=settings, initiator=INITIATOR, iscsi=False, dial=script.dial)
        await check_health(wanted, lambda probe: told.append(probe.name))
    assert told == list(PROBES)


async def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        settings = lab.settings(tmp_path, host="127.0.0.1", port=port)
        report = await check_health(Wanted(settings=settings, initiator=INITIATOR))
    assert list(states(report).values()) == [State.FAILED, *[State.NOT_RUN] * 4]
    assert "firewalls" in found(report, REACH)
    assert report.api is None


async def test_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    report = await checked(tmp_path, Fake(), ca=None)
    assert states(report)[REACH] is State.FAILED
    assert "prism_ca_cert" in found(report, REACH)
    assert "prism_insecure" in found(report, REACH)


async def test_one_that_is_not_checked_is_a_warning(tmp_path: Path) -> None:
    report = await checked(tmp_path, Fake(), ca=None, insecure=True)
    assert states(report)[REACH] is State.WARNING
    assert report.ready


async def test_a_clock_that_is_off_is_a_warning(tmp_path: Path) -> None:
    fake = Fake()
    fake.before = lambda asked: (
        Said(200, {}, {"date": formatdate(NOW + 3600, usegmt=True)})
        if asked.path.endswith("/versions")
        else None
    )
    report = await checked(tmp_path, fake)
    assert states(report)[REACH] is State.WARNING
    assert "3600 s ahead" in found(report, REACH)
    assert report.ready


async def test_a_wrong_password(tmp_path: Path) -> None:
    fake = Fake()
    fake.before = lambda asked: (
        Said(401, b"<html>no</html>", {"content-type": "text/html"})
        if not asked.path.endswith("/versions")
        else None
    )
    report = await checked(tmp_path, fake)
    assert list(states(report).values()) == [
        State.OK,
        State.FAILED,
        State.NOT_RUN,
        State.NOT_RUN,
        State.OK,  # data_path = rest needs none
    ]
    assert "passfile" in found(report, SIGN_IN)
    assert "pass:word" not in str(report)


async def test_clusters_that_may_not_be_seen_do_not_hide_what_else_lacks(tmp_path: Path) -> None:
    fake = Fake()
    fake.before = lambda asked: (
        refused(403, "ACCESS_DENIED") if asked.path.endswith("clusters/list") else None
    )
    report = await checked(tmp_path, fake, iscsi=True)
    assert states(report) == {
        REACH: State.OK,
        SIGN_IN: State.OK,
        CLUSTERS: State.FAILED,
        RIGHTS: State.FAILED,
        DATA_SERVICES: State.NOT_RUN,
    }
    assert "View_Cluster" in found(report, CLUSTERS)


async def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    report = await checked(tmp_path, Fake(), cluster="cluster-z", iscsi=True)
    assert states(report)[CLUSTERS] is State.FAILED
    assert "there is no cluster cluster-z; there are cluster-a" in found(report, CLUSTERS)
    assert states(report)[DATA_SERVICES] is State.NOT_RUN


async def test_an_element_that_does_not_answer(tmp_path: Path) -> None:
    fake = Fake()
    fake.before = lambda asked: Said(cut=True) if asked.host == PE else None
    report = await checked(tmp_path, fake)
    assert states(report)[CLUSTERS] is State.FAILED
    assert f"let this host reach {PE} at TCP 9440" in found(report, CLUSTERS)


async def test_an_account_that_may_only_look(tmp_path: Path) -> None:
    fake = Fake(user="svc-dr", roles={"Prism Viewer": ("View_Cluster",)})
    report = await checked(tmp_path, fake, account=Account("svc-dr", "secret"))
    assert states(report)[RIGHTS] is State.FAILED
    assert "Create_Volume_Group" in found(report, RIGHTS)


def without_address(entity: dict[str, Any]) -> None:
    del entity["status"]["resources"]["network"]["external_data_services_ip"]


def with_no_address_at_all(entity: dict[str, Any]) -> None:
    entity["status"]["resources"]["network"]["external_data_services_ip"] = "not an address!"


@pytest.mark.parametrize("change", [without_address, with_no_address_at_all])
async def test_no_data_services_address(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    fake = Fake()
    change(fake.clusters[0])
    report = await checked(tmp_path, fake, iscsi=True)
    assert states(report)[DATA_SERVICES] is State.FAILED
    assert "give dsip" in found(report, DATA_SERVICES)


async def test_one_cluster_of_two_without_data_services_is_a_warning(tmp_path: Path) -> None:
    async with target_daemon() as daemon:
        await daemon.add_target()
        # The cluster's own address has no port: the portal's is taken over by dsip in every other test.
        other = cluster_entity()
        other["metadata"]["uuid"] = "0005b6f1-0000-0000-0000-0000000000bb"
        other["status"]["name"] = "cluster-b"
        without_address(other)
        fake = Fake(clusters=[cluster_entity(), other, central_entity()])
        report = await checked(tmp_path, fake, portal=daemon.portal, iscsi=True)
        assert report.ready
    report = await checked(tmp_path, fake, cluster="cluster-b", iscsi=True)
    assert states(report)[DATA_SERVICES] is State.FAILED
    assert "cluster-b: it has no data services address" in found(report, DATA_SERVICES)


async def test_a_closed_port_is_told_with_address_and_initiator(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        portal = Portal("127.0.0.1", taken.getsockname()[1])
        report = await checked(tmp_path, Fake(), portal=portal, iscsi=True)
    assert states(report)[DATA_SERVICES] is State.FAILED
    text = found(report, DATA_SERVICES)
    assert f"no iSCSI portal at {portal} for {INITIATOR}" in text
    assert f"let this host reach TCP {portal.port} of 127.0.0.1" in text


async def test_rest_needs_no_data_services(tmp_path: Path) -> None:
    report = await checked(tmp_path, Fake(), iscsi=False)
    assert "not needed" in found(report, DATA_SERVICES)
