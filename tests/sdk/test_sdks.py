# SPDX-License-Identifier: AGPL-3.0-or-later
"""Nutanix's official SDKs, unmodified, judge the simulator: each set in an environment of its own, driven by a script there."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.simulator.running import Simulator, running_simulator
from replicator.simulator.scenario import DiskSpec, Scenario, VmSpec
from tests.limits import HANG_S

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MIB = 1 << 20
IMAGE = os.urandom(65536) * 16
#: Two disks of a size that SDKs and qemu-img read in no time, with what a guest has: data, holes, zeros.
SYSTEM_SIZE, DATA_SIZE = 64 * MIB, 32 * MIB
SCENARIO = Scenario(
    vms=[
        VmSpec(
            name="app01",
            disks=[DiskSpec(size=SYSTEM_SIZE, data=8 * MIB), DiskSpec(size=DATA_SIZE, data=MIB)],
            cdrom=True,
        ),
        *(VmSpec(name=f"small{number}", disks=[DiskSpec(size=MIB, data=0)]) for number in range(4)),
    ],
)


class Desk:
    """Does what a driver asks the test for."""

    def __init__(self, simulator: Simulator, changes: list[tuple[int, int, bytes]]) -> None:
        self._simulator = simulator
        self._changes = changes

    async def answer(self, asked: dict[str, Any]) -> Any:
        storage = self._simulator.core.storage
        if asked["ask"] == "change":
            await write(self._simulator, self._changes)
            return True
        if asked["ask"] == "compare":
            pair = (storage.snapshot(asked["disk"]), Path(asked["file"]))
        else:
            source = (
                storage.image(asked["image"])
                if "image" in asked
                else storage.snapshot(asked["snapshot"])
            )
            pair = (storage.disk(asked["backing"]), source)
        return {"same": await trio.to_thread.run_sync(_same, *pair)}


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


async def write(simulator: Simulator, changes: list[tuple[int, int, bytes]]) -> None:
    vm = simulator.vm("app01").uuid
    for index, offset, data in changes:
        await simulator.guest(vm, index).write(offset, data)


async def _serve_image(stream: trio.SocketStream) -> None:
    """The image, for whoever logs in as export."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += await stream.receive_some(4096)
    account = base64.b64encode(b"export:one-time")
    body = IMAGE if account in asked else b""
    status = b"200 OK" if body else b"401 Unauthorized"
    head = b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
    await stream.send_all(head + body)
    await stream.aclose()


async def drive(
    simulator: Simulator, environment: str, script: str, folder: Path, desk: Desk
) -> dict[str, Any]:
    """Run a driver; the facts that it ends with. What went wrong in it is what it wrote to standard error."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/disk.raw"
    setting = {
        "address": simulator.address,
        "port": simulator.port,
        "iscsi_port": simulator.core.targets.port,
        "ca": str(simulator.ca_path),
        "user": "admin",
        "password": simulator.password("admin"),
        "vm": simulator.vm("app01").uuid,
        "folder": str(folder),
        "image_url": url,
    }
    facts: dict[str, Any] = {}

    async def talk(process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        await process.stdin.send_all(json.dumps(setting).encode() + b"\n")
        pending = b""
        async for piece in process.stdout:
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "done" in said:
                    facts.update(said["done"], done=True)
                    continue
                answer = await desk.answer(said)
                await process.stdin.send_all(json.dumps(answer).encode() + b"\n")

    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, _serve_image, listeners)
            python = ROOT / ".cache" / "sdk" / environment / "bin" / "python"
            run = partial(
                trio.run_process,
                [python, HERE / script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                check=False,
            )
            process: trio.Process = await nursery.start(run)
            await talk(process)
            status = await process.wait()
            nursery.cancel_scope.cancel()
    assert (status, facts.pop("done", False)) == (0, True), f"{script} failed: see its output"
    return facts


async def _prepare(simulator: Simulator) -> None:
    """What the VM has before the first snapshot."""
    await write(
        simulator,
        [
            (0, 0, os.urandom(3 * MIB)),
            (0, 40 * MIB, os.urandom(2 * MIB)),
            (0, 50 * MIB, bytes(MIB)),
            (1, 5 * MIB, os.urandom(2 * MIB)),
        ],
    )


async def test_the_newest_sdks_drive_a_full_and_an_incremental(tmp_path: Path) -> None:
    async with running_simulator(tmp_path / "simulator", SCENARIO) as simulator:
        simulator.core.knobs.update(v4_content_minor=4, regions_page=3)
        await _prepare(simulator)
        changes = [
            (0, MIB + 512, b"changed"),
            (0, 30 * MIB, os.urandom(100_000)),
            (0, 40 * MIB, bytes(MIB)),
            (0, 63 * MIB, b"x"),
            (1, 6 * MIB, os.urandom(4096)),
        ]
        (tmp_path / "files").mkdir()
        desk = Desk(simulator, changes)
        facts = await drive(simulator, "newest", "drive_newest.py", tmp_path / "files", desk)
        # One block, two blocks, one block, one block: what changed and no more, in more than one page.
        assert facts["taken"] == 5 * 65536 + (65536 if 30 * MIB % 65536 else 0)
        assert facts["pages"] > 1
        world = simulator.core.world
        assert not world.snapshots
        assert not world.volume_groups
        assert not world.images
        assert sorted(vm.name for vm in world.vms.values()) == [
            "app01",
            *(f"small{number}" for number in range(4)),
        ]


@pytest.mark.parametrize("environment", ["v40", "v41"])
async def test_the_older_sdks_against_an_older_prism_central(
    tmp_path: Path, environment: str
) -> None:
    async with running_simulator(tmp_path / "simulator", SCENARIO) as simulator:
        simulator.core.knobs["v4_window"] = "pc.7.3"
        await _prepare(simulator)
        await drive(simulator, environment, "drive_older.py", tmp_path, Desk(simulator, []))
        assert not simulator.core.world.snapshots


async def test_the_sdks_try_again_with_the_same_request(tmp_path: Path) -> None:
    """429 and 503 come first: what the SDK sends again makes nothing twice."""
    async with running_simulator(tmp_path / "simulator", SCENARIO) as simulator:
        simulator.core.knobs["v4_window"] = "pc.7.3"
        await _prepare(simulator)
        for kind, value in (("rate-limit", 1.0), ("server-error", 503.0)):
            simulator.faults.add(kind, r"POST .*/recovery-points$", value=value)  # type: ignore[arg-type]
        await drive(simulator, "v40", "drive_older.py", tmp_path, Desk(simulator, []))
        statuses = [
            entry.status
            for entry in simulator.server.log
            if entry.method == "POST" and entry.path.endswith("/config/recovery-points")
        ]
        assert statuses == [429, 503, 202]
