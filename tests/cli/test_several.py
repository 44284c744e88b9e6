# SPDX-License-Identifier: AGPL-3.0-or-later
"""One host pushes several VMs: each by itself, over one log and one receiver."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.cli.control import SOURCE, ControlClient
from replicator.cli.pushing import Host, _run
from replicator.config import load
from replicator.errors import UsageError
from replicator.state_dir import open_state_dir
from tests.cli.conftest import Done, Replctl
from tests.cli.several import Several
from tests.cli.test_json_contract import keeps_promise, promised
from tests.cli.test_pushing import two_sites
from tests.limits import HANG_S
from tests.sites import GRAIN

PUSHED = promised("PointInfo").keys() | promised("PushResult").keys()
NAMES = ["app01", "app02", "db"]


@dataclass
class Lab:
    several: Several
    config: Path
    receiver: Path
    uuids: dict[str, str]
    replctl: Replctl

    async def told(self, *words: str, at: Path | None = None) -> Done:
        command = partial(self.replctl, "--config", at or self.config, *words)
        return await trio.to_thread.run_sync(command)


@asynccontextmanager
async def lab(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch, **values: object
) -> AsyncIterator[Lab]:
    """Three VMs that were never pushed, and a receiver that runs."""
    (tmp_path / "images").mkdir()
    several = Several(tmp_path / "images")
    several.use(monkeypatch)
    dice = random.Random(3)
    uuids = {name: await several.add(name, dice.randbytes(5 * GRAIN)) for name in NAMES}
    given: dict[str, Any] = {"source": "nutanix", "vm": "*", "image_disks": None, **values}
    async with two_sites(tmp_path, **given) as (source, receiver):
        yield Lab(several, source, receiver, uuids, replctl)


async def test_all_are_pushed_and_one_that_fails_takes_none_with_it(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path, replctl, monkeypatch) as it:
        done = await it.told("seed")
        assert done.code == 0, done.err
        lines = done.out.splitlines()
        assert [line.partition(" complete: ")[0] for line in lines] == [
            f"seed of {name}" for name in NAMES
        ]
        assert "Selected 3 VM(s) for backup" in done.err
        for name in NAMES:
            assert f"DR cycle complete: vm={name} cycle=1 bytes_pushed=" in done.err
            work = tmp_path / "state" / "work" / it.uuids[name]
            assert [path.name for path in work.glob("push-*")] == []

        image = it.several.image("app02")
        image.rename(image.with_suffix(".away"))
        done = await it.told("--json", "push")
        assert done.code == 1
        first, failed, last = done.json
        assert (first.keys(), first["vm"], first["point"]) == (PUSHED, "app01", 2)
        assert (last.keys(), last["vm"], last["point"]) == (PUSHED, "db", 2)
        keeps_promise("VmFailure", failed)
        assert (failed["vm"], failed["uuid"], failed["exit_code"]) == (
            "app02",
            it.uuids["app02"],
            2,
        )
        assert f"app02: {failed['error']}" in done.err
        assert done.err.endswith(f"replctl: 1 of 3 VM(s) failed: app02: {failed['error']}\n")

        image.with_suffix(".away").rename(image)
        status = (await it.told("--json", "status")).json
        assert [(vm["vm"], vm["newest_point"]) for vm in status] == [
            ("app01", 2),
            ("app02", 1),
            ("db", 2),
        ]
        # What failed is told of the VM that it happened to, and of no other.
        assert [len(vm["warnings"]) for vm in status] == [0, 1, 0]
        done = await it.told("push")
        assert done.code == 0
        # Lines that do not name their VM begin with it.
        assert "app02: the push to point 2 is given up: its snapshot was not finished" in done.err
        assert " app02: app02" not in done.err
        for name in NAMES:
            verified = (await it.told("--json", "verify", name, at=it.receiver)).json
            assert verified["good"], name
            exported = tmp_path / f"{name}.out"
            words = ("export", name, "--disk", "0", "--to", str(exported))
            assert (await it.told(*words, at=it.receiver)).code == 0
            assert exported.read_bytes() == it.several.image(name).read_bytes()


async def test_one_of_them_by_name_or_uuid(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path, replctl, monkeypatch, exclude="db") as it:
        done = await it.told("--json", "seed", "app02")
        assert (done.json.keys(), done.json["vm"], done.json["point"]) == (PUSHED, "app02", 1)
        done = await it.told("--json", "push", it.uuids["app02"])
        assert (done.json["uuid"], done.json["point"]) == (it.uuids["app02"], 2)
        done = await it.told("--json", "resync", "app02")
        assert done.json.keys() == PUSHED | promised("ResyncResult").keys()
        done = await it.told("push", "db")
        assert (done.code, done.out) == (2, "")
        assert "VM: this host pushes app01, app02, not db; nothing was touched" in done.err
        # One that fails is the command's own failure, not one of several.
        done = await it.told("--json", "push", "app01")
        assert done.code == 3
        assert done.json["exit_code"] == 3
        assert "run replctl seed first" in done.json["error"]
        # The same for all of them: each is named, and the exit code is theirs.
        done = await it.told("push")
        assert done.code == 3
        assert done.out.startswith("cycle of app02 complete: recovery point 4, ")
        assert "replctl: 1 of 2 VM(s) failed: app01: " in done.err


async def test_a_configuration_of_one_vm_answers_with_an_object(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path, replctl, monkeypatch, vm="db") as it:
        done = await it.told("--json", "seed")
        assert (done.json.keys(), done.json["vm"]) == (PUSHED, "db")
        (status,) = (await it.told("--json", "status")).json
        assert status["vm"] == "db"


async def test_nothing_chosen_and_names_that_are_not_clear_are_refused(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path, replctl, monkeypatch, vm="web-*") as it:
        expected = "vm: 'web-*' chooses none of the 3 VM(s) that Prism lists"
        for command in ("seed", "push", "resync", "estimate"):
            done = await it.told(command)
            assert (done.code, done.out) == (2, ""), command
            assert expected in done.err
        host = Host(load(it.config))
        with open_state_dir(host.config.state_dir), pytest.raises(UsageError) as caught:
            await _run(host)
        assert str(caught.value) == expected
        for command in ("seed", "estimate"):
            it.several.prism.broken = "Prism is away"
            done = await it.told(command)
            assert (done.code, done.err.splitlines()[-1]) == (1, "replctl: Prism is away")


async def test_how_far_each_is_is_shown_by_name_and_by_metric(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1 Mbit/s no push gets far; two are under way, the third waits for its turn."""
    values: dict[str, Any] = {"max_bandwidth_mbps": 1, "push_interval": 3600}
    async with lab(tmp_path, replctl, monkeypatch, **values) as it:
        dice = random.Random(4)
        for name in NAMES:
            it.several.image(name).write_bytes(dice.randbytes(64 * GRAIN))
        async with running(it) as (host, ear, stop):
            # The order is the scheduler's.
            waits = [name for name in NAMES if name not in (await ear.first("seed of ", 2))]
            client = ControlClient(host.config.control_path, SOURCE)
            answer = await client.get("/v1/push")
            while len(answer["pushes"]) < 2:  # their snapshots are being made
                answer = await client.get("/v1/push")
            keeps_promise("PushAnswer", answer)
            for each in answer["pushes"]:
                keeps_promise("VmPush", each)
                keeps_promise("PushProgress", each["push"])
                assert each["uuid"] == it.uuids[each["vm"]]
                assert each["vm"] not in waits
            assert (answer["vm"], answer["push"]) == (
                answer["pushes"][0]["vm"],
                answer["pushes"][0]["push"],
            )
            shown = (await it.told("--json", "status")).json
            under_way = {vm["vm"] for vm in shown if vm["push"] is not None}
            assert under_way == set(NAMES) - set(waits)
            page = await metrics(host.config.control_path)
            for name in NAMES:
                line = f'replicator_push_progress_ratio{{vm="{name}"}}'
                assert (line in page) == (name not in waits)
            assert 'replicator_prism_api_errors_total{endpoint="vmm/ahv/config/vms"} 2.0' in page
            assert "replicator_iscsi_attach_failures_total 1.0" in page
            stop()


