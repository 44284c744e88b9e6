# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl throttle` beside a process that pushes, beside none, and where it cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from replicator.cli.control import SOURCE, ControlClient
from replicator.config import load
from replicator.control.bandwidth import Regulator
from replicator.control.metrics import Live, Metrics
from replicator.control.source import serve_source
from replicator.log import open_log
from tests.cli.conftest import KEY, Done, Replctl, source_values, write_config
from tests.cli.test_json_contract import keeps_promise
from tests.cli.test_pushing import two_sites
from tests.limits import HANG_S

#: What belongs to the state of a process only.
KEEP = "set by hand until the process ends; to keep it, set max_bandwidth_mbps or max_bandwidth_schedule\n"


@asynccontextmanager
async def pushing(
    folder: Path, offset_s: int = 0, now_s: int = 12 * 3600, **values: object
) -> AsyncIterator[Path]:
    """The configuration of a source whose control socket answers, at noon of 1970-01-01, a Thursday."""
    path = write_config(folder / "source.conf", source_values(folder, **values))
    config = load(path)
    (folder / "state").mkdir()
    async with open_log(config.state_dir / "events") as log, trio.open_nursery() as nursery:
        regulator = Regulator(config, clock=lambda: now_s, offset=lambda _: offset_s)
        await serve_source(nursery, config, regulator, Metrics(log, Live()))
        yield path
        nursery.cancel_scope.cancel()


async def told(replctl: Replctl, *words: str | Path) -> Done:
    return await trio.to_thread.run_sync(partial(replctl, *words))


async def test_it_shows_and_sets_what_holds(tmp_path: Path, replctl: Replctl) -> None:
    async with pushing(tmp_path, max_bandwidth_mbps=7) as config:
        throttle = partial(told, replctl, "--config", config, "throttle")
        assert (await throttle()).out == "7 Mbit/s (max_bandwidth_mbps)\n"
        assert (await throttle("50")).out == f"50 Mbit/s (replctl throttle)\n{KEEP}"
        assert (await throttle()).out == f"50 Mbit/s (replctl throttle)\n{KEEP}"
        assert (await throttle("off")).out == f"no cap (replctl throttle)\n{KEEP}"
        done = await throttle("reset")
        assert (done.code, done.out) == (0, "7 Mbit/s (max_bandwidth_mbps)\n")


