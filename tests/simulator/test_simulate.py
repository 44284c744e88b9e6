# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl simulate` as a process: what it says, how it ends, and that no target outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.cli.main import main
from replicator.cli.simulating import parse_fault_text
from replicator.errors import UsageError
from replicator.simulator.scenario import Scenario, VmSpec, read_scenario
from tests.limits import HANG_S


@asynccontextmanager
async def simulate(folder: Path, *words: str) -> AsyncIterator[tuple[trio.Process, dict[str, Any]]]:
    """The process, and what it says of itself."""
    start = "import sys; from replicator.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "--json", "simulate"]
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            [*command, "--dir", str(folder), *words], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            said = b""
            with trio.fail_after(HANG_S):
                while b"\n" not in said:
                    piece = await process.stdout.receive_some()
                    assert piece, "it ended without a word"
                    said += piece
            yield process, json.loads(said)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        nursery.cancel_scope.cancel()


async def gone(address: str) -> None:
    """Until nobody listens for iSCSI there."""
    with trio.fail_after(HANG_S):
        while True:
            try:
                stream = await trio.open_tcp_stream(address, 3260)
            except OSError:
                return
            await stream.aclose()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_it_says_where_it_listens_and_its_targets_end_with_it(
    tmp_path: Path, end: signal.Signals
) -> None:
    async with simulate(tmp_path, "--vms", "3") as (process, said):
        assert said["vms"] == 4
        assert said["ca"] == str(tmp_path / "ca.pem")
        portal = said["clusters"][0]["data_services"]
        await (await trio.open_tcp_stream(portal, 3260)).aclose()
        await (await trio.open_tcp_stream(said["address"], said["port"])).aclose()
        os.kill(process.pid, end)
        with trio.fail_after(HANG_S):
            code = await process.wait()
    assert code == (0 if end == signal.SIGTERM else -signal.SIGKILL)
    await gone(portal)
    left = [Path((tmp_path / "targets").read_text())]
    # It goes on where it was, at the same addresses.
    async with simulate(tmp_path) as (_, again):
        assert (again["address"], again["vms"]) == (said["address"], 4)
    # Nor do its sockets stay.
    assert not any(folder.exists() for folder in left)


def test_faults_of_the_command_line() -> None:
    fault = parse_fault_text("rate-limit where='POST /api' count=forever every=3 value=1.5")
    assert (fault.kind, fault.where, fault.count, fault.every, fault.value) == (
        "rate-limit",
        "POST /api",
        None,
        3,
        1.5,
    )
    for wrong in (
        "",
        "no-such",
        "latency where",
        "latency count=x",
        "latency 'a",
        "latency what=1",
    ):
        with pytest.raises(UsageError, match="--fault"):
            parse_fault_text(wrong)


def test_a_scenario_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"vms": [{"name": "db", "disks": [{"size": 1024, "data": 0}]}]}))
    scenario = read_scenario(path)
    assert [vm.name for vm in scenario.vms] == ["db"]
    assert [cluster.name for cluster in scenario.clusters] == ["cluster-a", "cluster-b"]


@pytest.mark.parametrize(
    "wrong",
    [
        "{",
        '{"what": 1}',
        '{"clusters": []}',
        '{"clusters": [{"name": "a"}, {"name": "a"}]}',
        '{"vms": [{"name": "a", "cluster": "none"}]}',
        '{"vms": [{"name": "a", "subnet": "none"}]}',
        '{"vms": [{"name": "a", "disks": [{"size": 1000}]}]}',
        '{"users": [{"name": "../a", "role": "Super Admin"}]}',
        '{"faults": [{"kind": "no-such"}]}',
    ],
)
def test_a_scenario_that_cannot_be_is_refused(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(wrong)
    with pytest.raises(UsageError, match=r"s\.json"):
        read_scenario(path)


def test_wrong_files_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passwords = tmp_path / "passwords"
    passwords.write_text("admin\n")
    passwords.chmod(0o600)
    options = ["simulate", "--dir", str(tmp_path / "d")]
    assert main([*options, "--passwords", str(passwords)]) == 2
    assert main([*options, "--scenario", str(tmp_path / "none")]) == 2
    assert "line 1" in capsys.readouterr().err


def test_scenarios_do_not_share_their_parts() -> None:
    Scenario().vms.append(VmSpec(name="other"))
    assert [vm.name for vm in Scenario().vms] == ["app01"]