async def test_run_goes_on_with_the_others_and_sees_who_comes_and_goes(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab(tmp_path, replctl, monkeypatch, push_interval=1) as it:
        image = it.several.image("app02")
        image.rename(image.with_suffix(".away"))
        async with running(it) as (_, ear, stop):
            await ear.heard("DR cycle complete: vm=app01 cycle=2 ")
            assert "vm=app02 cycle=" not in ear.text
            assert "this cycle failed: " in ear.text
            image.with_suffix(".away").rename(image)
            await ear.heard("DR cycle complete: vm=app02 cycle=2 ")

            await it.several.add("new", b"n" * GRAIN)
            gone = it.several.prism.listed.pop(0)
            assert gone.name == "app01"
            await ear.heard("new is protected from now on")
            await ear.heard("app01 is not pushed any more: it is not there, or vm, exclude and")
            await ear.heard("DR cycle complete: vm=new cycle=2 ")
            ear.forget()
            it.several.prism.broken = "Prism is away"
            # That nobody can say which VMs there are stops nothing.
            await ear.heard("which VMs there are cannot be seen: Prism is away")
            for _ in range(2):
                ear.forget()
                await ear.heard("DR cycle complete: vm=db ")
            assert "vm=app01" not in ear.text
            stop()


class Ear(logging.Handler):
    """Hears what the program logs. Made in the trio thread."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._token = trio.lowlevel.current_trio_token()
        self._more = trio.Event()
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._token.run_sync_soon(self._add, record.getMessage())

    def _add(self, line: str) -> None:
        self._lines.append(line)
        more, self._more = self._more, trio.Event()
        more.set()

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def forget(self) -> None:
        self._lines.clear()

    async def heard(self, words: str) -> None:
        while words not in self.text:
            await self._more.wait()

    async def first(self, start: str, count: int) -> str:
        """The first lines that begin so."""
        while len(found := [line for line in self._lines if line.startswith(start)]) < count:
            await self._more.wait()
        return "\n".join(found[:count])


@asynccontextmanager
async def running(it: Lab) -> AsyncIterator[tuple[Host, Ear, Callable[[], None]]]:
    """`replctl run` in this process, which ends well when it is told to stop."""
    host = Host(load(it.config))
    ended = trio.Event()
    ear = Ear()
    logger = logging.getLogger("replicator")
    level = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)

    async def run() -> None:
        await _run(host)
        ended.set()

    try:
        with open_state_dir(host.config.state_dir), trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                yield host, ear, partial(signal.raise_signal, signal.SIGTERM)
                await ended.wait()
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)


async def metrics(path: Path) -> str:
    async with await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        return b"".join([piece async for piece in stream]).decode()
