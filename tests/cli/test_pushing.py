# SPDX-License-Identifier: AGPL-3.0-or-later
"""Seed, push and run: the loop by a clock of its own, then the commands against a receiver on this machine."""

from __future__ import annotations

import logging
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from eventsourcing.persistence import OperationalError

from receiver.daemon import run_receiver
from replicator.cli.pushing import cycles, is_fenced
from replicator.cli.showing import source_warnings
from replicator.config import check
from replicator.domain.failover import Command, State, decide
from replicator.domain.model import PushKind
from replicator.domain.views import warnings
from replicator.domain.vm import ProtectedVm
from replicator.errors import (
    FencedError,
    PeerRefusedError,
    RefusedError,
    SourceError,
    UsageError,
    WireError,
)
from replicator.push.connection import ConnectionLostError
from replicator.push.plan import Local, Refuse, Want, plan
from replicator.push.pusher import Outcome
from replicator.push.trouble import Trouble
from replicator.wire.messages import VmState
from tests.cli.conftest import KEY, Done, Replctl, source_values, write_config
from tests.cli.test_json_contract import VM, S, keeps_promise, point, promised
from tests.limits import HANG_S

FENCED = PeerRefusedError("stale-epoch", "the VM is in epoch 2")


async def test_cycles_start_an_interval_apart_whatever_became_of_the_last(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del autojump_clock
    monkeypatch.setattr(random, "random", lambda: 0.0)
    failures = [
        None,
        SourceError("QEMU is\ngone"),
        WireError("nonsense"),
        PeerRefusedError("busy", "another push is under way"),
        RefusedError("disk-0 shrank"),
        UsageError("cannot use image"),
        ConnectionLostError("cut"),
        OSError(28, "No space left on device"),
        OperationalError("mdb_txn_commit: No space left on device"),
    ]
    takes_s = [10.0, 0.0, 350.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    began = trio.current_time()
    started: list[float] = []

    async def push(want: Want) -> Outcome | None:
        assert want is Want.RUN
        number = len(started)
        started.append(trio.current_time() - began)
        if number == len(failures):
            raise FENCED
        await trio.sleep(takes_s[number])
        if (failure := failures[number]) is not None:
            raise failure
        return None

    with caplog.at_level(logging.WARNING), pytest.raises(PeerRefusedError) as caught:
        await cycles(push, 300)
    assert caught.value is FENCED
    assert started == pytest.approx([0, 300, 600, 950, 1250, 1550, 1850, 2150, 2450, 2750])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8
    assert lines[0] == "this cycle failed: QEMU is gone"


async def test_cycles_that_take_longer_than_the_interval_follow_each_other_at_once_and_say_so(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.0)
    takes_s = [5000, 310, 310, 100, 100]
    began = autojump_clock.current_time()
    started: list[float] = []

    async def push(_: Want) -> Outcome:
        number = len(started)
        started.append(trio.current_time() - began)
        if number == len(takes_s):
            raise FENCED
        await trio.sleep(takes_s[number])
        kind = PushKind.SEED if number == 0 else PushKind.CYCLE
        return Outcome(point(number + 1, kind), resumed=False, reason="")

    with caplog.at_level(logging.INFO), pytest.raises(PeerRefusedError):
        await cycles(push, 300)
    assert started == pytest.approx([0, 5000, 5310, 5620, 5920, 6220])
    # Of a seed nothing is said, and of the slow cycles not each time.
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "cycles fall behind: the last took 310 s, push_interval is 300 s; the next starts at once",
        ),
        ("INFO", "cycles keep up again: the last took 100 s, push_interval is 300 s"),
    ]


def test_only_a_failover_on_the_receiver_ends_it() -> None:
    assert is_fenced(FENCED)
    assert not is_fenced(PeerRefusedError("busy", "a fenced-off disk"))
    assert not is_fenced(WireError("fenced"))
    assert not is_fenced(RefusedError("disk-0 shrank"))


def test_every_way_in_which_this_side_says_fenced_is_understood() -> None:
    refused = plan(Local(None, 1, None), VmState(newest=None, epoch=2, push_id=None), Want.RUN)
    assert isinstance(refused, Refuse)
    assert refused.fenced
    assert is_fenced(FencedError(refused.reason))
    assert not is_fenced(RefusedError(refused.reason))
    vm = ProtectedVm.register(VM, "web", "source")
    vm.epoch = 2
    with pytest.raises(RefusedError) as caught:
        vm.check_commit(PushKind.CYCLE, 1)
    assert is_fenced(caught.value)
    with pytest.raises(RefusedError) as caught:
        decide(State.UNSEEDED, Command.COMMIT_CYCLE)
    assert not is_fenced(caught.value)


