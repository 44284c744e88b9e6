# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.simulator.qemu_guest import stopped
from tests.limits import HANG_S
from tests.simulator.core_lab import failed, make_vm, small_core


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def status(path: Path) -> str:
    """What a second control socket of QEMU says."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(HANG_S)
        connection.connect(str(path))
        with connection.makefile("rwb") as stream:
            stream.readline()
            answer: dict[str, Any] = {}
            for command in ("qmp_capabilities", "query-status"):
                stream.write(json.dumps({"execute": command}).encode() + b"\n")
                stream.flush()
                answer = json.loads(stream.readline())
            return str(answer["return"]["status"])


async def test_a_running_qemu_stands_still_meanwhile(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    for path in (one, two):
        words += ["-qmp", f"unix:{path},server=on,wait=off"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.run_process, words, check=False))
        with trio.fail_after(HANG_S):
            while not listens(two):
                await trio.lowlevel.checkpoint()
        assert status(two) == "running"
        with stopped(str(one)):
            assert status(two) == "paused"
        assert status(two) == "running"
        with pytest.raises(KeyError), stopped(str(one)):
            raise KeyError("the copy failed")
        assert status(two) == "running"
        nursery.cancel_scope.cancel()


def test_where_no_qemu_listens_nothing_is_to_do(tmp_path: Path) -> None:
    with stopped(str(tmp_path / "nobody")):
        pass


async def test_a_qemu_that_does_not_stop_fails_the_snapshot(tmp_path: Path) -> None:
    """A snapshot that is not one instant must not be made."""
    path = str(tmp_path / "qmp")
    async with small_core(tmp_path / "sim") as core:
        await make_vm(core, qmp=path)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()

            def hang_up() -> None:
                connection, _ = server.accept()
                connection.close()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, hang_up)
                task = core.create_snapshot(
                    "s", ["app"], application_consistent=False, expires_at=None, element=False
                )
                assert "QEMU" in await failed(task)
        assert not core.world.snapshots
