# SPDX-License-Identifier: AGPL-3.0-or-later
"""Faults as a client meets them: each strikes where and as often as was asked, and then no more."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio
import trio.testing

from replicator.simulator.faults import KINDS
from replicator.simulator.model import Task
from replicator.simulator.running import Simulator
from tests.limits import HANG_S
from tests.simulator.lab import Answer, Client, small_simulator

CLUSTERS = "/api/clustermgmt/v4.0/config/clusters"
GROUPS = "/api/volumes/v4.0/config/volume-groups"
DOCS = Path(__file__).parents[2] / "docs" / "simulator.md"


async def make_group(simulator: Simulator, client: Client, name: str = "one") -> Answer:
    body = {"name": name, "clusterReference": simulator.cluster("cluster-a").uuid}
    return await client.ask("POST", GROUPS, body, {"NTNX-Request-Id": str(uuid4())})


async def ended(simulator: Simulator) -> Task:
    """The newest task, once it has ended."""
    task = list(simulator.world.tasks.values())[-1]
    with trio.fail_after(HANG_S):
        while task.completed_at is None:
            await trio.lowlevel.checkpoint()
    return task


async def test_a_fault_strikes_where_and_as_often_as_it_was_asked_to(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.faults.add("server-error", "^GET .*/clusters$", count=2, every=2, value=503)
        statuses = [(await client.ask("GET", CLUSTERS)).status for _ in range(6)]
        assert statuses == [200, 503, 200, 503, 200, 200]
        assert (await client.ask("GET", GROUPS)).status == 200


@pytest.mark.parametrize(
    ("kind", "value", "status", "header"),
    [
        ("rate-limit", 7, 429, "7"),
        ("rate-limit", 0, 429, None),
        ("rate-limit-400", 0, 400, None),
        ("unauthorized", 0, 401, None),
        ("server-error", 500, 500, None),
        ("server-error", 0, 503, None),
        ("server-error", 504, 504, None),
        ("etag-stale", 0, 412, None),
    ],
)
async def test_a_request_is_refused_once(
    tmp_path: Path, kind: Any, value: float, status: int, header: str | None
) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.faults.add(kind, "clusters", value=value)
        refused = await client.ask("GET", CLUSTERS)
        assert refused.status == status
        assert refused.headers.get("retry-after") == header
        if status in {400, 429}:
            assert b"RATE_LIMIT" in refused.body
        assert (await client.ask("GET", CLUSTERS)).status == 200


async def test_v3_says_that_a_version_is_stale_as_a_conflict(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.faults.add("etag-stale", "nutanix")
        assert (await client.ask("PUT", "/api/nutanix/v3/vms/x", {})).status == 409


async def test_a_request_is_late(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.faults.add("latency", "clusters", value=0.2)
        before = trio.current_time()
        assert (await client.ask("GET", CLUSTERS)).status == 200
        assert trio.current_time() - before >= 0.2


@pytest.mark.parametrize(("kind", "made"), [("reset-before", 0), ("reset-after", 1)])
async def test_a_connection_is_reset_before_or_after_the_request_is_carried_out(
    tmp_path: Path, kind: Any, made: int
) -> None:
    async with small_simulator(tmp_path) as simulator:
        async with Client(simulator) as client:
            simulator.faults.add(kind, "POST .*volume-groups")
            with pytest.raises(trio.BrokenResourceError) as caught:
                await make_group(simulator, client)
            assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert len(simulator.world.tasks) == made
        async with Client(simulator) as client:
            assert (await make_group(simulator, client, "two")).status == 202


async def test_cookies_are_forgotten(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator:
        async with Client(simulator) as client:
            cookie = (await client.ask("GET", CLUSTERS)).headers["set-cookie"].partition(";")[0]
        async with Client(simulator, user=None) as client:
            assert (await client.ask("GET", CLUSTERS, headers={"Cookie": cookie})).status == 200
            simulator.faults.add("forget-sessions")
            assert (await client.ask("GET", CLUSTERS, headers={"Cookie": cookie})).status == 401


@pytest.mark.parametrize(
    ("kind", "groups", "code"),
    [
        ("task-failed", 0, "VMM-10000"),
        ("half-created", 1, "VMM-10000"),
        ("etag-stale-in-task", 0, "VMM-30303"),
    ],
)
async def test_a_task_fails_with_or_without_what_it_was_to_make(
    tmp_path: Path, kind: Any, groups: int, code: str
) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.faults.add(kind, "VolumeGroup")
        assert (await make_group(simulator, client)).status == 202
        task = await ended(simulator)
        assert task.status == "FAILED"
        assert task.error is not None
        assert task.error.code == code
        assert len(simulator.world.volume_groups) == groups


async def test_a_task_is_stuck_or_not_found_at_first(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        simulator.faults.add("task-stuck", "VolumeGroupCreate")
        simulator.faults.add("task-not-found")
        made = (await make_group(simulator, client)).json["data"]["extId"]
        path = f"/api/prism/v4.0/config/tasks/{made}"
        assert (await client.ask("GET", path)).status == 404
        with trio.fail_after(HANG_S):
            while (await client.ask("GET", path)).json["data"]["status"] != "RUNNING":
                await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (await client.ask("GET", path)).json["data"]["status"] == "RUNNING"


async def test_faults_are_put_listed_and_cleared_over_https(tmp_path: Path) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        faults = [
            {"kind": "server-error", "where": "clusters", "count": None, "value": 500},
            {"kind": "latency", "every": 3},
        ]
        put = await client.ask("POST", "/simulator/faults", faults)
        assert [each["kind"] for each in put.json["faults"]] == ["server-error", "latency"]
        assert (await client.ask("GET", CLUSTERS)).status == 500
        listed = (await client.ask("GET", "/simulator/faults")).json["faults"]
        assert listed[0]["struck"] == 1
        assert (await client.ask("DELETE", "/simulator/faults")).json == {"faults": []}
        assert (await client.ask("GET", CLUSTERS)).status == 200


@pytest.mark.parametrize(
    "given",
    [
        7,
        {"kind": "no-such"},
        {"where": "x"},
        {"kind": "latency", "where": "("},
        {"kind": "latency", "every": 0},
        {"kind": "latency", "count": 0},
        {"kind": "latency", "value": -1},
        {"kind": "latency", "value": "1"},
        {"kind": "latency", "struck": 1},
        {"kind": "latency", "where": "x" * 1000},
    ],
)
async def test_what_is_no_fault_is_refused(tmp_path: Path, given: object) -> None:
    async with small_simulator(tmp_path) as simulator, Client(simulator) as client:
        refused = await client.ask("POST", "/simulator/faults", given)
        assert refused.status == 400
        assert refused.json["error"]
        assert simulator.faults.all == []


def test_the_manual_has_every_fault() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", DOCS.read_text(), re.MULTILINE)
    assert sorted(set(KINDS) - set(rows)) == []