@asynccontextmanager
async def two_sites(
    tmp_path: Path, at_receiver: Mapping[str, object] | None = None, **values: object
) -> AsyncIterator[tuple[Path, Path]]:
    """Configurations of a receiver that runs, on a port of its own, and of a source that can push to it."""
    common = {
        "dr_auth_token": KEY,
        "state_dir": tmp_path / "dr",
        "dr_listen": "127.0.0.1",
        **(at_receiver or {}),
    }
    receiver = write_config(tmp_path / "receiver.conf", common)
    (tmp_path / "dr").mkdir()
    config = check({key: str(value) for key, value in common.items()})
    async with trio.open_nursery() as nursery:
        port = await nursery.start(run_receiver, msgspec.structs.replace(config, dr_port=0))
        source = write_config(
            tmp_path / "source.conf", source_values(tmp_path, dr_port=port, **values)
        )
        yield source, receiver
        nursery.cancel_scope.cancel()


async def test_a_seed_a_push_and_what_both_sides_show_of_them(
    tmp_path: Path, replctl: Replctl
) -> None:
    async with two_sites(tmp_path) as (source, receiver):

        async def at(config: Path, *words: str) -> Any:
            done = await trio.to_thread.run_sync(
                lambda: replctl("--json", "--config", config, *words)
            )
            assert done.code == 0, done.err
            return done.json

        async def told(config: Path, *words: str) -> tuple[int, str, str]:
            done = await trio.to_thread.run_sync(lambda: replctl("--config", config, *words))
            return done.code, done.out, done.err

        assert await at(source, "status") == await at(source, "points", "web") == []
        code, _, err = await told(source, "push")
        assert (code, err.splitlines()[-1].endswith("run replctl seed first")) == (3, True)
        code, out, err = await told(source, "seed")
        assert code == 0
        assert out.startswith("seed of web complete: recovery point 1, ")
        assert "replicator backend up (v" in err
        assert "phase=F8.1 mode=seed vm=web" in err
        assert "DR cycle complete: vm=web cycle=1 bytes_pushed=" in err
        code, out, err = await told(source, "seed")
        assert (code, out) == (3, "")

        pushed = await at(source, "push")
        assert pushed.keys() == promised("PointInfo").keys() | promised("PushResult").keys()
        assert (pushed["vm"], pushed["kind"], pushed["point"], pushed["resumed"]) == (
            "web",
            "cycle",
            2,
            False,
        )

        for config, role, numbers in ((source, "source", [2]), (receiver, "receiver", [1, 2])):
            (status,) = await at(config, "status")
            keeps_promise("VmStatus", status)
            assert (status["role"], status["state"], status["newest_point"]) == (
                role,
                "protected",
                2,
            )
            points = await at(config, "points", pushed["uuid"])
            assert [point["point"] for point in points] == numbers
            assert points[-1]["root"] == pushed["root"]
            events = await at(config, "history", "web", "--since-id", "1", "--limit", "1")
            assert [(event["id"], event["kind"]) for event in events] == [(2, "seed-committed")]
            for words in (("status",), ("points", "web"), ("history", "web")):
                code, out, _ = await told(config, *words)
                assert (code, "protected" in out or "2023" in out or "20" in out) == (0, True)
                assert all(line == line.rstrip() for line in out.splitlines())
            code, out, err = await told(config, "points", "nope")
            assert (code, out) == (3, "")
            assert "no VM 'nope' here (known: web)" in err

        result = await at(receiver, "verify", "web")
        assert result.keys() == promised("VerifyResult").keys()
        assert (result["point"], result["good"], result["damages"]) == (2, True, [])


async def test_status_of_a_source_whose_receiver_is_gone(tmp_path: Path, replctl: Replctl) -> None:
    async with two_sites(tmp_path) as (source, _):

        async def told(*words: str) -> Done:
            return await trio.to_thread.run_sync(lambda: replctl("--config", source, *words))

        for command in ("seed", "push", "push"):
            assert (await told(command)).code == 0
    (status,) = (await told("--json", "status")).json
    assert status["warnings"] == []
    for _ in range(2):
        assert (await told("push")).code == 1
    (status,) = (await told("--json", "status")).json
    (warning,) = status["warnings"]
    assert re.fullmatch(
        r"the last 2 attempts at a cycle failed, since \S+Z, the last at \S+Z: cannot reach the receiver at"
        r" 127\.0\.0\.1:\d+: Connection refused",
        warning,
    )
    # The newest events, and a line that says that these are not all.
    done = await told("--json", "history", "web", "--limit", "2")
    assert [event["id"] for event in done.json] == [3, 4]
    assert done.err == (
        "2 earlier events are left out: --limit shows more, --since-id 0 begins with the first\n"
    )
    done = await told("--json", "history", "web", "--since-id", "1", "--limit", "2")
    assert [event["id"] for event in done.json] == [2, 3]
    assert done.err == "later events are left out: --since-id 3 goes on with them\n"
    assert (await told("history", "web")).err == ""


