# SPDX-License-Identifier: AGPL-3.0-or-later
"""The control API on a receiver with one VM and two points; test clones have tests of their own."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from receiver.failover.clone import CloneManager
from receiver.service.control import ControlApi, _while_running
from replicator.control.metrics import Live, Metrics
from replicator.control.server import NotFoundError, Page
from replicator.domain import model
from replicator.errors import RefusedError, UsageError
from replicator.wire import messages as m
from tests.push.lab import raw_push, raw_source
from tests.sites import receiver_site, source_site


@asynccontextmanager
async def control(folder: Path) -> AsyncIterator[ControlApi]:
    disk = folder / "disk.raw"
    await trio.Path(disk).write_bytes(random.Random(1).randbytes(300_000))
    async with (
        receiver_site(folder / "rx") as rx,
        source_site(folder / "sx", rx.port, {"disk-0": disk}) as sx,
        trio.open_nursery() as nursery,
    ):
        await sx.push()
        sx.write("disk-0", 5, b"changed")
        await sx.push()
        await rx.settled()
        clones = CloneManager(rx.config, rx.log, rx.stores, nursery)
        yield ControlApi(rx.log, rx.stores, clones, folder, Metrics(rx.log, Live()))
        nursery.cancel_scope.cancel()


async def ask(api: ControlApi, method: str, target: str, **body: Any) -> list[dict[str, Any]]:
    answer = await api.handle(method, target, body)
    assert not isinstance(answer, Page)
    return [answer] if isinstance(answer, dict) else [line async for line in answer]


async def test_status_points_and_history(tmp_path: Path) -> None:
    async with control(tmp_path) as api:
        (status,) = await ask(api, "GET", "/v1/status")
        (vm,) = status["vms"]
        assert (vm["vm"], vm["newest_point"], vm["warnings"]) == ("web", 2, [])
        for name in ("web", vm["uuid"]):
            (points,) = await ask(api, "GET", f"/v1/vms/{name}/points")
            assert [point["point"] for point in points["points"]] == [1, 2]
        (all_,) = await ask(api, "GET", "/v1/vms/web/history")
        kinds = [event["kind"] for event in all_["events"]]
        assert {"registered", "seed-committed", "cycle-committed", "delta-applied"} == set(kinds)
        (some,) = await ask(api, "GET", "/v1/vms/web/history?after=1&limit=2")
        assert some["events"] == all_["events"][1:3]


async def test_status_shows_what_has_come_of_a_push_that_is_landing(tmp_path: Path) -> None:
    async with receiver_site(tmp_path / "rx") as rx, trio.open_nursery() as nursery:
        clones = CloneManager(rx.config, rx.log, rx.stores, nursery)
        api = ControlApi(rx.log, rx.stores, clones, tmp_path, Metrics(rx.log, Live()))
        push = raw_push(random.Random(2).randbytes(300_000))

        async def shown() -> dict[str, Any] | None:
            (status,) = await ask(api, "GET", "/v1/status")
            found: dict[str, Any] | None = status["vms"][0]["push"]
            return found

        async with raw_source(rx.port) as source:
            assert isinstance(await source.ask(push.opened), m.Ready)
            before = await shown()
            assert before is not None
            assert (before["point"], before["kind"], before["received"]) == (1, "seed", 0)
            await source.data(0, 0, push.stream[:200_000])
            while not isinstance(await source.hear_any(), m.Landed):
                pass
            after = await shown()
            assert after == {**before, "received": 200_000}
            await source.data(0, 200_000, push.stream[200_000:])
            assert isinstance(await source.ask(push.finish), m.Committed)
            assert await shown() is None
        nursery.cancel_scope.cancel()


async def test_history_is_the_newest_unless_it_is_paged(tmp_path: Path) -> None:
    async with control(tmp_path) as api:
        (all_,) = await ask(api, "GET", "/v1/vms/web/history")
        ids = [event["id"] for event in all_["events"]]
        assert (ids, all_["more"]) == (list(range(1, len(ids) + 1)), False)
        for query, expected, more in (
            ("limit=2", ids[-2:], True),
            (f"limit={len(ids)}", ids, False),
            ("after=0&limit=2", ids[:2], True),
            (f"after={len(ids) - 2}&limit=2", ids[-2:], False),
        ):
            (page,) = await ask(api, "GET", f"/v1/vms/web/history?{query}")
            assert [event["id"] for event in page["events"]] == expected, query
            assert page["more"] is more, query


async def test_status_warns_of_a_test_clone_and_of_one_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control(tmp_path) as api:
        store = api._stores.find("web")
        async with store.changing() as vm:
            vm.start_test(model.TestClone("c1", 1, 1_700_000_000_000_000))
        kept = (
            "test clone c1 of point 1 since 2023-11-14T22:13:20.000Z:"
            " it keeps point 1 and all later ones from being released"
        )
        dead = "the clone's machine is not running: undo, or undo and test again"
        (status,) = await ask(api, "GET", "/v1/status")
        assert status["vms"][0]["warnings"] == [kept, dead]
        running = SimpleNamespace(running=True)
        monkeypatch.setitem(cast("dict[Any, Any]", api._clones._clones), store.uuid, running)
        (status,) = await ask(api, "GET", "/v1/status")
        assert status["vms"][0]["warnings"] == [kept]


async def test_verify_says_how_far_it_is_and_what_it_found(tmp_path: Path) -> None:
    async with control(tmp_path) as api:
        *progress, last = await ask(api, "POST", "/v1/vms/web/verify", point=1)
        assert progress
        assert all(set(line) == {"progress"} for line in progress)
        assert last["result"]["good"] is True
        assert (last["result"]["point"], last["result"]["damages"]) == (1, [])


@pytest.mark.parametrize(
    ("method", "target", "body", "error"),
    [
        ("GET", "/", {}, NotFoundError),
        ("GET", "/v1/vms/web", {}, NotFoundError),
        ("DELETE", "/v1/status", {}, NotFoundError),
        ("GET", "/v1/vms/web/verify", {}, NotFoundError),
        ("POST", "/v1/vms/web/failover/nothing", {}, NotFoundError),
        ("GET", "//[", {}, UsageError),
        ("GET", "/v1/vms/web/history?after=-1", {}, UsageError),
        ("GET", "/v1/vms/web/history?limit=%C2%B2", {}, UsageError),
        ("GET", "/v1/vms/web/history?after=1111111111111111111", {}, UsageError),
        ("POST", "/v1/vms/web/verify", {"point": 0}, UsageError),
        ("POST", "/v1/vms/web/verify", {"point": True}, UsageError),
        ("POST", "/v1/vms/web/verify", {"point": "1"}, UsageError),
        ("POST", "/v1/vms/web/verify", {"point": 3}, RefusedError),
        ("POST", "/v1/vms/web/export", {}, UsageError),
        ("POST", "/v1/vms/web/export", {"disk": "disk-7"}, RefusedError),
        ("GET", "/v1/vms/db/points", {}, RefusedError),
        ("GET", "/v1/throttle", {}, UsageError),
        ("POST", "/metrics", {}, NotFoundError),
        ("GET", "/v1/vms/..%2F..%2Fetc/points", {}, RefusedError),
    ],
)
async def test_what_cannot_be_answered(
    tmp_path: Path, method: str, target: str, body: dict[str, Any], error: type[Exception]
) -> None:
    async with control(tmp_path) as api:
        with pytest.raises(error):
            await ask(api, method, target, **body)


async def test_an_error_of_the_work_comes_out_of_its_progress() -> None:
    async def work() -> None:
        await trio.lowlevel.checkpoint()
        raise RefusedError("no")

    with pytest.raises(RefusedError, match="no"):
        [line async for line in _while_running(work, dict)]
