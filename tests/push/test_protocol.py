# SPDX-License-Identifier: AGPL-3.0-or-later
"""The push protocol against sources that do what ours never would."""

from __future__ import annotations

import errno
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.service import sessions
from replicator.credentials import receiver as receiver_credentials
from replicator.domain.model import PushKind
from replicator.errors import WireError
from replicator.phcbt import Algorithm
from replicator.wire import messages as m
from replicator.wire import stream
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.session import FROM_SOURCE, TABLE, Phase, Session, as_markdown
from tests.limits import HANG_S
from tests.push.lab import CHUNK, VM, RawPush, RawSource, raw_push, raw_source, state_of
from tests.sites import TOKEN, ReceiverSite, receiver_site

CONTENT = random.Random(1).randbytes(200_000)
OTHER = random.Random(2).randbytes(200_000)
OTHER_VM = "00000000-0000-4000-8000-000000000001"
change = msgspec.structs.replace


@asynccontextmanager
async def seeded(folder: Path, **options: Any) -> AsyncIterator[ReceiverSite]:
    """A receiver with one point, which is applied."""
    async with receiver_site(folder, **options) as rx:
        async with raw_source(rx.port) as source:
            assert isinstance(await raw_push(CONTENT).send(source), m.Committed)
        await rx.settled()
        yield rx


def cycle(rx: ReceiverSite, content: bytes = OTHER, **fields: Any) -> RawPush:
    return raw_push(content, rx.store.vm.newest, push_id="2" * 16, **fields)


def with_disk(push: RawPush, **fields: Any) -> m.Open:
    (disk,) = push.opened.disks
    return change(push.opened, disks=(change(disk, **fields),))


#: One of each message that the table knows.
FROM_RECEIVER = [
    m.VmState(None, 1, None),
    m.Ready("1" * 16, (0,)),
    m.Ack(0, 1),
    m.Landed(0, 1),
    m.Committed("1" * 16, 1, bytes(32), 1, 1),
    m.Refused("busy", "", None, 1),
    m.Described(
        1,
        0,
        "1" * 16,
        PushKind.SEED,
        1,
        1,
        1,
        1,
        1,
        bytes(32),
        0,
        False,
        (m.DiskMap("disk-0", "id-0", 1, bytes(32), 1, 4096, 1),),
    ),
    m.Pages((b"",)),
    m.PagesEnd(),
]
#: What a resync asks.
OF_A_RESYNC: list[m.Message] = [
    m.Describe(str(VM), "web"),
    m.AskPages(str(VM), "web", "disk-0", bytes(32), 0, (0,)),
    m.Doubt(str(VM), "web", "disk-0", 0, 1),
]
SAMPLES = [
    *FROM_RECEIVER,
    m.Query(str(VM), "web"),
    raw_push(b"x").opened,
    m.Data(0, 0, b"x"),
    raw_push(b"x").finish,
    m.Abandon(str(VM), "1" * 16, "a test"),
    *OF_A_RESYNC,
]


# The table


def test_the_page_holds_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
    assert as_markdown() in page


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_only_what_the_table_lists_may_come(phase: Phase, message: object) -> None:
    session, kind = Session(), type(message)
    session.phase = phase
    if (phase, kind) in TABLE:
        session.message(message)
        assert session.phase is TABLE[phase, kind]
    else:
        with pytest.raises(WireError, match=f"{kind.__name__} is not allowed while {phase.value}"):
            session.message(message)
        assert session.phase is phase


@pytest.mark.parametrize("phase", Phase)
def test_signs_of_life_may_come_at_any_time(phase: Phase) -> None:
    session = Session()
    session.phase = phase
    session.message(m.Ping())
    session.message(m.Pong())
    assert session.phase is phase


def test_every_phase_is_left_by_what_its_side_sends() -> None:
    waits_for_receiver = {Phase.ASKED, Phase.OPENING, Phase.FINISHING}
    waits_for_receiver |= {Phase.COMPARING, Phase.SIGNING, Phase.PAGING}
    for phase in Phase:
        movers = [kind for (at, kind), to in TABLE.items() if at is phase and to is not phase]
        assert movers
        assert all((kind in FROM_SOURCE) != (phase in waits_for_receiver) for kind in movers) or (
            phase is Phase.PUSHING
        )


