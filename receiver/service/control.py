# SPDX-License-Identifier: AGPL-3.0-or-later
"""The control API that `replctl` uses on the receiver's host (docs/json.md): what it answers, route by route."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

import msgspec
import trio

from receiver.export.point_export import export_disk
from receiver.failover.clone import CloneManager
from receiver.store.stores import Stores
from receiver.store.verify import verify_point
from receiver.store.vm_store import VmStore
from replicator.control.metrics import PATH, Metrics
from replicator.control.server import Answer, NotFoundError
from replicator.disk import Extent
from replicator.domain.sampling import first_day
from replicator.domain.views import event_info, point_info, push_info, vm_status
from replicator.errors import RefusedError, UsageError
from replicator.log import EventLog, Wanted, actions
from replicator.log.usage import sampling_of
from replicator.nursery import flat_nursery
from replicator.push.rpo import forecast_s

_HISTORY_MAX = 10_000
_PROGRESS_S = 0.2
#: Ranges in one line of an answer.
_ROWS = 4096

Lines = AsyncGenerator[dict[str, Any], None]


class ControlApi:
    """Answers control requests. Every method may raise an error of the tree, which the client gets in one line."""

    def __init__(
        self,
        log: EventLog,
        stores: Stores,
        clones: CloneManager,
        run_dir: Path,
        metrics: Metrics,
        *,
        warnings: Callable[[float], list[str]] = lambda _: [],
        rpo_target_s: int | None = None,
    ) -> None:
        """``warnings``: what status says of this process, at a Unix time; ``rpo_target_s``: how old a newest point may become."""
        self._rpo_target_s = rpo_target_s
        self._log = log
        self._common = warnings
        self._metrics = metrics
        self._stores = stores
        self._clones = clones
        self._run_dir = run_dir
        self._posts: dict[tuple[str, ...], Callable[[VmStore, dict[str, Any]], Lines]] = {
            ("verify",): self._verify,
            ("export",): self._export,
            ("changes",): self._changes,
            ("failover", "test"): self._test,
            ("failover", "undo"): self._undo,
        }

    async def handle(self, method: str, target: str, body: dict[str, Any]) -> Answer:
        """One request; see docs/json.md for the routes."""
        try:
            url = urlsplit(target)
        except ValueError:
            raise UsageError(f"not a request's target: {target}") from None
        match [unquote(part) for part in url.path.split("/")[1:]]:
            case ["v1", "status"] if method == "GET":
                return await self._status(url.query)
            case [page] if (method, f"/{page}") == ("GET", PATH):
                return await self._metrics.page()
            case ["v1", "throttle"]:
                raise UsageError("the throttle is the source's: run replctl throttle there")
            case ["v1", "log", "seal"] if method == "POST":
                return await actions.seal(self._log)
            case ["v1", "log", "accept"] if method == "POST":
                return await actions.accept(self._log, _text(body, "vm"))
            case ["v1", "vms", name, "points"] if method == "GET":
                return self._points(self._stores.find(name))
            case ["v1", "vms", name, "points", number] if method == "GET":
                return self._disks(self._stores.find(name), _number(number, "point"))
            case ["v1", "vms", name, "history"] if method == "GET":
                return await self._history(self._stores.find(name), url.query)
            case ["v1", "vms", name, *action] if method == "POST" and tuple(action) in self._posts:
                return self._posts[tuple(action)](self._stores.find(name), body)
        raise NotFoundError(f"no such request: {method} {url.path}")

    async def _status(self, query: str) -> dict[str, Any]:
        if "at" in (values := parse_qs(query)):
            at_us = _number(values["at"][0], "at")
            return {"vms": [vm_status(vm, at_us) for vm in await self._log.at(at_us)]}
        now_us = time.time_ns() // 1000
        common = [*await self._log.warnings(), *self._common(now_us / 1_000_000)]
        recent = await self._log.usage(first_day(now_us))
        vms = [
            vm_status(
                store.vm,
                now_us,
                [*self._warnings(store), *common],
                rpo_target_s=self._rpo_target_s,
                rpo_forecast_s=forecast_s(store.vm.points.values(), None, now_us),
                sampling=sampling_of(recent, store.vm.vm),
                push=_push(store),
            )
            for store in self._stores.all
        ]
        for vm, reason in self._stores.unusable:
            vms.append(vm_status(vm, now_us, [f"what is kept of it cannot be used: {reason}"]))
        return {"vms": vms}

    def _warnings(self, store: VmStore) -> list[str]:
        trouble = [store.trouble] if store.trouble else []
        return [*trouble, *self._clones.warnings(store)]

    def _points(self, store: VmStore) -> dict[str, Any]:
        vm = store.vm
        return {
            "points": [
                point_info(vm, vm.points[number], held=store.is_held(number))
                for number in sorted(vm.points)
            ]
        }

    def _disks(self, store: VmStore, number: int) -> dict[str, Any]:
        """PointDisks of docs/json.md."""
        point = store.vm.get_point(number)
        return {
            "point": point.number,
            "push_id": point.push_id,
            "taken_at_us": point.taken_at_us,
            "disks": [
                {
                    "disk": disk.disk,
                    "identity": disk.identity,
                    "size": disk.size,
                    "root": disk.root.hex(),
                }
                for disk in point.disks
            ],
        }

    async def _history(self, store: VmStore, query: str) -> dict[str, Any]:
        values = parse_qs(query)

        def given(name: str) -> int | None:
            return _number(values[name][0], name) if name in values else None

        limit = given("limit")
        wanted = Wanted(
            limit=min(1000 if limit is None else limit, _HISTORY_MAX),
            after=given("after"),
            since_us=given("since"),
            until_us=given("until"),
        )
        events, more = await self._log.page(UUID(store.vm.vm), wanted)
        return {"events": [event_info(event) for event in events], "more": more}

    async def _verify(self, store: VmStore, body: dict[str, Any]) -> Lines:
        point = _point(body)
        progress: dict[str, int] = {"done": 0, "total": 0}
        outcome: dict[str, Any] = {}

        async def run() -> None:
            result = await verify_point(store, point, note)
            outcome.update(
                point=result.point,
                good=result.good,
                bytes_read=result.bytes_read,
                damages=[msgspec.structs.asdict(damage) for damage in result.damages],
                map_faults=result.map_faults,
            )

        def note(done: int, total: int) -> None:
            progress.update(done=done, total=total)

        async for line in _while_running(run, lambda: {"progress": dict(progress)}):
            yield line
        yield {"result": outcome}

    async def _export(self, store: VmStore, body: dict[str, Any]) -> Lines:
        disk = body.get("disk")
        if not isinstance(disk, str):
            raise UsageError("disk: name one, such as disk-0")
        async with export_disk(store, _point(body), disk, self._run_dir) as export:
            yield {"export": export}
            await trio.sleep_forever()  # until the client goes away

    async def _changes(self, store: VmStore, body: dict[str, Any]) -> Lines:
        """What changed of a disk from one point to another, in rows of offset and length. 409 where that is not kept."""
        disk, count = _text(body, "disk"), 0
        if _point(body, "from") is None:
            raise UsageError("from: expected the number of a recovery point")
        async with store.hold(_point(body, "from")) as older, store.hold(_point(body)) as newer:
            if newer.disk(disk) is None:
                raise RefusedError(
                    f"point {newer.number} of VM {store.vm.name} has no disk {disk!r}"
                )
            async with store.open_changes(older, newer, disk) as found:
                while rows := await trio.to_thread.run_sync(_take, found):
                    count += len(rows)
                    yield {"changes": rows}
        yield {"result": {"from": older.number, "point": newer.number, "ranges": count}}

    async def _test(self, store: VmStore, body: dict[str, Any]) -> Lines:
        point = _point(body)
        return_value: dict[str, Any] = {}

        async def run(step: Callable[[str], None]) -> None:
            return_value.update(await self._clones.start_test(store, point, step))

        async for line in _steps(run):
            yield line
        yield {"result": return_value}

    async def _undo(self, store: VmStore, _body: dict[str, Any]) -> Lines:
        return_value: dict[str, Any] = {}

        async def run(step: Callable[[str], None]) -> None:
            return_value.update(await self._clones.undo_test(store, step))

        async for line in _steps(run):
            yield line
        yield {"result": return_value}


async def _while_running(
    work: Callable[[], Awaitable[None]], line: Callable[[], dict[str, Any]]
) -> Lines:
    """A line now and then while ``work`` runs; what it raises comes out here."""
    done = trio.Event()

    async def run() -> None:
        await work()
        done.set()

    async with flat_nursery() as nursery:
        nursery.start_soon(run)
        while not done.is_set():
            with trio.move_on_after(_PROGRESS_S):
                await done.wait()
            yield line()


async def _steps(work: Callable[[Callable[[str], None]], Awaitable[None]]) -> Lines:
    """What ``work`` says that it does, as lines, while it runs.

    A failover step is not broken off because its client went away: the work is shielded, and bounded by its own limits.
    """
    send, receive = trio.open_memory_channel[str](100)

    def step(text: str) -> None:
        try:
            send.send_nowait(text)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return  # nobody reads along: the log has it

    async def run() -> None:
        with trio.CancelScope(shield=True), send:
            await work(step)

    async with flat_nursery() as nursery:
        nursery.start_soon(run)
        async for text in receive:
            yield {"step": text}


def _push(store: VmStore) -> dict[str, Any] | None:
    """PushProgress of the push that is landing."""
    if (landing := store.landing) is None:
        return None
    opened = landing.opened
    return push_info(opened.point, str(opened.kind), landing.since_us, received=landing.received)


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected text")
    return value


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise UsageError(f"{what}: expected a number")
    return int(text)


def _point(body: dict[str, Any], key: str = "point") -> int | None:
    point = body.get(key)
    if point is None:
        return None
    if not isinstance(point, int) or isinstance(point, bool) or point < 1:
        raise UsageError(f"{key}: expected the number of a recovery point")
    return point


def _take(extents: Iterator[Extent]) -> list[list[int]]:
    """The next rows of an answer. Blocks."""
    return [[each.offset, each.length] for each in itertools.islice(extents, _ROWS)]
