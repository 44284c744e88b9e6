# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source and a receiver as an operator runs them: `replctl` processes with configuration files, TCP over loopback."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import trio

from bench.contender import VM, free_port
from bench.proc import Memory, read_status, watch
from replicator.cli.control import ControlClient, vm_path
from replicator.errors import RefusedError
from replicator.nursery import flat_nursery

_ROOT = Path(__file__).parent.parent
_START_S = 30
_STOP_S = 30
_PUSH_S = 600
_APPLY_S = 900
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Pushed:
    """One `replctl seed` or `replctl push`. ``wall_s``: of the whole command; ``push_s``: as the recovery point says."""

    point: int
    wall_s: float
    push_s: float
    bytes_pushed: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class Requested:
    """A push on request. ``committed_at_us``: microseconds since the epoch."""

    point: int
    bytes_pushed: int
    committed_at_us: int


@dataclass(slots=True)
class Site:
    """Both sides, in ``folder``; see ``site``."""

    folder: Path
    receiver: trio.Process
    #: What pushes on request, if it runs; see ``running``.
    source: trio.Process | None = None
    receiver_memory: Memory = field(default_factory=Memory)

    async def push(self, command: str, *, sample: bool = False) -> Pushed:
        """Run `replctl seed` or `replctl push` to its end. ``sample``: look at the anonymous memory of both meanwhile."""
        peak = self.folder / "peak"
        arguments = ["--config", str(self.folder / "source.conf"), "--json", command]
        memory = Memory()
        async with trio.open_nursery() as nursery:
            if sample:
                nursery.start_soon(watch, self.receiver.pid, self.receiver_memory)
            started = time.perf_counter()
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "bench.measured", str(peak), *arguments],
                stdout=subprocess.PIPE,
                cwd=_ROOT,
            )
            try:
                if sample:
                    nursery.start_soon(watch, process.pid, memory)
                with trio.fail_after(_PUSH_S):
                    assert process.stdout is not None
                    output = b"".join([piece async for piece in process.stdout])
                    code = await process.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await _stop(process)
            wall_s = time.perf_counter() - started
            nursery.cancel_scope.cancel()
        if code:
            raise RuntimeError(f"replctl {command} ended with {code}: {output.decode()}")
        memory.peak = int(peak.read_text("ascii"))
        answer = json.loads(output)
        return Pushed(answer["point"], wall_s, answer["duration_s"], answer["bytes_pushed"], memory)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A source that stays, as `replctl run` does, and pushes when ``request`` asks for it."""
        command = [sys.executable, "-m", "bench.on_demand", str(self.folder / "source.conf")]
        self.source = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=_ROOT
        )
        try:
            with trio.fail_after(_START_S):
                await self._answer()
            yield
        finally:
            with trio.CancelScope(shield=True):
                await _stop(self.source)

    @asynccontextmanager
    async def protecting(self) -> AsyncIterator[trio.Process]:
        """`replctl run`, which seeds, and then waits for its next cycle."""
        command = [sys.executable, "-m", "bench.measured", str(self.folder / "run-peak")]
        process = await trio.lowlevel.open_process(
            [*command, "--config", str(self.folder / "source.conf"), "run"], cwd=_ROOT
        )
        try:
            yield process
        finally:
            with trio.CancelScope(shield=True):
                await _stop(process)

    async def request(self) -> Requested:
        """A seed if there is no point yet, a cycle if there is; returns when the source has settled it."""
        assert self.source is not None
        assert self.source.stdin is not None
        await self.source.stdin.send_all(b"\n")
        with trio.fail_after(_PUSH_S):
            return Requested(**await self._answer())

    async def _answer(self) -> dict[str, int]:
        """One line of JSON from the source."""
        assert self.source is not None
        assert self.source.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            piece = await self.source.stdout.receive_some()
            if not piece:
                raise RuntimeError("the source has ended")
            line += piece
        answer: dict[str, int] = json.loads(line)
        return answer

    async def applied(self, point: int) -> int:
        """Wait until the receiver's replica holds the point. Returns when it did, microseconds since the epoch."""
        client = ControlClient(self.folder / "receiver" / "control.sock")
        with trio.fail_after(_APPLY_S):
            while True:
                try:
                    answer = await client.get(vm_path(VM, "history") + "?limit=10")
                except RefusedError:  # nothing has come in yet
                    answer = {"events": []}
                for event in answer["events"]:
                    if event["kind"] == "delta-applied" and event["point"] == point:
                        return round(datetime.fromisoformat(event["at"]).timestamp() * 1e6)
                await trio.sleep(_POLL_S)

    def receiver_peak(self) -> int:
        """The receiver's peak memory so far, bytes."""
        return read_status(self.receiver.pid)["VmHWM"]


@asynccontextmanager
async def site(
    folder: Path, options: Mapping[str, str], receiver_options: Mapping[str, str] | None = None
) -> AsyncIterator[Site]:
    """A receiver that runs and a source that is set up with ``options`` (``source = …``); all gone at the end.

    They prove themselves by a pre-shared key, unless ``receiver_options`` name a certificate.
    """
    await trio.to_thread.run_sync(_set_up, folder, options, receiver_options or {})
    try:
        async with _receiver(folder) as process:
            yield Site(folder, process)
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def _receiver(folder: Path) -> AsyncIterator[trio.Process]:
    """The receiver's process, from when it says that it listens, as systemd would have it, until it has been stopped."""
    command = [sys.executable, "-m", "bench.measured", str(folder / "receiver-peak")]
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        await notices.bind(str(folder / "notify"))
        process = await trio.lowlevel.open_process(
            [*command, "--config", str(folder / "receiver.conf"), "receiver"],
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
            cwd=_ROOT,
        )
        try:
            with trio.fail_after(_START_S):
                while b"READY=1" not in await notices.recv(4096):
                    pass
            async with flat_nursery() as nursery:
                nursery.start_soon(_drain, notices)
                yield process
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await _stop(process)


async def _drain(notices: trio.socket.SocketType) -> None:
    while True:
        await notices.recv(4096)


async def _stop(process: trio.Process) -> None:
    """End it if it runs; in order if it can, and in any case."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    with trio.move_on_after(_STOP_S):
        await process.wait()
        return
    process.kill()
    await process.wait()


def _set_up(folder: Path, options: Mapping[str, str], receiver_options: Mapping[str, str]) -> None:
    folder.mkdir()
    common = {"dr_port": str(free_port()), "verbose": "0"}
    if "dr_auth_cert" not in receiver_options:
        common["dr_auth_token"] = secrets.token_hex(32)
    for side, more in (
        ("receiver", {"dr_listen": "127.0.0.1", **receiver_options}),
        ("source", {"dr_host": "127.0.0.1", "vm": VM, **options}),
    ):
        state = folder / side
        state.mkdir(mode=0o700)
        _write_config(folder / f"{side}.conf", {"state_dir": str(state), **common, **more})


def _write_config(path: Path, values: Mapping[str, str]) -> None:
    path.touch(mode=0o600)
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()), "utf-8")


__all__ = ["VM", "Pushed", "Requested", "Site", "site"]