async def bring_to(rx: ReceiverSite, source: RawSource, phase: Phase) -> RawPush:
    """A session that stands in a phase in which the source may speak."""
    push = cycle(rx)
    if phase in {Phase.PUSHING, Phase.REFUSED}:
        assert isinstance(await source.ask(push.opened), m.Ready)
    if phase is Phase.REFUSED:
        await source.data(0, 0, b"no stream of ours".ljust(1000))
        assert isinstance(await source.hear(), m.Refused)
    return push


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.PUSHING, Phase.REFUSED])
@pytest.mark.parametrize("kind", [m.Query, m.Open, m.Data, m.Finish, m.Abandon, m.Ping])
async def test_every_message_in_every_phase(tmp_path: Path, phase: Phase, kind: type) -> None:
    """What the table lists is answered; the rest ends the session, and nothing of it happens."""
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        push = await bring_to(rx, source, phase)
        said: dict[type, m.Message] = {
            m.Query: m.Query(str(VM), "web"),
            m.Open: push.opened,
            m.Finish: push.finish,
            m.Abandon: m.Abandon(str(VM), push.opened.push_id, "a test"),
            m.Ping: m.Ping(),
        }
        if kind is m.Data:
            await source.data(0, 0, push.stream)
        else:
            await source.say(said[kind])
        listed = kind is m.Ping or (phase, kind) in TABLE
        if listed:
            # Data, and a Finish after a refusal, have no answer of their own.
            await source.say(m.Ping())
            assert await source.hear_any() is not None
        else:
            assert await source.ended()
        assert rx.store.vm.newest is not None
        assert rx.store.vm.newest.number == 1


