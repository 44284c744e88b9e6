# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whole pushes, from a source's image to a receiver's points, over lines and disks that fail."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from receiver.service import sessions
from replicator import durable
from replicator.credentials import source as source_credentials
from replicator.domain.model import PushKind
from replicator.errors import (
    AuthenticationError,
    DamageError,
    PeerRefusedError,
    RefusedError,
    WireError,
)
from replicator.imagemap import ImageMap
from replicator.push import connection, patience, pusher, sender, transfer
from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.plan import Want
from replicator.wire import messages as m
from replicator.wire import stream
from replicator.wire.framing import MessageStream
from tests.limits import HANG_S
from tests.push.lab import files_of, state_of
from tests.push.proxy import Cut, Line, proxied
from tests.sites import GRAIN, ReceiverSite, SourceSite, receiver_site, source_site

SIZE = 2 << 20
#: Cuts each way, of a seed (which needs two new sides) and of a cycle.
SEED_CUTS, CYCLE_CUTS = 16, 30


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken line is tried again at once; acknowledgements and messages are as small as these disks."""
    monkeypatch.setattr(patience, "pause_s", lambda *_: 0.0)
    monkeypatch.setattr(sessions, "ACK_BYTES", 3 * GRAIN)
    monkeypatch.setattr(sender, "_MESSAGE_TARGET", GRAIN)


def scattered(seed: int) -> bytes:
    """A disk with data in every other quarter of a MiB, so that its stream has many records."""
    rng, piece = random.Random(seed), 1 << 18
    return b"".join(rng.randbytes(GRAIN) + bytes(piece - GRAIN) for _ in range(SIZE // piece))


def change(sx: SourceSite, seed: int) -> None:
    """Write to ten grains, each of them apart."""
    rng = random.Random(1000 + seed)
    first = GRAIN * (seed % 3)
    for at in range(first, first + 30 * GRAIN, 3 * GRAIN):
        sx.write("disk-0", at, rng.randbytes(GRAIN))


def make_disk(folder: Path, seed: int = 1) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    path = folder / f"disk-{seed}.raw"
    path.write_bytes(scattered(seed))
    return {"disk-0": path}


@asynccontextmanager
async def pair(
    folder: Path, **options: Any
) -> AsyncIterator[tuple[ReceiverSite, Line, SourceSite]]:
    """A source with one disk, a receiver and the line between them."""
    disks = make_disk(folder)
    async with (
        receiver_site(folder / "rx", **options) as rx,
        proxied(rx.port) as line,
        source_site(folder / "sx", line.port, disks) as sx,
    ):
        yield rx, line, sx


async def same_on_both_sides(rx: ReceiverSite, sx: SourceSite, points: int) -> None:
    assert len(rx.store.vm.points) == points
    (vm,) = sx.log.vms
    assert vm.newest is not None
    assert rx.store.newest() == m.PointRef(vm.newest.number, vm.newest.root, vm.newest.push_id)
    assert await rx.read(None) == sx.content("disk-0")


async def test_disks_take_turns_however_little_may_be_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of one disk must not be what another one waits for."""
    monkeypatch.setattr(connection, "ON_THE_WAY_MAX", 1)  # so four chunks hold
    order: list[int] = []
    data = connection.Connection.data

    async def noted(self: connection.Connection, disk: int, *rest: Any) -> float:
        order.append(disk)
        return await data(self, disk, *rest)

    monkeypatch.setattr(connection.Connection, "data", noted)
    disks = {}
    for number in range(3):
        path = tmp_path / f"{number}.raw"
        path.write_bytes(random.Random(number).randbytes(6 << 20))
        disks[f"disk-{number}"] = path
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks, dr_compression="off") as sx,
    ):
        with trio.fail_after(HANG_S):
            await sx.push(Want.SEED)
        for disk in disks:
            assert await rx.read(None, disk) == sx.content(disk)
    # Not one disk after the other: each has had a turn before any has come to its end.
    assert set(order[: len(order) // 2]) == {0, 1, 2}


# Cuts


async def totals(line: Line, push: Any) -> list[int]:
    """Bytes each way of a push whose line holds, up to the answer to its commit."""

    async def until_then(*_: Any) -> None:
        return

    line.passed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pusher, "compare_heads", until_then)
        await push()
    (passed,) = line.passed
    return passed


def places(total: int, way: str, number: int) -> list[Cut]:
    """Cuts from the end of the handshake to the last byte, evenly, and close together at both ends; and while the heads of the
    logs are compared, after the push.
    """
    first = 200 if way == "to_receiver" else 110
    ends = [first, first + 60, first + 150, total - 300, total - 150, total - 60, total - 1]
    count = number - len(ends)
    even = (first + (total - first) * n // count for n in range(count))
    cuts = sorted({at for at in (*ends, *even) if first <= at < total})
    cuts += [total + 30, total + 200, total + 700]
    return [Cut(to_receiver=at) if way == "to_receiver" else Cut(to_source=at) for at in cuts]


@pytest.mark.parametrize("way", ["to_receiver", "to_source"])
async def test_a_seed_goes_on_wherever_its_line_is_cut(tmp_path: Path, way: str) -> None:
    async with pair(tmp_path / "whole") as (_, line, sx):
        passed = await totals(line, lambda: sx.push(Want.SEED))
    total = passed[way == "to_source"]
    for number, cut in enumerate(places(total, way, SEED_CUTS)):
        async with pair(tmp_path / str(number)) as (rx, line, sx):
            line.cuts = [cut]
            outcome = await sx.push(Want.SEED)
            assert outcome.point.number == 1
            await same_on_both_sides(rx, sx, 1)


@pytest.mark.parametrize("way", ["to_receiver", "to_source"])
async def test_a_cycle_goes_on_wherever_its_line_is_cut(tmp_path: Path, way: str) -> None:
    """And what was acknowledged is not sent again."""
    async with pair(tmp_path / "all", dr_restore_points="100") as (rx, line, sx):
        await sx.push(Want.SEED)
        change(sx, 1)
        passed = await totals(line, lambda: sx.push(Want.PUSH))
        total = passed[way == "to_source"]
        safe: list[int] = []

        async def look() -> None:
            entry = await rx.log.journal_get(f"push/{sx.uuid}")
            safe.append(sum(entry["durable"]) if entry else 0)

        line.accepted = look
        went_on = 0
        for number, cut in enumerate(places(total, way, CYCLE_CUTS), 3):
            change(sx, number)
            line.cuts, line.passed, safe[:] = [cut], [], []
            outcome = await sx.push(Want.PUSH)
            assert outcome.point.number == number
            await same_on_both_sides(rx, sx, number)
            if len(line.passed) > 1:
                again = sum(sent for sent, _ in line.passed[1:])
                # Sizes differ by how well small things compress; one record is the unit of resuming.
                assert again <= passed[0] - safe[1] + GRAIN
                went_on += outcome.resumed_bytes > 0
        # Most answers come at the end of a push.
        assert went_on > (5 if way == "to_receiver" else 0)


@pytest.mark.parametrize(
    "cut", [Cut(to_receiver=1), Cut(to_receiver=50), Cut(to_source=60)], ids=repr
)
async def test_a_line_that_never_was_is_not_tried_again(tmp_path: Path, cut: Cut) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        line.cuts = [cut]
        with pytest.raises(ConnectionLostError, match="while authenticating"):
            await sx.push(Want.SEED)
        assert len(line.passed) == 1
        assert not files_of(sx.config.work_path)
        assert not rx.log.vms


async def test_a_push_is_committed_though_the_clock_is_set_back_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1_700_000_000_000_000_000, -3_600_000_000_000)
    async with pair(tmp_path) as (rx, _, sx):
        for module in (pusher, transfer):
            monkeypatch.setattr(module, "time", SimpleNamespace(time_ns=lambda: next(clock)))
        outcome = await sx.push(Want.SEED)
        assert outcome.point.duration_us == 0
        await same_on_both_sides(rx, sx, 1)


async def test_a_cut_between_commit_and_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        await sx.push(Want.SEED)
        change(sx, 2)
        cut_answers(monkeypatch, 1)
        line.passed.clear()
        outcome = await sx.push(Want.PUSH)
        assert outcome.reason == "it was committed already"
        assert len(line.passed) == 2
        await same_on_both_sides(rx, sx, 2)


def cut_answers(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The line breaks instead of carrying the next ``count`` messages that say Committed."""
    send = sessions._PushSession._send
    left = [count]

    async def cut(session: sessions._PushSession, message: m.Message) -> None:
        if isinstance(message, m.Committed) and left[0]:
            left[0] -= 1
            await trio.aclose_forcefully(session._stream)
        await send(session, message)

    monkeypatch.setattr(sessions._PushSession, "_send", cut)


async def test_a_commit_that_this_side_cannot_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer was lost, and then the spool: the push is given up here, and the next compares."""
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        change(sx, 2)
        cut_answers(monkeypatch, 100)
        sx.pusher.patience.limit_s = 0.0
        with pytest.raises(ConnectionLostError):
            await sx.push(Want.PUSH)
        for path in sorted(sx.config.work_path.rglob("*.skeleton")):
            path.unlink()
        monkeypatch.undo()
        second = sx.content("disk-0")
        outcome = await sx.push(Want.RUN)
        assert (outcome.point.number, outcome.compared is not None) == (3, True)
        assert "this side lost what it sent" in caplog.text
        await same_on_both_sides(rx, sx, 3)
        assert await rx.read(2) == second


async def test_a_line_that_goes_silent_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = stream.connect_stream
    idle = [0.2]  # of the first connection only

    async def impatient(*args: Any, **options: Any) -> Any:
        return await connect(*args, **(options | {"idle_timeout_s": idle.pop() if idle else 60.0}))

    async with pair(tmp_path) as (rx, line, sx):
        monkeypatch.setattr(source_credentials, "connect_stream", impatient)
        line.cuts = [Cut(to_source=400, silent=True)]
        await sx.push(Want.SEED)
        assert len(line.passed) == 2
        await same_on_both_sides(rx, sx, 1)


async def test_a_command_gives_up_a_line_that_breaks_at_the_same_place(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        line.always = Cut(to_receiver=2000)
        sx.pusher.patience.limit_s = 0.3
        with trio.fail_after(HANG_S), pytest.raises(ConnectionLostError):
            await sx.push(Want.SEED)
        assert len(line.passed) > 1
        line.always = None
        assert (await sx.push(Want.SEED)).resumed
        await same_on_both_sides(rx, sx, 1)


async def test_a_receiver_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise AssertionError("tried again")

    monkeypatch.setattr(patience, "pause_s", fail)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    async with source_site(tmp_path / "sx", port, make_disk(tmp_path)) as sx:
        with pytest.raises(
            ConnectionLostError, match=f"cannot reach the receiver at 127.0.0.1:{port}"
        ):
            await sx.push(Want.SEED)


async def test_a_wrong_key_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> float:
        raise AssertionError("tried again")

    monkeypatch.setattr(patience, "pause_s", fail)
    token = "c3" * 32
    async with receiver_site(tmp_path / "rx") as rx:
        before = await state_of(rx)
        async with source_site(tmp_path / "sx", rx.port, make_disk(tmp_path), token=token) as sx:
            with pytest.raises(AuthenticationError, match="token mismatch") as caught:
                await sx.push(Want.RUN)
            assert not files_of(sx.config.work_path)
        assert await state_of(rx) == before
    assert token not in caplog.text + str(caught.value)


# The session's own tasks


@asynccontextmanager
async def session() -> AsyncIterator[tuple[Connection, MessageStream, trio.Nursery]]:
    """A source's session, opened for a push, and the receiver's end of its line."""
    ours, theirs = trio.testing.memory_stream_pair()
    source = Connection(MessageStream(ours, m.LIMITS))
    receiver = MessageStream(theirs, m.LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.read_replies)
        source._session.message(opened := _open())
        await receiver.send(m.CONTROL, m.encode(m.Ready(opened.push_id, (0,))))
        await source.reply(m.Ready)
        source.begin((0,))
        yield source, receiver, nursery
        nursery.cancel_scope.cancel()


def _open() -> m.Open:
    disk = m.OpenDisk("disk-0", "id", 1, 1, 0)
    vm = "5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01"
    return m.Open(vm, "web", 1, "1" * 16, PushKind.SEED, 1, 0, None, 1, (disk,))


@pytest.mark.parametrize("how", ["refused", "end", "cut", "garbage", "wrong message", "ack"])
async def test_a_sender_that_waits_for_room_hears_of_the_end(
    how: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(connection, "UNACKED_MAX", 100)
    outcome: list[BaseException | None] = []
    async with session() as (source, receiver, nursery):
        await source.data(0, 0, [b"x" * 90])

        async def send_more() -> None:
            try:
                await source.data(0, 90, [b"y" * 90])
            except Exception as error:  # noqa: BLE001 - it is what the test is about
                outcome.append(error)
            else:
                outcome.append(None)

        nursery.start_soon(send_more)
        await trio.testing.wait_all_tasks_blocked()
        assert not outcome
        if how == "refused":
            await receiver.send(m.CONTROL, m.encode(m.Refused("no-room", "full", None, 1)))
        elif how == "end":
            await receiver.aclose()
        elif how == "cut":
            await receiver.stream.send_all(b"\0")
            await receiver.aclose()
        elif how == "garbage":
            await receiver.send(m.CONTROL, b"\xc1")
        elif how == "wrong message":
            await receiver.send(m.CONTROL, m.encode(m.VmState(None, 1, None)))
        else:
            await receiver.send(m.CONTROL, m.encode(m.Ack(0, 90)))
        await trio.testing.wait_all_tasks_blocked()
        wanted: dict[str, type] = {
            "refused": PeerRefusedError,
            "end": ConnectionLostError,
            "ack": type(None),
        }
        assert [type(error) for error in outcome] == [wanted.get(how, WireError)]
    assert autojump_clock.current_time() < 1


@pytest.mark.parametrize("ack", [m.Ack(0, 91), m.Ack(1, 10), m.Ack(255, 0)])
async def test_an_acknowledgement_of_what_was_not_sent(ack: m.Ack) -> None:
    async with session() as (source, receiver, _):
        await source.data(0, 0, [b"x" * 90])
        await receiver.send(m.CONTROL, m.encode(ack))
        with pytest.raises(WireError, match="acknowledged"):
            await source.reply(m.Committed)


async def test_a_sender_waits_until_what_it_sent_has_landed(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """However much may be unacknowledged: what is on its way is what a broken line costs."""
    del autojump_clock
    monkeypatch.setattr(connection, "ON_THE_WAY_MAX", 100)
    async with session() as (source, receiver, nursery):
        source.begin((0, 0), chunk=10)
        await source.data(0, 0, [b"x" * 60])
        sent: list[int] = []

        async def send_more() -> None:
            sent.append(round(await source.data(1, 0, [b"y" * 40])))
            sent.append(round(await source.data(1, 40, [b"y" * 40])))

        nursery.start_soon(send_more)
        await trio.testing.wait_all_tasks_blocked()
        assert sent == [0]
        await trio.sleep(7)
        await receiver.send(m.CONTROL, m.encode(m.Landed(0, 60)))
        await trio.testing.wait_all_tasks_blocked()
        assert sent == [0, 7]  # and it says how long it had to wait
        assert source.acked == (0, 0)
        assert not source.progressed


@pytest.mark.parametrize("landed", [m.Landed(0, 91), m.Landed(1, 10), m.Landed(255, 0)])
async def test_a_landing_of_what_was_not_sent(landed: m.Landed) -> None:
    async with session() as (source, receiver, _):
        await source.data(0, 0, [b"x" * 90])
        await receiver.send(m.CONTROL, m.encode(landed))
        with pytest.raises(WireError, match="has landed"):
            await source.reply(m.Committed)


async def test_a_reply_after_the_end_is_not_waited_for() -> None:
    async with session() as (source, receiver, _):
        await receiver.aclose()
        for _ in range(2):
            with pytest.raises(ConnectionLostError, match="ended the session"):
                await source.reply(m.Committed)


async def test_a_refusal_goes_before_the_broken_line() -> None:
    """The receiver refused and closed while this side was sending: the reason is not lost."""
    async with session() as (source, receiver, _):
        await receiver.send(m.CONTROL, m.encode(m.Refused("no-room", "full", None, 1)))
        await receiver.aclose()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PeerRefusedError) as caught:
            await source.send(m.Query("5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01", "web"))
        assert caught.value.code == "no-room"


async def test_pings_go_out(autojump_clock: trio.testing.MockClock) -> None:
    async with session() as (source, receiver, nursery):
        nursery.start_soon(source.ping, 2.0)
        for number in (1, 2, 3):
            message = await receiver.receive()
            assert message is not None
            assert (message[0], bytes(message[1])) == (m.CONTROL, m.encode(m.Ping()))
            assert autojump_clock.current_time() == pytest.approx(2.0 * number)
        await receiver.aclose()
        await trio.sleep(4.0)
        # The pings have stopped, and took no answer that the push waits for.
        with pytest.raises(ConnectionLostError):
            await source.reply(m.Committed)


# What was lost


async def test_seed_and_push_say_what_to_do(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        with pytest.raises(RefusedError, match="run replctl seed first") as caught:
            await sx.push(Want.PUSH)
        assert caught.value.exit_code == 3
        await sx.push(Want.SEED)
        before = await state_of(rx)
        with pytest.raises(RefusedError, match="already seeded, point 1"):
            await sx.push(Want.SEED)
        assert await state_of(rx) == before


async def test_a_source_that_lost_its_state_seeds_again_when_told_to(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        await sx.push(Want.SEED)
        change(sx, 2)
        await sx.push(Want.PUSH)
        contents = [scattered(1), sx.content("disk-0")]
        change(sx, 3)
        async with source_site(tmp_path / "sx2", line.port, sx.disks) as fresh:
            with pytest.raises(RefusedError, match="run replctl resync"):
                await fresh.push(Want.PUSH)
            # It may as well be another host that has a VM of this name.
            with pytest.raises(RefusedError, match="which this side never pushed"):
                await fresh.push(Want.RUN)
            outcome = await fresh.push(Want.SEED)
            assert (outcome.point.number, outcome.point.kind) == (3, PushKind.SEED)
            await rx.settled()
            await same_on_both_sides(rx, fresh, 3)
            change(fresh, 4)
            assert (await fresh.push(Want.RUN)).point.kind is PushKind.CYCLE
            await same_on_both_sides(rx, fresh, 4)
        for number, content in enumerate(contents, 1):
            assert await rx.read(number) == content


async def test_a_receiver_that_lost_its_state_is_seeded_again(tmp_path: Path) -> None:
    """Numbers go on: a point's number means one content for ever."""
    async with pair(tmp_path) as (_, _, sx):
        await sx.push(Want.SEED)
        change(sx, 2)
        await sx.push(Want.PUSH)
    async with (
        receiver_site(tmp_path / "new") as rx,
        source_site(tmp_path / "sx", rx.port, sx.disks) as again,
    ):
        with pytest.raises(RefusedError, match="run replctl seed first"):
            await again.push(Want.PUSH)
        outcome = await again.push(Want.RUN)
        assert (outcome.point.number, outcome.point.kind) == (3, PushKind.SEED)
        await rx.settled()
        await same_on_both_sides(rx, again, 1)
        change(again, 3)
        assert (await again.push(Want.RUN)).point.number == 4
        await rx.settled()
        await same_on_both_sides(rx, again, 2)


async def test_a_receiver_that_lost_its_log_keeps_the_replica_that_it_does_not_know(
    tmp_path: Path,
) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        await rx.settled()
        content, folder = sx.content("disk-0"), rx.store.paths.root
        change(sx, 2)
    shutil.rmtree(rx.config.state_dir / "events")
    async with (
        receiver_site(rx.config.state_dir) as again,
        source_site(tmp_path / "sx", again.port, sx.disks) as source,
    ):
        await source.push(Want.RUN)
        await again.settled()
        await same_on_both_sides(again, source, 1)
    aside = folder.with_name(f"{folder.name}.unknown-1")
    assert (aside / "replica" / "disk-0.raw").read_bytes() == content


async def test_a_vm_whose_folder_cannot_be_used_takes_nobody_down(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        await rx.settled()
        replica = rx.store.paths.root / "replica"
    aside = tmp_path / "replica"
    replica.rename(aside)
    replica.write_text("not a folder")
    async with (
        receiver_site(rx.config.state_dir) as again,
        source_site(tmp_path / "sx", again.port, sx.disks) as source,
    ):
        ((vm, reason),) = again.stores.unusable
        assert (vm.name, again.stores.all) == ("web", [])
        assert "replica" in reason
        with pytest.raises(RefusedError, match="cannot be used"):
            again.stores.find("web")
        with pytest.raises(PeerRefusedError, match="cannot use what it has of this VM") as refused:
            await source.push(Want.RUN)
        assert refused.value.code == "failed"
        replica.unlink()
        aside.rename(replica)
        change(source, 2)
        assert (await source.push(Want.RUN)).point.kind is PushKind.CYCLE
        assert again.stores.unusable == []
        await again.settled()
        await same_on_both_sides(again, source, 2)


async def test_an_image_that_changed_while_the_push_was_cut(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, line, sx):
        await sx.push(Want.SEED)
        change(sx, 2)
        sx.pusher.patience.limit_s = 0.0
        line.cuts = [Cut(to_receiver=500_000)]
        with pytest.raises(ConnectionLostError):
            await sx.push(Want.PUSH)
        assert await rx.store.unfinished() is not None
        change(sx, 3)
        outcome = await sx.push(Want.PUSH)
        assert (outcome.point.number, outcome.resumed) == (2, False)
        kinds = [type(event).__name__ for event in await sx.log.history(sx.uuid)]
        assert kinds[-2:] == ["PushAbandoned", "CycleCommitted"]
        await same_on_both_sides(rx, sx, 2)
        assert await rx.store.unfinished() is None


async def test_a_fenced_source_makes_no_snapshot(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        async with rx.store.changing() as vm:
            vm.start_promotion(1)
        change(sx, 2)
        before = await state_of(rx), files_of(sx.config.work_path)
        with pytest.raises(RefusedError, match="this source is fenced"):
            await sx.push(Want.RUN)
        assert (await state_of(rx), files_of(sx.config.work_path)) == before


async def test_a_vm_that_is_not_taken_makes_no_snapshot(tmp_path: Path) -> None:
    async with pair(tmp_path, exclude="web") as (rx, _, sx):
        with pytest.raises(PeerRefusedError) as caught:
            await sx.push(Want.RUN)
        assert caught.value.code == "unknown-vm"
        assert not files_of(sx.config.work_path)
        assert not rx.log.vms


async def test_a_disk_that_shrank(tmp_path: Path) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        os.truncate(sx.disks["disk-0"], SIZE // 2)
        before = await state_of(rx)
        with pytest.raises(RefusedError, match="shrank from"):
            await sx.push(Want.RUN)
        assert await state_of(rx) == before
        os.truncate(sx.disks["disk-0"], SIZE)
        await sx.push(Want.RUN)
        await same_on_both_sides(rx, sx, 2)
        os.truncate(sx.disks["disk-0"], SIZE // 2)
        await sx.push(Want.SEED_AGAIN)
        await same_on_both_sides(rx, sx, 3)
        assert len(await rx.read(2)) == SIZE


# What is damaged


@pytest.mark.parametrize("how", ["damaged map", "another root"])
async def test_a_push_that_the_two_sides_disagree_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """It is given up on both sides, and the next one compares, in any process."""
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        await rx.settled()
        before = await state_of(rx)
        change(sx, 3)
        if how == "damaged map":
            # The map hides a change: its page does not fit the nodes above it any more.
            (path,) = (sx.config.state_dir / "maps").rglob("*.map")
            with ImageMap.open(path) as known:
                digest = known.algorithm.digest_grains(sx.content("disk-0")[:GRAIN], GRAIN)
                hide(path, known.digests(0, 1), digest)
            with pytest.raises(DamageError):
                await sx.push(Want.PUSH)
        else:
            finish = sx.pusher.transfer.finish

            def lie(*args: Any) -> m.Finish:
                return msgspec.structs.replace(finish(*args), root=bytes(32))

            monkeypatch.setattr(sx.pusher.transfer, "finish", lie)
            with pytest.raises(PeerRefusedError) as caught:
                await sx.push(Want.PUSH)
            assert caught.value.code == "root-mismatch"
        assert await state_of(rx) == before
        kinds = [type(event).__name__ for event in await sx.log.history(sx.uuid)]
        assert kinds[-1] == "PushAbandoned"
        assert not files_of(sx.config.work_path)
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, sx.disks) as again,
    ):
        outcome = await again.push(Want.RUN)
        assert outcome.compared is not None
        await same_on_both_sides(rx, again, 2)


def hide(path: Path, old: bytes, new: bytes) -> None:
    """Put another digest in a map's file where ``old`` stands, and leave the nodes above as they are."""
    with path.open("r+b") as file:
        at = 0
        while True:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            data = os.pread(file.fileno(), 1 << 16, at)
            if old in data:
                os.pwrite(file.fileno(), new, at + data.index(old))
                return
            at += len(data)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_receiver_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async with pair(tmp_path) as (rx, _, sx):
        await sx.push(Want.SEED)
        await rx.settled()
        change(sx, 2)
        write_at = durable.DurableFile.write_at
        writes = 0

        def full(file: durable.DurableFile, data: bytes, offset: int) -> None:
            nonlocal writes
            if file.path.endswith(".phcbt"):
                writes += 1
                if writes > 4:
                    raise OSError(code, os.strerror(code), file.path)
            write_at(file, data, offset)

        monkeypatch.setattr(durable.DurableFile, "write_at", full)
        with pytest.raises(PeerRefusedError) as caught:
            await sx.push(Want.PUSH)
        assert caught.value.code == ("failed" if code == errno.EIO else "no-room")
        assert str(tmp_path) not in caught.value.reason
        assert await rx.read(None) == scattered(1)
        monkeypatch.setattr(durable.DurableFile, "write_at", write_at)
        outcome = await sx.push(Want.PUSH)
        assert outcome.resumed
        assert outcome.resumed_bytes > 0
        await same_on_both_sides(rx, sx, 2)


# Strangers at the door


async def test_connections_without_a_key_do_not_keep_a_source_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "HANDSHAKES_MAX", 3)
    async with pair(tmp_path) as (rx, _, sx), AsyncExitStack() as strangers:
        held = []
        for _ in range(8):
            stranger = await trio.open_tcp_stream("127.0.0.1", rx.port)
            held.append(await strangers.enter_async_context(stranger))
            await stranger.send_all(b"RPLW")
        # The oldest made room for the newer; the others are still waited for when the source comes.
        with trio.fail_after(HANG_S):
            assert await held[0].receive_some() == b""
            await sx.push(Want.SEED)
        await same_on_both_sides(rx, sx, 1)