def test_a_newest_point_that_is_too_old_is_a_warning() -> None:
    newest = point(1, PushKind.SEED)
    taken = newest.taken_at_us
    vm = ProtectedVm.register(VM, "web", "source")
    assert source_warnings(vm, None, taken, 600) == []
    vm.commit(newest)
    assert source_warnings(vm, None, taken + 600 * S, 600) == []
    assert source_warnings(vm, None, taken + 601 * S, 600) == [
        "no new recovery point for 10 min 1 s, rpo_target is 600 s"
    ]
    once = Trouble(taken, taken, "QEMU is gone", 1)
    failed = "the last attempt at a cycle failed, at 2023-11-14T22:13:20.000Z: QEMU is gone"
    assert source_warnings(vm, once, taken, 600) == [failed]
    again = msgspec.structs.replace(once, back_us=taken + 5 * S)
    assert source_warnings(vm, again, taken, 600) == [
        (
            "the push went on at 2023-11-14T22:13:25.000Z, after an attempt that failed at"
            " 2023-11-14T22:13:20.000Z: QEMU is gone"
        )
    ]
    often = msgspec.structs.replace(again, failures=3, at_us=taken + S)
    assert source_warnings(vm, often, taken, 600) == [
        (
            "the push went on at 2023-11-14T22:13:25.000Z, after 3 attempts that failed since"
            " 2023-11-14T22:13:20.000Z, the last at 2023-11-14T22:13:21.000Z: QEMU is gone"
        )
    ]
    # A breach that `run` has recorded is a warning of the VM itself, and not told twice.
    vm.breach_rpo(600, taken + 601 * S)
    assert source_warnings(vm, None, taken + 601 * S, 600) == []
    assert len(warnings(vm)) == 1


@asynccontextmanager
async def running(source: Path) -> AsyncIterator[trio.Process]:
    """`replctl run` as a process of its own; it must end within the block, or is killed."""
    code = "import sys; from replicator.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "--config", str(source), "run"]
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, words, stderr=subprocess.PIPE, check=False)
        yield await nursery.start(start)
        nursery.cancel_scope.cancel()


async def heard(process: trio.Process, words: bytes) -> bytes:
    """What it has said until it said this."""
    assert process.stderr is not None
    said = b""
    while words not in said:
        piece = await process.stderr.receive_some()
        assert piece, said
        said += piece
    return said


async def test_both_sides_notice_that_no_point_comes_any_more(
    tmp_path: Path, replctl: Replctl
) -> None:
    """The source's process is stuck, or gone: its receiver knows it too."""
    seen = trio.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "and there is no newer one: rpo_target is 2 s" in record.getMessage():
                seen.set()

    handler = Handler()
    logging.getLogger("replicator.push.rpo").addHandler(handler)
    values = {"push_interval": 3600, "rpo_target": 1}
    try:
        async with (
            two_sites(tmp_path, {"rpo_target": 2}, **values) as (source, receiver),
            running(source) as process,
        ):
            with trio.fail_after(HANG_S):
                await heard(process, b"and there is no newer one: rpo_target is 1 s")
                process.kill()
                await seen.wait()
            for config, target_s in ((source, 1), (receiver, 2)):
                done = await trio.to_thread.run_sync(
                    partial(replctl, "--json", "--config", config, "status")
                )
                (status,) = done.json
                assert status["rpo_target_s"] == target_s
                assert status["rpo_age_s"] > target_s
                (warning,) = status["warnings"]
                assert warning.startswith(
                    f"the newest recovery point is older than rpo_target ({target_s} s) since "
                )
                done = await trio.to_thread.run_sync(
                    partial(replctl, "--json", "--config", config, "history", "web")
                )
                breaches = [event for event in done.json if event["kind"] == "rpo-breached"]
                assert [each["breach"]["target_s"] for each in breaches] == [target_s]
    finally:
        logging.getLogger("replicator.push.rpo").removeHandler(handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_run_seeds_pushes_and_stops_cleanly_when_told(
    tmp_path: Path, number: signal.Signals
) -> None:
    """A process of its own: signals are the point."""
    async with two_sites(tmp_path, push_interval=1) as (source, _), running(source) as process:
        assert process.stderr is not None
        with trio.fail_after(HANG_S):
            said = await heard(process, b"DR cycle complete: vm=web cycle=2 ")
            process.send_signal(number)
            async for piece in process.stderr:
                said += piece
            assert await process.wait() == 0, said
        assert b"phase=F8.2 mode=bitmap-push vm=web\n" in said
        assert said.endswith(f"stopping on {number.name}\n".encode()), said