@pytest.mark.parametrize(
    "message", [*FROM_RECEIVER, m.Pong()], ids=lambda message: type(message).__name__
)
async def test_a_receivers_message_from_a_source_ends_the_session(
    tmp_path: Path, message: m.Message
) -> None:
    async with receiver_site(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        await source.say(message)
        assert await source.ended()


# Refusals

Change = Callable[[ReceiverSite], m.Open]
REFUSED_OPENS: dict[str, tuple[str, Change]] = {
    "parent-number": ("wrong-parent", lambda rx: change(cycle(rx).opened, parent=7, point=8)),
    "parent-content": ("wrong-parent", lambda rx: change(cycle(rx).opened, parent_root=bytes(32))),
    "no-parent-content": ("wrong-parent", lambda rx: change(cycle(rx).opened, parent_root=None)),
    "cycle-of-an-old-number": ("wrong-parent", lambda rx: change(cycle(rx).opened, point=1)),
    "seed-on-another-point": (
        "wrong-parent",
        lambda rx: change(cycle(rx).opened, kind=PushKind.SEED, parent=0, parent_root=None),
    ),
    "seed-of-an-old-number": (
        "wrong-parent",
        lambda _: change(raw_push(OTHER).opened, parent=1, push_id="2" * 16),
    ),
    "another-chain": ("wrong-parent", lambda rx: with_disk(cycle(rx), since=0)),
    "unknown-disk": ("wrong-parent", lambda rx: with_disk(cycle(rx), disk="disk-9")),
    "shrink": ("shrink", lambda rx: with_disk(cycle(rx), size=100_000)),
    "disk-twice": (
        "bad-request",
        lambda rx: change(cycle(rx).opened, disks=cycle(rx).opened.disks * 2),
    ),
    "unknown-vm": ("unknown-vm", lambda rx: change(cycle(rx).opened, vm=OTHER_VM, name="db")),
    "name-of-another": ("unknown-vm", lambda _: change(raw_push(OTHER).opened, vm=OTHER_VM)),
    "first-push-on-a-point": (
        "wrong-parent",
        lambda _: change(raw_push(OTHER).opened, vm=OTHER_VM, name="db", parent=3, point=4),
    ),
    "first-push-with-a-disk-twice": (
        "bad-request",
        lambda _: change(
            raw_push(OTHER).opened, vm=OTHER_VM, name="db", disks=raw_push(OTHER).opened.disks * 2
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED_OPENS)
async def test_an_open_is_refused_before_anything_changes(tmp_path: Path, case: str) -> None:
    code, opened = REFUSED_OPENS[case]
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        answer = await source.ask(opened(rx))
        assert isinstance(answer, m.Refused)
        assert answer.code == code
        if code != "unknown-vm" and opened(rx).vm == str(VM):
            assert answer.newest == rx.store.newest()
        else:
            assert answer.newest is None
        assert await state_of(rx) == before
        # The session goes on: the source chooses what to do.
        assert isinstance(await cycle(rx).send(source), m.Committed)


async def test_a_refused_open_leaves_another_push_that_landed_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ACK_S", 0.01)
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        async with raw_source(rx.port) as source:
            assert isinstance(await source.ask(push.opened), m.Ready)
            await source.data(0, 0, push.stream[: len(push.stream) // 2])
            await source.hear_ack()
        async with raw_source(rx.port) as source:
            before = await state_of(rx)
            twice = change(push.opened, push_id="3" * 16, disks=push.opened.disks * 2)
            answer = await source.ask(twice)
            assert isinstance(answer, m.Refused)
            assert await state_of(rx) == before
            answer = await source.ask(push.opened)
            assert isinstance(answer, m.Ready)
            assert answer.positions[0] > 0


@pytest.mark.parametrize("undone", [False, True])
async def test_a_fenced_source(tmp_path: Path, undone: bool) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        async with rx.store.changing() as vm:
            vm.start_promotion(1)
        if undone:
            async with rx.store.changing() as vm:
                vm.undo_promotion()
        before = await state_of(rx)
        answer = await source.ask(cycle(rx).opened)
        assert isinstance(answer, m.Refused)
        assert (answer.code, answer.epoch) == ("stale-epoch", 2)
        assert await state_of(rx) == before
        newer = change(cycle(rx).opened, epoch=2)
        answer = await source.ask(newer)
        if undone:
            assert isinstance(answer, m.Ready)
        else:
            assert isinstance(answer, m.Refused)
            assert answer.code == "state"
            assert await state_of(rx) == before


@pytest.mark.parametrize("options", [{"vm": "db*"}, {"exclude": "w*"}, {"exclude": str(VM)}])
async def test_a_vm_that_is_not_selected(tmp_path: Path, options: dict[str, Any]) -> None:
    async with receiver_site(tmp_path / "rx", **options) as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        for message in (m.Query(str(VM), "web"), raw_push(CONTENT).opened):
            answer = await source.ask(message)
            assert isinstance(answer, m.Refused)
            assert answer.code == "unknown-vm"
        assert await state_of(rx) == before


@pytest.mark.parametrize("scope", ["web", str(VM)])
async def test_a_key_pushes_its_own_vm_only(tmp_path: Path, scope: str) -> None:
    web, db = "a1" * 32, "b2" * 32
    keys = Keyring(
        [PreSharedKey.from_hex(web, name="web.key", vm=scope), PreSharedKey.from_hex(db, vm="db")]
    )
    async with receiver_site(tmp_path / "rx", keys=keys) as rx:
        async with raw_source(rx.port, web) as source:
            assert isinstance(await raw_push(CONTENT).send(source), m.Committed)
        await rx.settled()
        before = await state_of(rx)
        push = cycle(rx)
        async with raw_source(rx.port, db) as source:
            for message in (
                m.Query(str(VM), "web"),
                push.opened,
                m.Abandon(str(VM), "1" * 16, "mine now"),
                *OF_A_RESYNC,
                # Under its own name, but the UUID is the other's: what counts is the name that it has here.
                m.Query(str(VM), "db"),
                change(push.opened, name="db"),
            ):
                answer = await source.ask(message)
                assert isinstance(answer, m.Refused)
                assert answer.code == "wrong-key"
                assert (answer.newest, answer.epoch) == (None, 1)
                assert db not in answer.reason
            assert await state_of(rx) == before


async def test_a_client_without_the_key_gets_no_session(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with receiver_site(tmp_path / "rx") as rx:
        with pytest.raises(WireError, match="token mismatch"):
            async with raw_source(rx.port, "00" * 32):
                pass
        async with raw_source(rx.port) as source:
            assert isinstance(await source.ask(m.Query(str(VM), "web")), m.VmState)
    assert TOKEN not in caplog.text


@pytest.mark.parametrize(
    "lie",
    [
        {"vm": m.vm_uuid(OTHER_VM)},
        {"disk_id": "disk-1"},
        {"disk_size": 204_800},
        {"base_root": b"\1" * 32},
        {"base_point": 0, "base_root": bytes(32)},
        {"target_point": 9},
        {"grain": 8192},
        {"algorithm": Algorithm.BLAKE3_256},
    ],
    ids=lambda lie: next(iter(lie)),
)
async def test_a_stream_that_is_not_the_one_announced(tmp_path: Path, lie: dict[str, Any]) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        push = cycle(rx, OTHER.ljust(200_704), **lie)
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, push.stream)
        answer = await source.hear()
        assert isinstance(answer, m.Refused)
        assert answer.code == "bad-request"
        # What had landed can never be committed, and is gone.
        assert await state_of(rx) == before


async def test_the_end_of_a_push_with_another_number_of_disks(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        push = cycle(rx)
        push = RawPush(push.opened, push.stream, change(push.finish, disks=push.finish.disks * 2))
        answer = await push.send(source)
        assert isinstance(answer, m.Refused)
        assert answer.code == "bad-request"
        assert await state_of(rx) == before


@pytest.mark.parametrize("what", ["root", "stream_root", "vm root"])
async def test_another_content_than_the_source_has(tmp_path: Path, what: str) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        push = cycle(rx)
        (final,) = push.finish.disks
        if what == "vm root":
            finish = change(push.finish, root=bytes(32))
        else:
            finish = change(push.finish, disks=(change(final, **{what: bytes(32)}),))
        answer = await RawPush(push.opened, push.stream, finish).send(source)
        assert isinstance(answer, m.Refused)
        assert answer.code == "root-mismatch"
        assert await state_of(rx) == before
        assert isinstance(await push.send(source), m.Committed)


async def test_a_flipped_bit_in_a_payload(tmp_path: Path) -> None:
    """The frames are authentic: the source's memory, or ours, is bad."""
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        push = cycle(rx)
        damaged = bytearray(push.stream)
        damaged[len(damaged) // 2] ^= 1
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, bytes(damaged))
        # More may be on its way when the refusal is sent; it is dropped, and so is the Finish.
        await source.data(0, len(damaged), b"more")
        await source.say(push.finish)
        answer = await source.hear()
        assert isinstance(answer, m.Refused)
        assert answer.code == "damaged-stream"
        assert isinstance(await source.ask(m.Query(str(VM), "web")), m.VmState)
        assert await state_of(rx) == before
        assert await rx.read(1) == CONTENT


async def test_a_finish_before_the_end_of_the_stream(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        push = cycle(rx)
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, push.stream[:-1])
        answer = await source.ask(push.finish)
        assert isinstance(answer, m.Refused)
        assert answer.code == "damaged-stream"


# One session at a time


async def test_two_pushes_of_one_vm(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        async with raw_source(rx.port) as first, raw_source(rx.port) as second:
            assert isinstance(await first.ask(push.opened), m.Ready)
            before = await state_of(rx)
            answer = await second.ask(change(push.opened, push_id="3" * 16))
            assert isinstance(answer, m.Refused)
            assert answer.code == "busy"
            assert await state_of(rx) == before
            await first.data(0, 0, push.stream)
            assert isinstance(await first.ask(push.finish), m.Committed)


async def test_a_reconnect_ends_the_half_open_session(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        async with raw_source(rx.port) as old, raw_source(rx.port) as new:
            assert isinstance(await old.ask(push.opened), m.Ready)
            await old.data(0, 0, push.stream[:100])
            assert isinstance(await push.send(new), m.Committed)
            assert await old.ended()
        assert not rx.server.is_pushing(VM)


async def test_one_session_may_open_another_push(tmp_path: Path) -> None:
    """The claim follows the push: a reconnect of the second is not taken for another's."""
    async with seeded(tmp_path / "rx") as rx:
        first, second = cycle(rx), raw_push(OTHER, rx.store.vm.newest, push_id="3" * 16)
        async with raw_source(rx.port) as old, raw_source(rx.port) as new:
            assert isinstance(await old.ask(first.opened), m.Ready)
            assert isinstance(await old.ask(second.opened), m.Ready)
            assert isinstance(await second.send(new), m.Committed)


async def test_a_committed_push_is_answered_again(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        async with raw_source(rx.port) as source:
            answer = await push.send(source)
        await rx.settled()
        before = await state_of(rx)
        async with raw_source(rx.port) as source:
            assert await source.ask(push.opened) == answer
        assert await state_of(rx) == before


async def test_a_reconnect_waits_for_a_commit_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is cut while the receiver commits: the point counts, and the push is told so when it comes back."""
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        inside, go_on = trio.Event(), trio.Event()
        commit = rx.store._commit

        async def slow(*args: Any) -> None:
            inside.set()
            await go_on.wait()
            await commit(*args)

        monkeypatch.setattr(rx.store, "_commit", slow)
        async with trio.open_nursery() as nursery:
            async with raw_source(rx.port) as source:
                assert isinstance(await source.ask(push.opened), m.Ready)
                await source.data(0, 0, push.stream)
                await source.say(push.finish)
                await inside.wait()
            answers = []

            async def come_back() -> None:
                async with raw_source(rx.port) as source:
                    answers.append(await source.ask(push.opened))

            nursery.start_soon(come_back)
            await trio.testing.wait_all_tasks_blocked(0.01)
            go_on.set()
        assert isinstance(answers[0], m.Committed)


# Abandonment


async def test_an_abandoned_push_is_forgotten(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx:
        before = await state_of(rx)
        push = cycle(rx)
        async with raw_source(rx.port) as source:
            assert isinstance(await source.ask(push.opened), m.Ready)
            await source.data(0, 0, push.stream[:-100])
            answer = await source.ask(m.Abandon(str(VM), push.opened.push_id, "gone"))
            assert answer == m.VmState(rx.store.newest(), 1, None)
            assert await state_of(rx) == before
            # Again, and one that was never there: nothing to do.
            answer = await source.ask(m.Abandon(str(VM), push.opened.push_id, "gone"))
            assert answer == m.VmState(rx.store.newest(), 1, None)
            answer = await source.ask(m.Abandon(OTHER_VM, push.opened.push_id, "gone"))
            assert answer == m.VmState(None, 1, None)
        assert await state_of(rx) == before


# What is no protocol at all


@pytest.mark.parametrize(
    ("disk", "offset", "payload"),
    [(1, 0, b"x"), (65535, 0, b"x"), (0, 1, b"x"), (0, 1 << 63, b"x"), (0, 0, b"")],
)
async def test_data_that_is_out_of_place_ends_the_session(
    tmp_path: Path, disk: int, offset: int, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        assert isinstance(await source.ask(cycle(rx).opened), m.Ready)
        await source.data(disk, offset, payload)
        assert await source.ended()
        assert "session ended" in caplog.text
        assert not rx.server.is_pushing(VM)


async def test_data_after_the_end(tmp_path: Path) -> None:
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        before = await state_of(rx)
        push = cycle(rx)
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, push.stream)
        await source.data(0, len(push.stream), b"x")
        answer = await source.hear()
        assert isinstance(answer, m.Refused)
        assert answer.code == "damaged-stream"
        assert await state_of(rx) == before


_PING = m.encode(m.Ping())
_UNKNOWN = b"\x82" + _PING[1:] + b"\xa1x"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (m.CONTROL, b""),
        (m.CONTROL, b"\xc1"),
        (m.CONTROL, _PING + b"x"),
        (m.CONTROL, _UNKNOWN + b"\x91" * 200_000 + b"\xc0"),
        (m.CONTROL, _UNKNOWN + b"\xdd\xff\xff\xff\xff"),
        (m.CONTROL, b"\x81\xa4type\xa4\xff\xff\xff\xff"),
        (m.CONTROL, bytes(m.LIMITS.body_bytes_max(m.CONTROL) + 1)),
        (m.DATA, bytes(m.LIMITS.body_bytes_max(m.DATA) + 1)),
        (m.DATA, b"\0"),
        (0, b""),
        (3, b"x"),
        (255, bytes(100_000)),
    ],
    ids=[
        "empty",
        "unused",
        "trailing",
        "deep",
        "long",
        "no-utf8",
        "big",
        "big-data",
        "short-data",
        "k0",
        "k3",
        "k255",
    ],
)
async def test_bytes_that_are_no_message_end_the_session_alone(
    tmp_path: Path, kind: int, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        receiver_site(tmp_path / "rx") as rx,
        raw_source(rx.port) as bystander,
        raw_source(rx.port) as source,
    ):
        # The head may be enough for the receiver.
        with trio.fail_after(HANG_S), suppress(trio.BrokenResourceError):
            await source.stream.send(kind, body)
        assert await source.ended()
        assert isinstance(await bystander.ask(m.Query(str(VM), "web")), m.VmState)
    assert "session ended" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


_TEXTS = st.sampled_from(["web", "db", "", "x" * 255, "a/b", "\0", "ü"])
_NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 1 << 48, 1 << 60, 1 << 63])
_IDS = st.sampled_from(["1" * 16, "2" * 16, "g" * 16, ""])
_VMS = st.sampled_from([str(VM), OTHER_VM, "no-uuid", str(VM).upper()])
_ROOTS = st.sampled_from([None, bytes(32), b"\1" * 32, b"short"])
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.sampled_from(["Query", "Open", "Finish", "Abandon", "Ping", "Ready", "Nothing"]),
    "vm": _VMS, "name": _TEXTS, "push_id": _IDS, "reason": _TEXTS, "kind": st.sampled_from(["seed", "cycle", "x"]),
    "epoch": _NUMBERS, "point": _NUMBERS, "parent": _NUMBERS, "taken_at_us": _NUMBERS, "duration_us": _NUMBERS,
    "parent_root": _ROOTS, "root": _ROOTS,
}  # fmt: skip
_BITS = st.binary(min_size=1, max_size=40)


@st.composite
def _mutated(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    """A correct message with some fields, or some bytes, changed."""
    body = draw(st.sampled_from(valid))
    fields = msgspec.msgpack.decode(body)
    for key in draw(st.lists(st.sampled_from(sorted(_FIELDS)), max_size=3, unique=True)):
        fields[key] = draw(_FIELDS[key])
    if draw(st.booleans()):
        return msgspec.msgpack.encode(fields)
    data = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


async def _attack(rx: ReceiverSite, steps: list[tuple[int, bytes]]) -> None:
    async with raw_source(rx.port) as source:
        for kind, body in steps:
            try:
                await source.stream.send(kind, body)
            except trio.BrokenResourceError:
                return
        await source.stream.stream.aclose()


def test_no_message_crashes_the_receiver_or_changes_a_point(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Any messages from a holder of the key: the server goes on, and what is committed stays as it is."""
    good = raw_push(CONTENT)
    final = good.finish.disks[0]
    valid = [
        m.encode(message)
        for message in (
            m.Query(str(VM), "web"),
            good.opened,
            change(good.opened, push_id="2" * 16, kind=PushKind.CYCLE, point=2, parent=1),
            change(good.finish, push_id="2" * 16),
            change(good.finish, disks=(final, final)),
            m.Abandon(str(VM), "2" * 16, "x"),
            m.Ping(),
        )
    ]
    pieces = st.sampled_from([good.stream[:50], good.stream[:5000], good.stream, b"x" * 3000])
    data = st.builds(
        lambda disk, offset, payload: m.data_head(disk, offset) + payload,
        st.sampled_from([0, 0, 0, 1, 65535]),
        st.sampled_from([0, 0, 0, 50, 5000, 1 << 60]),
        st.one_of(pieces, _BITS),
    )
    step = st.one_of(
        st.tuples(st.just(m.CONTROL), _mutated(valid)),
        st.tuples(st.just(m.CONTROL), st.sampled_from(valid)),
        st.tuples(st.just(m.DATA), data),
        st.tuples(st.integers(0, 255), _BITS),
    )
    attacks: list[list[tuple[int, bytes]]] = []

    @settings(max_examples=150)
    @given(st.lists(step, min_size=1, max_size=6))
    def gather(steps: list[tuple[int, bytes]]) -> None:
        attacks.append(steps)

    gather()

    async def main() -> None:
        async with seeded(tmp_path / "rx") as rx:
            point = rx.store.vm.points[1]
            for steps in attacks:
                await _attack(rx, steps)
            # A seed may be among them, if the mutations hit on one; the first point stays.
            assert rx.store.vm.points[1] == point
            assert await rx.read(1) == CONTENT
            async with raw_source(rx.port) as source:
                assert isinstance(await source.ask(m.Query(str(VM), "web")), m.VmState)

    trio.run(main)
    assert len(attacks) > 100
    assert not [record for record in caplog.records if record.exc_info]


# Time


async def test_a_source_that_stops_in_mid_push_frees_the_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The idle deadline is the transport's; the session ends with it, and another push may come."""
    accept = stream.accept_stream
    accepted: list[Any] = []

    async def noted(*args: Any, **options: Any) -> Any:
        accepted.append(await accept(*args, **options))
        return accepted[-1]

    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        monkeypatch.setattr(receiver_credentials, "accept_stream", noted)
        async with raw_source(rx.port) as silent:
            assert isinstance(await silent.ask(push.opened), m.Ready)
            # Only now: a slow machine may take its time until here.
            accepted[0]._idle_timeout_s = 0.05
            await silent.say(m.Ping())
            assert await silent.ended()
        monkeypatch.undo()
        async with raw_source(rx.port) as source:
            answer = await source.ask(change(push.opened, push_id="3" * 16))
            assert isinstance(answer, m.Ready)


async def test_a_client_that_says_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sessions, "HANDSHAKE_S", 0.05)
    async with (
        receiver_site(tmp_path / "rx") as rx,
        await trio.open_tcp_stream("127.0.0.1", rx.port) as silent,
    ):
        with trio.fail_after(HANG_S), suppress(trio.BrokenResourceError):
            while await silent.receive_some():
                pass
        await trio.testing.wait_all_tasks_blocked()
    assert "no session" in caplog.text


async def test_the_receiver_shows_that_it_lives_while_it_works(
    tmp_path: Path,
) -> None:
    async with receiver_site(tmp_path / "rx") as rx:
        assert rx.server.beat_s == 2.0
        rx.server.beat_s = 0.01
        async with raw_source(rx.port) as source:
            assert await source.hear_any() == m.Pong()
            assert await source.hear_any() == m.Pong()


async def test_a_source_that_is_not_heard_of_any_more_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with receiver_site(tmp_path / "rx") as rx:
        assert rx.server._timeout_s == 8
        rx.server._timeout_s = 0.05
        async with raw_source(rx.port) as source:
            assert await source.ended()
    assert "session ended (no VM yet): nothing, or too little, came" in caplog.text


async def test_what_landed_is_acknowledged_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ACK_S", 0.01)
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        push = cycle(rx)
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, push.stream[:-1])
        ack = await source.hear_ack()
        assert 0 < ack.position < len(push.stream)
        assert await rx.log.journal_get(f"push/{VM}") == {
            "push_id": push.opened.push_id,
            "point": 2,
            "durable": [ack.position],
        }


async def test_going_back_is_written_down_before_other_bytes_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that can only go on further back: nobody may trust the old watermark after a crash."""
    monkeypatch.setattr(sessions, "ACK_S", 0.01)
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        push = cycle(rx)
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, push.stream[:-1])
        ack = await source.hear_ack()
        answer = await source.ask(with_disk(push, have=ack.position - 1))
        assert isinstance(answer, m.Ready)
        assert answer.positions[0] < ack.position
        entry = await rx.log.journal_get(f"push/{VM}")
        assert entry["durable"] == list(answer.positions)


async def land_in_part(rx: ReceiverSite, push: RawPush) -> int:
    """Half of a push's stream lands and nothing of it is made durable; the position told of it."""
    async with raw_source(rx.port) as source:
        assert isinstance(await source.ask(push.opened), m.Ready)
        await source.data(0, 0, push.stream[: len(push.stream) // 2])
        while not isinstance(answer := await source.hear_any(), m.Landed):
            assert isinstance(answer, m.Pong)
        entry = await rx.log.journal_get(f"push/{VM}")
        assert entry["durable"] == [0]
        return answer.position


async def test_data_lands_whatever_comes_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that has no more room says nothing but that it lives, and waits for what it sent to land."""
    monkeypatch.setattr(sessions, "ACK_S", float("inf"))
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        push = cycle(rx)
        assert isinstance(await source.ask(push.opened), m.Ready)
        data = sessions._PushSession._data

        async def with_more_behind(self: Any, message: m.Data, *, last: bool) -> None:
            del last
            await data(self, message, last=False)

        monkeypatch.setattr(sessions._PushSession, "_data", with_more_behind)
        await source.data(0, 0, push.stream)
        await source.say(m.Ping())
        landed = 0
        while landed < len(push.stream):
            answer = await source.hear_any()
            assert isinstance(answer, m.Landed | m.Pong)
            if isinstance(answer, m.Landed):
                landed = answer.position


async def test_what_landed_and_was_not_made_durable_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ACK_S", float("inf"))
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        landed = await land_in_part(rx, push)
        assert landed > CHUNK
        async with raw_source(rx.port) as source:
            answer = await source.ask(push.opened)
            assert isinstance(answer, m.Ready)
            assert answer.positions == (landed,)
            # What is told to the source now is durable.
            entry = await rx.log.journal_get(f"push/{VM}")
            assert entry["durable"] == [landed]
            await source.data(0, landed, push.stream[landed:])
            assert isinstance(await source.ask(push.finish), m.Committed)
        assert await rx.read(None) == OTHER


async def test_what_landed_and_was_torn_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves anything of what was not durable: only what proves to be right is taken up."""
    monkeypatch.setattr(sessions, "ACK_S", float("inf"))
    async with seeded(tmp_path / "rx") as rx:
        push = cycle(rx)
        landed = await land_in_part(rx, push)
        (partial,) = rx.config.state_dir.rglob("*.partial/*.phcbt")
        content = bytearray(partial.read_bytes())
        content[landed - 10] ^= 1  # in the payload of the last whole record
        partial.write_bytes(content)
        async with raw_source(rx.port) as source:
            answer = await source.ask(push.opened)
            assert isinstance(answer, m.Ready)
            (at,) = answer.positions
            assert 0 < at <= landed - CHUNK
            await source.data(0, at, push.stream[at:])
            assert isinstance(await source.ask(push.finish), m.Committed)
        assert await rx.read(None) == OTHER


async def test_a_landing_that_cannot_be_made_durable_is_refused_while_more_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ACK_S", 0.0)
    async with seeded(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        push = cycle(rx)
        assert isinstance(await source.ask(push.opened), m.Ready)

        async def full(_: object) -> list[int]:
            await trio.lowlevel.checkpoint()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(rx.store, "sync", full)
        await source.data(0, 0, push.stream[:1000])
        answer = await source.hear()
        assert isinstance(answer, m.Refused)
        assert answer.code == "no-room"


async def test_a_client_that_is_gone_before_it_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with receiver_site(tmp_path / "rx") as rx:

        class Gone:
            def getpeername(self) -> Any:
                raise OSError(107, "Transport endpoint is not connected")

        class Transport:
            socket = Gone()

        await rx.server.serve(Transport())  # type: ignore[arg-type]
    assert "gone before" in caplog.text
