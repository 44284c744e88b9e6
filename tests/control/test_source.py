# SPDX-License-Identifier: AGPL-3.0-or-later
"""The control API of a source: what it shows, what it takes, and that a push goes on over the same connection."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio

from replicator.cli.control import SOURCE, ControlClient
from replicator.cli.pushing import push_progress
from replicator.config import Config, check
from replicator.control.bandwidth import Regulator
from replicator.control.metrics import Live, Metrics
from replicator.control.server import NotFoundError, Page
from replicator.control.source import SourceApi, serve_source
from replicator.credentials import SourceCredentials
from replicator.errors import ReplicatorError, UsageError
from replicator.log import open_log
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.push.pusher import Outcome, Pusher
from tests.limits import HANG_S
from tests.sites import receiver_site, source_site


def config_of(folder: Path, **values: str) -> Config:
    return check({"state_dir": str(folder), "dr_host": "dr.example", **values})


@asynccontextmanager
async def source(folder: Path, **values: str) -> AsyncIterator[SourceApi]:
    async with open_log(folder / "events") as log:
        regulator = Regulator(config_of(folder, **values))
        yield SourceApi(regulator, Metrics(log, Live()))


async def ask(api: SourceApi, method: str, target: str, **body: Any) -> dict[str, Any]:
    answer = await api.handle(method, target, body)
    assert isinstance(answer, dict)
    return answer


async def test_the_throttle_is_shown_and_set(tmp_path: Path) -> None:
    async with source(tmp_path, max_bandwidth_mbps="7") as api:
        plain = {
            "mbps": 7,
            "origin": "max_bandwidth_mbps",
            "entry": None,
            "next_change": None,
            "next_mbps": None,
            "set_by_hand": None,
        }
        assert await ask(api, "GET", "/v1/throttle") == plain
        by_hand = {"origin": "replctl throttle", "set_by_hand": "50", "mbps": 50}
        assert await ask(api, "POST", "/v1/throttle", limit="50") == plain | by_hand
        table = {
            "origin": "replctl throttle",
            "entry": "* 3",
            "set_by_hand": "mon-sun 1:00-1:01 3; * 3",
            "mbps": 3,
        }
        answer = await ask(api, "POST", "/v1/throttle", limit="mon-sun 1:00-1:01 3;  * 3;")
        assert {**answer, "entry": "* 3"} == plain | table
        assert (await ask(api, "GET", "/v1/throttle?x"))["set_by_hand"] == table["set_by_hand"]
        assert await ask(api, "POST", "/v1/throttle", limit=" reset ") == plain


async def test_the_next_change_is_a_time_in_utc(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        config = config_of(tmp_path, max_bandwidth_schedule="* 08:00-18:00 50; * 0")
        regulator = Regulator(config, clock=lambda: 9 * 3600, offset=lambda _: 0)
        api = SourceApi(regulator, Metrics(log, Live()))
        answer = await ask(api, "GET", "/v1/throttle")
    assert answer["next_change"] == "1970-01-01T18:00:00.000Z"
    assert (answer["mbps"], answer["next_mbps"]) == (50, 0)
    assert answer["origin"] == "max_bandwidth_schedule"
    assert answer["entry"] == "* 08:00-18:00 50"


@pytest.mark.parametrize(
    ("request_", "body", "error", "text"),
    [
        ("GET /v1/status", {}, NotFoundError, "no such request to a source: GET /v1/status"),
        ("DELETE /v1/throttle", {}, NotFoundError, "no such request"),
        ("POST /metrics", {}, NotFoundError, "no such request"),
        ("GET //[", {}, UsageError, "not a request's target"),
        ("POST /v1/throttle", {}, UsageError, "limit: expected a rate"),
        ("POST /v1/throttle", {"limit": 50}, UsageError, "limit: expected a rate"),
        ("POST /v1/throttle", {"limit": "fast"}, UsageError, "limit: 'fast': expected Mbit/s"),
    ],
)
async def test_bad_requests_change_nothing(
    tmp_path: Path, request_: str, body: dict[str, Any], error: type[Exception], text: str
) -> None:
    method, target = request_.split()
    async with source(tmp_path, max_bandwidth_mbps="7") as api:
        with pytest.raises(error, match=text) as caught:
            await api.handle(method, target, body)
        assert type(caught.value) is error
        assert (await ask(api, "GET", "/v1/throttle"))["mbps"] == 7


async def test_metrics_by_the_control_socket(tmp_path: Path) -> None:
    async with source(tmp_path) as api:
        page = await api.handle("GET", "/metrics", {})
    assert isinstance(page, Page)
    assert b"# TYPE replicator_cycles_total counter" in page.body


class Watched:
    """What a link wraps its connections in: the throttle, with a look at what comes out of it."""

    def __init__(self, regulator: Regulator, enough: int) -> None:
        self.regulator = regulator
        self.connections = 0
        self.sent = 0
        self.enough = enough
        self.flowing = trio.Event()

    def wrap(self, stream: trio.abc.Stream) -> trio.abc.Stream:
        self.connections += 1
        return self.regulator.throttle.wrap(_Counting(stream, self))


class _Counting(trio.abc.Stream):
    def __init__(self, stream: trio.abc.Stream, watched: Watched) -> None:
        self._stream = stream
        self._watched = watched

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)
        self._watched.sent += len(data)
        if self._watched.sent >= self._watched.enough:
            self._watched.flowing.set()

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


async def test_a_push_that_is_under_way_feels_a_change_on_the_same_connection(
    tmp_path: Path,
) -> None:
    """At 1 Mbit/s the 8 MiB would take more than a minute; a few Mbit in, the cap is lifted by the control socket."""
    disk = tmp_path / "disk.raw"
    await trio.Path(disk).write_bytes(random.Random(5).randbytes(8 << 20))
    with TemporaryDirectory(dir="/tmp") as short, trio.fail_after(HANG_S):
        control = Path(short) / "c.sock"
        async with (
            receiver_site(tmp_path / "rx") as rx,
            source_site(
                tmp_path / "sx",
                rx.port,
                {"disk-0": disk},
                max_bandwidth_mbps="1",
                control_socket=str(control),
            ) as sx,
            trio.open_nursery() as nursery,
        ):
            regulator = Regulator(sx.config)
            watched = Watched(regulator, 200_000)
            link = Link(sx.config, SourceCredentials(sx.config), watched)
            pusher = Pusher(sx.config, sx.log, sx.source, link)
            live = Live(throttle_mbps=lambda: regulator.throttle.mbps)
            metrics, push_ = Metrics(sx.log, live), partial(push_progress, pusher)
            await serve_source(nursery, sx.config, regulator, metrics, push_)
            outcomes: list[Outcome] = []
            done = trio.Event()

            async def push() -> None:
                outcomes.append(await pusher.push(Want.SEED))
                done.set()

            nursery.start_soon(push)
            await watched.flowing.wait()
            client = ControlClient(control, SOURCE)
            assert (await client.get("/v1/throttle"))["mbps"] == 1
            assert not outcomes
            assert watched.sent < 1 << 20
            answer = await client.get("/v1/push")
            assert (answer["vm"], answer["push"]["point"], answer["push"]["kind"]) == (
                "web", 1, "seed",
            )  # fmt: skip
            assert answer["push"]["total"] == 8 << 20
            assert answer["push"]["done"] < 8 << 20
            assert [store.landing is None for store in rx.stores.all] == [False]
            assert (await client.post("/v1/throttle", {"limit": "off"}))["mbps"] == 0
            await done.wait()
            assert await client.get("/v1/push") == {"vm": "web", "push": None}
            assert rx.store.landing is None
            nursery.cancel_scope.cancel()
        assert len(outcomes) == 1
        assert watched.connections == 1
        assert watched.sent > 8 << 20
        assert not outcomes[0].resumed
    with pytest.raises(ReplicatorError, match="nothing that pushes is running"):
        await client.get("/v1/throttle")