async def test_a_timetable_says_when_it_changes_by_the_hosts_clock(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    schedule = "thu 08:00-18:00 50; * 0"
    async with pushing(tmp_path, max_bandwidth_schedule=schedule) as config:
        throttle = partial(told, replctl, "--config", config, "throttle")
        assert (await throttle()).out == (
            "50 Mbit/s (max_bandwidth_schedule: thu 08:00-18:00 50)\n"
            "no cap from Thu 1970-01-01 18:00 +0000\n"
        )
        assert (await throttle("mon-fri 13:00-18:00 50; * 3")).out == (
            f"3 Mbit/s (replctl throttle: * 3)\n50 Mbit/s from Thu 1970-01-01 13:00 +0000\n{KEEP}"
        )


async def test_as_json(tmp_path: Path, replctl: Replctl) -> None:
    async with pushing(tmp_path, max_bandwidth_schedule="thu 08:00-18:00 50") as config:
        throttle = partial(told, replctl, "--json", "--config", config, "throttle")
        answers = []
        for words in ((), ("9",), ("thu 12:00-13:00 9; * 0",), ("reset",)):
            done = await throttle(*words)
            assert done.code == 0, done.err
            keeps_promise("ThrottleStatus", done.json)
            answers.append(done.json["next_change"])
        later = "1970-01-01T18:00:00.000Z"
        assert answers == [later, None, "1970-01-01T13:00:00.000Z", later]


def test_where_nothing_runs_it_says_what_to_start(tmp_path: Path, replctl: Replctl) -> None:
    config = write_config(tmp_path / "source.conf", source_values(tmp_path))
    for words in ((), ("50",)):
        done = replctl("--config", config, "throttle", *words)
        assert (done.code, done.out) == (1, "")
        assert done.err == (
            f"replctl: nothing that pushes is running: nobody listens at {tmp_path}/state/control.sock"
            " (No such file or directory): start it with replctl run (seed and push answer while they"
            " run)\n"
        )


def test_on_a_receiver_it_says_where_to_go(tmp_path: Path, replctl: Replctl) -> None:
    config = write_config(tmp_path / "rx.conf", {"dr_auth_token": KEY, "state_dir": tmp_path})
    done = replctl("--config", config, "throttle", "50")
    assert (done.code, done.out) == (2, "")
    assert "run it on the source's host, beside replctl run" in done.err


@pytest.mark.parametrize(
    "limit", ["fast", "mon-fri 8:00 50", "1000001", "", "-1", "-5M", "* 0; mon 5"]
)
def test_a_bad_limit_is_refused_whether_or_not_anything_runs(
    tmp_path: Path, replctl: Replctl, limit: str
) -> None:
    config = write_config(tmp_path / "source.conf", source_values(tmp_path))
    done = replctl("--config", config, "throttle", limit)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("replctl: limit: ")


def test_an_option_that_there_is_not_is_no_limit(tmp_path: Path, replctl: Replctl) -> None:
    done = replctl("--config", tmp_path / "none.conf", "throttle", "--jsn")
    assert (done.code, done.out) == (2, "")
    assert "No such option" in done.err


async def test_run_answers_for_as_long_as_it_runs(tmp_path: Path, replctl: Replctl) -> None:
    """A process of its own, under a cap, and its metrics."""
    code = "import sys; from replicator.cli.main import main; sys.exit(main(sys.argv[1:]))"
    async with two_sites(tmp_path, push_interval=3600, max_bandwidth_mbps=900) as (source, rx):
        words = [sys.executable, "-c", code, "--config", str(source), "run"]
        async with trio.open_nursery() as nursery:
            start = partial(trio.run_process, words, stderr=subprocess.PIPE, check=False)
            process: trio.Process = await nursery.start(start)
            assert process.stderr is not None
            said = b""
            with trio.fail_after(HANG_S):
                while b"DR cycle complete: vm=web cycle=1 " not in said:
                    piece = await process.stderr.receive_some()
                    assert piece, said
                    said += piece
            control = tmp_path / "state" / "control.sock"
            assert control.stat().st_mode & 0o777 == 0o600
            done = await told(replctl, "--config", source, "throttle")
            assert done.out == "900 Mbit/s (max_bandwidth_mbps)\n"
            done = await told(replctl, "--config", source, "throttle", "800")
            assert done.out == f"800 Mbit/s (replctl throttle)\n{KEEP}"
            page = await scrape(control)
            assert "\nreplicator_throttle_mbps 800.0\n" in page
            assert '\nreplicator_dr_reconnect_total{vm="web"} 0.0\n' in page
            assert '\nreplicator_failover_state{state="protected",vm="web"} 1.0\n' in page
            page = await scrape(tmp_path / "dr" / "control.sock")
            assert '\nreplicator_recovery_points{vm="web"} 1.0\n' in page
            process.terminate()
            await process.wait()
        done = await told(replctl, "--config", source, "throttle")
        assert done.code == 1
        assert not control.exists()
        done = await told(replctl, "--config", rx, "throttle")
        assert done.code == 2


async def scrape(path: Path) -> str:
    with trio.fail_after(HANG_S):
        async with await trio.open_unix_socket(os.fspath(path)) as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            data = b""
            while piece := await stream.receive_some():
                data += piece
    return data.partition(b"\r\n\r\n")[2].decode()


async def test_two_processes_with_one_control_socket_are_told_apart(
    tmp_path: Path, replctl: Replctl
) -> None:
    """Each VM's source has a state directory of its own; a control socket that both name belongs to the first."""
    control = tmp_path / "c.sock"
    async with pushing(tmp_path, control_socket=control):
        other = tmp_path / "other"
        other.mkdir()
        config = write_config(
            other / "source.conf", source_values(other, control_socket=control, vm="db")
        )
        done = await told(replctl, "--config", config, "push")
        assert (done.code, done.out) == (3, "")
        assert f"another process answers at the control socket {control}" in done.err
        assert (await ControlClient(control, SOURCE).get("/v1/throttle"))["mbps"] == 0


@pytest.mark.parametrize("command", ["seed", "push", "run"])
def test_a_control_socket_with_too_long_a_name_is_refused_before_anything_is_touched(
    tmp_path: Path, replctl: Replctl, command: str
) -> None:
    long = tmp_path / ("x" * 108)
    config = write_config(tmp_path / "source.conf", source_values(tmp_path, control_socket=long))
    done = replctl("--config", config, command)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"replctl: control_socket: {long} is longer than")
    assert not (tmp_path / "state").exists()
