# SPDX-License-Identifier: AGPL-3.0-or-later
"""A receiver that holds the key, and lies: one clear error at the source, nothing called complete, nothing lost by it."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
import pytest
import trio

from replicator.cli.failures import explain
from replicator.credentials import SourceCredentials
from replicator.domain.model import Point, PushKind
from replicator.errors import AuthenticationError, PeerRefusedError, ReplicatorError, WireError
from replicator.push import connection, journal
from replicator.push.connection import ConnectionLostError
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.push.pusher import Outcome, Pusher
from replicator.sources import snapshot_names
from replicator.wire import messages as m
from replicator.wire.handshake import Alert, alert_message
from tests.hostile.fake_receiver import FakeSession, GoneError, Script, fake_receiver, raw_server
from tests.limits import HANG_S
from tests.sites import GRAIN, SourceSite, receiver_site, source_site

SIZE: Final = 6 * GRAIN + 100
CONTENT: Final = random.Random(8).randbytes(SIZE)
ROOT: Final = b"\7" * 32
PUSH: Final = "1" * 16
EMPTY: Final = m.VmState(None, 1, None)
MIB: Final = 1 << 20


async def push_to(
    sx: SourceSite, port: int, want: Want = Want.RUN, patience_s: float = 0
) -> Outcome:
    """One push of the source to a port, as a process of its own would make it."""
    config = msgspec.structs.replace(sx.config, dr_port=port)
    link = Link(config, SourceCredentials(config))
    pusher = Pusher(config, sx.log, sx.source, link, patience_s=patience_s)
    with trio.fail_after(HANG_S):
        return await pusher.push(want)


async def state_of_source(sx: SourceSite) -> tuple[list[str], bool, int]:
    """Events of the VM, whether a push is unfinished, and how many snapshots there are."""
    (vm,) = sx.log.vms
    events = [type(event).__name__ for event in await sx.log.history(UUID(vm.vm))]
    entry = await journal.load(sx.log, vm.vm)
    files = await trio.to_thread.run_sync(snapshot_names.our_files, sx.config.work_path)
    return events, entry is not None, len({snapshot_names.push_of_file(name) for name in files})


@asynccontextmanager
async def a_source(tmp_path: Path, content: bytes = CONTENT) -> AsyncIterator[SourceSite]:
    disk = tmp_path / "a.raw"
    await trio.Path(disk).write_bytes(content)
    async with source_site(tmp_path / "sx", 1, {"disk-0": disk}, dr_timeout="600") as sx:
        yield sx


async def truth_goes_on(tmp_path: Path, sx: SourceSite) -> None:
    """With a receiver that does not lie the same source makes its point, and it holds what the disk holds."""
    async with receiver_site(tmp_path / "rx", dr_timeout="600") as rx:
        outcome = await push_to(sx, rx.port)
        assert await rx.read(outcome.point.number) == sx.content("disk-0")
    _, unfinished, snapshots = await state_of_source(sx)
    assert not unfinished
    assert snapshots <= 1  # the reference of the next cycle


@dataclass(frozen=True)
class Lie:
    """What the receiver does, the error that the source ends with, and whether a push is unfinished then (None: perhaps)."""

    script: Script
    error: type[ReplicatorError]
    text: str
    unfinished: bool | None


# Each lie begins where the one before ended well.


async def asked(session: FakeSession) -> m.Query:
    return await session.hear(m.Query)


async def opened(session: FakeSession) -> m.Open:
    await asked(session)
    await session.say(EMPTY)
    return await session.hear(m.Open)


async def pushed(session: FakeSession) -> tuple[m.Open, m.Finish]:
    said = await opened(session)
    await session.say(m.Ready(said.push_id, (0,)))
    return said, await session.hear(m.Finish)


def at_query(*answers: m.Message) -> Script:
    async def script(session: FakeSession) -> None:
        await asked(session)
        await session.say(*answers)
        await session.gone()

    return script


def at_open(answer: Callable[[m.Open], list[m.Message]]) -> Script:
    async def script(session: FakeSession) -> None:
        await session.say(*answer(await opened(session)))
        await session.gone()

    return script


def in_push(*answers: m.Message) -> Script:
    """Right after Ready, whatever of the data has come."""

    async def script(session: FakeSession) -> None:
        said = await opened(session)
        await session.say(m.Ready(said.push_id, (0,)), *answers)
        await session.gone()

    return script


def at_finish(answer: Callable[[m.Open, m.Finish], list[m.Message]]) -> Script:
    async def script(session: FakeSession) -> None:
        await session.say(*answer(*await pushed(session)))
        await session.gone()

    return script


def committed(said: m.Open, finish: m.Finish, **lie: Any) -> m.Committed:
    right = m.Committed(said.push_id, said.point, finish.root, 1, 1 << 20)
    return msgspec.structs.replace(right, **lie)


def sends(kind: int, body: bytes) -> Script:
    async def script(session: FakeSession) -> None:
        await asked(session)
        await session.send(kind, body)
        await session.gone()

    return script


def _unsettled() -> Script:
    first, push_id = True, ""

    async def script(session: FakeSession) -> None:
        nonlocal first, push_id
        if first:
            first = False
            said, _ = await pushed(session)
            push_id = said.push_id
            return
        while True:
            await asked(session)
            await session.say(m.VmState(m.PointRef(9, ROOT, PUSH), 1, None))
            await session.hear(m.Abandon)
            await session.say(m.VmState(m.PointRef(1, ROOT, push_id), 1, None))

    return script


def _never_where_we_can() -> Script:
    """A push that was begun, and then each time a place inside a record, before the one that the source can go on from."""
    first = True

    async def script(session: FakeSession) -> None:
        nonlocal first
        if first:
            first = False
            await pushed(session)
            return
        await asked(session)
        await session.say(EMPTY)
        while True:
            said = await session.hear(m.Open)
            await session.say(m.Ready(said.push_id, (said.disks[0].have - 1,)))

    return script


LIES: Final[dict[str, Lie]] = {
    "nothing but an end": Lie(asked, ConnectionLostError, "the receiver ended the session", False),  # type: ignore[arg-type]
    "an answer to something else": Lie(at_query(m.Ready(PUSH, (0,))), WireError, "broke the protocol: Ready is not", False),
    "two answers": Lie(at_query(EMPTY, EMPTY), WireError, "VmState is not allowed", None),
    "a source's message": Lie(at_query(m.Query(PUSH, "x")), WireError, "bad message from the receiver", False),
    "data": Lie(sends(m.DATA, m.data_head(0, 0) + b"x"), WireError, "it sent data", False),
    "an unknown kind": Lie(sends(9, b"x"), WireError, "a message of kind 9", False),
    "a huge message": Lie(sends(m.CONTROL, bytes(300 << 10)), WireError, "307200 bytes", False),
    "no message": Lie(sends(m.CONTROL, b"\xc1"), WireError, "bad message from the receiver", False),
    "a refusal that is a novel": Lie(at_query(m.Refused("busy", "x" * 2001, None, 1)), WireError, "bad message", False),
    "a refusal of nothing": Lie(at_query(EMPTY, m.Refused("busy", "no", None, 1)), WireError, "Refused is not allowed", None),
    "another number of disks": Lie(at_open(lambda o: [m.Ready(o.push_id, (0, 0))]), WireError, "another number of disks", True),
    "no disk": Lie(at_open(lambda o: [m.Ready(o.push_id, ())]), WireError, "another number of disks", True),
    "on from beyond the end": Lie(at_open(lambda o: [m.Ready(o.push_id, (1 << 40,))]), WireError, "go on behind what was", True),
    "on with another push": Lie(at_open(lambda _: [m.Ready(PUSH, (0,))]), WireError, "another push", True),
    "committed before it was sent": Lie(
        at_open(lambda o: [m.Committed(o.push_id, o.point, ROOT, 1, 1)]), WireError, "committed", True
    ),
    "acknowledged what was never sent": Lie(in_push(m.Ack(0, 1 << 40)), WireError, "acknowledged 1099511627776 of disk 0", True),
    "acknowledged another disk": Lie(in_push(m.Ack(7, 0)), WireError, "acknowledged 0 of disk 7", True),
    "landed what was never sent": Lie(in_push(m.Landed(0, 1 << 40)), WireError, "landed 1099511627776 of disk 0", True),
    "landed another disk": Lie(in_push(m.Landed(200, 0)), WireError, "landed 0 of disk 200", True),
    "committed in the middle": Lie(in_push(m.Committed(PUSH, 1, ROOT, 1, 1)), WireError, "Committed is not allowed while", True),
    "ready again": Lie(in_push(m.Ready(PUSH, (0,))), WireError, "Ready is not allowed while", True),
    "another point": Lie(at_finish(lambda o, f: [committed(o, f, point=7)]), WireError, "committed something else", True),
    "another content": Lie(at_finish(lambda o, f: [committed(o, f, root=ROOT)]), WireError, "committed something else", True),
    "another push": Lie(at_finish(lambda o, f: [committed(o, f, push_id=PUSH)]), WireError, "committed something else", True),
    "a state instead of a commit": Lie(at_finish(lambda *_: [EMPTY]), WireError, "VmState is not allowed while finishing", True),
    "acknowledged backwards": Lie(
        at_finish(lambda *_: [m.Ack(0, 200), m.Ack(0, 100)]), WireError, "acknowledged 100 of disk 0", True
    ),
    "landed backwards": Lie(
        at_finish(lambda *_: [m.Landed(0, 200), m.Landed(0, 100)]), WireError, "landed 100 of disk 0", True
    ),
    "an end instead of a commit": Lie(pushed, ConnectionLostError, "the receiver ended the session", True),  # type: ignore[arg-type]
    "an end instead of Ready": Lie(opened, ConnectionLostError, "the receiver ended the session", True),  # type: ignore[arg-type]
    "refused for now": Lie(
        at_finish(lambda *_: [m.Refused("no-room", "full", None, 1)]), PeerRefusedError, "full", True
    ),
    "refused for ever": Lie(
        at_finish(lambda *_: [m.Refused("damaged-stream", "bad", None, 1)]), PeerRefusedError, "bad", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_about_a_seed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lie = LIES[name]
    async with a_source(tmp_path) as sx:
        async with fake_receiver(lie.script) as fake:
            with pytest.raises(lie.error, match=lie.text) as caught:
                await push_to(sx, fake.port)
        assert explain(caught.value).exit_code == (3 if lie.error is PeerRefusedError else 1)
        # Who it was stands in each.
        assert lie.error is PeerRefusedError or "receiver" in str(caught.value)
        events, unfinished, snapshots = await state_of_source(sx)
        assert not [event for event in events if event.endswith("Committed")]
        assert lie.unfinished in (unfinished, None)
        assert snapshots == unfinished
        assert "complete" not in caplog.text
        await truth_goes_on(tmp_path, sx)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (_unsettled, "the receiver's state does not settle"),
        (_never_where_we_can, "the receiver cannot go on where this side can"),
    ],
    ids=["states", "positions"],
)
async def test_a_receiver_that_never_comes_to_a_state(
    tmp_path: Path, script: Callable[[], Script], text: str
) -> None:
    async with a_source(tmp_path, content=CONTENT * 14) as sx:
        async with fake_receiver(script()) as fake:
            with pytest.raises(ConnectionLostError):
                await push_to(sx, fake.port)
            with pytest.raises(WireError, match=text):
                await push_to(sx, fake.port)
        events, unfinished, _ = await state_of_source(sx)
        assert not [event for event in events if event.endswith("Committed")]
        assert unfinished
        await truth_goes_on(tmp_path, sx)


async def test_a_receiver_that_claims_a_failover_fences_and_destroys_nothing(
    tmp_path: Path,
) -> None:
    async with a_source(tmp_path) as sx:
        async with fake_receiver(at_query(m.VmState(None, 1 << 31, None))) as fake:
            with pytest.raises(ReplicatorError, match="this source is fenced") as caught:
                await push_to(sx, fake.port)
        assert explain(caught.value).exit_code == 3
        assert await state_of_source(sx) == (["Registered"], False, 0)
        await truth_goes_on(tmp_path, sx)


async def test_a_receiver_that_claims_a_push_of_another_time(tmp_path: Path) -> None:
    """After a real point: the receiver says that it has a newer one, made by nobody here."""
    async with a_source(tmp_path) as sx:
        async with receiver_site(tmp_path / "rx", dr_timeout="600") as rx:
            await push_to(sx, rx.port)
        before = await state_of_source(sx)
        newest = m.PointRef(1 << 48, ROOT, PUSH)
        async with fake_receiver(at_query(m.VmState(newest, 1, None))) as fake:
            with pytest.raises(ReplicatorError, match="which this side never pushed") as caught:
                await push_to(sx, fake.port)
        assert explain(caught.value).exit_code == 3
        assert await state_of_source(sx) == before


# Floods


def _pongs_until_gone(where: str) -> Script:
    async def script(session: FakeSession) -> None:
        if where == "finish":
            await pushed(session)
        else:
            await asked(session)
        for _ in range(5_000):
            await session.say(m.Pong())

    return script


@pytest.mark.parametrize("where", ["query", "finish"])
async def test_a_flood_of_signs_of_life(tmp_path: Path, where: str) -> None:
    """They are taken and forgotten; when the receiver ends without an answer, that is what is said."""
    async with a_source(tmp_path) as sx, fake_receiver(_pongs_until_gone(where)) as fake:
        tracemalloc.start()
        try:
            with pytest.raises(
                ConnectionLostError, match=r"the receiver ended the session|the line broke"
            ):
                await push_to(sx, fake.port)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 24 * MIB


async def test_a_flood_of_acknowledgements_of_nothing_new(tmp_path: Path) -> None:
    async def script(session: FakeSession) -> None:
        await pushed(session)
        for _ in range(5_000):
            await session.say(m.Ack(0, 0), m.Landed(0, 0))

    async with a_source(tmp_path) as sx, fake_receiver(script) as fake:
        with pytest.raises(ConnectionLostError, match="the receiver ended the session"):
            await push_to(sx, fake.port)


@pytest.mark.parametrize("where", ["query", "finish", "data"])
async def test_a_receiver_that_lives_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Signs of life are no answer: after a long time, which is a short one here, it is taken for a broken line."""
    monkeypatch.setattr(connection, "STUCK_S", 0.2)
    monkeypatch.setattr(connection, "STUCK_LANDING_S", 0.2)
    content = CONTENT if where != "data" else random.Random(9).randbytes(12 * MIB)

    async def script(session: FakeSession) -> None:
        if where == "finish":
            await pushed(session)
        elif where == "data":
            await session.say(m.Ready((await opened(session)).push_id, (0,)))
        else:
            await asked(session)

        async def live() -> None:
            with suppress(GoneError):
                while True:
                    await session.say(m.Pong())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            await session.gone()
            nursery.cancel_scope.cancel()

    async with a_source(tmp_path, content) as sx:
        async with fake_receiver(script) as fake:
            with pytest.raises(ConnectionLostError, match=r"nothing for 0\.2 s, although it lives"):
                await push_to(sx, fake.port)
        monkeypatch.undo()
        await truth_goes_on(tmp_path, sx)


async def test_a_silent_receiver_is_left(tmp_path: Path) -> None:
    """It proves the key, and says nothing more: the line counts as broken after dr_timeout, which status shows."""

    async def script(session: FakeSession) -> None:
        await session.gone()

    async with a_source(tmp_path) as sx, fake_receiver(script) as fake:
        config = msgspec.structs.replace(sx.config, dr_timeout=1)
        sx.config = config
        with pytest.raises(ConnectionLostError, match="nothing, or too little, came"):
            await push_to(sx, fake.port)


# Before the key is proved


async def _junk(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(2000))


async def _alert(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(alert_message(Alert.AUTHENTICATION))


async def _unknown_alert(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"RPLW\x04\x00\x00\x01\xff")


async def _huge(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await stream.send_all(b"RPLW\x02\x00\xff\xff")


async def _wrong_proof(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    body = b"\0\1\0\2" + bytes(32) + b"\x09" + bytes(31) + bytes(32)
    await stream.send_all(b"RPLW\x02\x00" + len(body).to_bytes(2) + body)


async def _end(stream: trio.SocketStream) -> None:
    await stream.receive_some()


HANDSHAKES: Final[dict[str, tuple[Callable[[trio.SocketStream], Awaitable[None]], type[ReplicatorError], str]]] = {
    "another protocol": (_junk, WireError, "does not speak this protocol"),
    "an alert": (_alert, AuthenticationError, "token mismatch.*not proven"),
    "an unknown alert": (_unknown_alert, WireError, "alert 255 .not proven"),
    "a huge hello": (_huge, WireError, "of 65535 bytes"),
    "a proof without the key": (_wrong_proof, AuthenticationError, "token mismatch"),
    "an end": (_end, ConnectionLostError, "the line broke while authenticating"),
}  # fmt: skip


@pytest.mark.parametrize("name", HANDSHAKES)
async def test_a_receiver_without_the_key(tmp_path: Path, name: str) -> None:
    script, error, text = HANDSHAKES[name]
    async with a_source(tmp_path) as sx:
        async with raw_server(script) as port:
            with pytest.raises(error, match=text) as caught:
                await push_to(sx, port)
        assert explain(caught.value).exit_code == 1
        assert await state_of_source(sx) == (["Registered"], False, 0)
        await truth_goes_on(tmp_path, sx)


# Digests of the receiver's point, when the source has lost its own


def description(point: Point) -> m.Described:
    """What a true receiver would say of a point."""
    disks = tuple(
        m.DiskMap(d.disk, d.identity, d.size, d.root, d.since, GRAIN, 1) for d in point.disks
    )
    fields = {name: getattr(point, name) for name in m.Described.__struct_fields__}
    return m.Described(**(fields | {"disks": disks}))


Pages = Callable[[m.AskPages], list[m.Message]]


def describes(point: Point, lie: Callable[[m.Described], m.Described], pages: Pages) -> Script:
    """Answers as a true receiver would, but for the description and the pages."""
    assert point.push_id

    async def script(session: FakeSession) -> None:
        await asked(session)
        await session.say(m.VmState(m.PointRef(point.number, point.root, point.push_id), 1, None))
        await session.hear(m.Describe)
        await session.say(lie(description(point)))
        while True:
            await session.say(*pages(await session.hear(m.AskPages)))

    return script


def _disk(described: m.Described, **fields: Any) -> m.Described:
    (disk,) = described.disks
    return msgspec.structs.replace(described, disks=(msgspec.structs.replace(disk, **fields),))


def _as_it_is(described: m.Described) -> m.Described:
    return described


def _no_pages(_: m.AskPages) -> list[m.Message]:
    return [m.PagesEnd()]


DESCRIPTIONS: Final[dict[str, tuple[Callable[[m.Described], m.Described], str]]] = {
    "another number": (lambda d: msgspec.structs.replace(d, number=9), "another point than its newest"),
    "another root": (lambda d: msgspec.structs.replace(d, root=ROOT), "another point than its newest"),
    "another root of a disk": (lambda d: _disk(d, root=ROOT), "another point than its newest"),
    "another size": (lambda d: _disk(d, size=1 << 50), "another point than its newest"),
    "no such grain": (lambda d: _disk(d, grain=5000), "as it cannot be"),
    "a chain of the future": (lambda d: _disk(d, since=7), "as it cannot be"),
    "a disk twice": (lambda d: msgspec.structs.replace(d, disks=d.disks * 2), "cannot be|another point"),
}  # fmt: skip
PAGES: Final[dict[str, tuple[Pages, str]]] = {
    "no page": (_no_pages, "other pages of a map than those asked for"),
    "pages without an end": (lambda _: [m.Pages((b"",) * 24)] * 400, "other pages of a map than those asked for"),
    "a page that is too long": (lambda a: [m.Pages((bytes(8192),) * len(a.indexes)), m.PagesEnd()], "other pages|not fit its root"),
    "another page": (lambda a: [m.Pages((b"x" * 100,) * len(a.indexes)), m.PagesEnd()], "does not fit its root"),
    "zeros": (lambda a: [m.Pages((b"",) * len(a.indexes)), m.PagesEnd()], "does not fit its root"),
    "a state": (lambda _: [EMPTY], "VmState is not allowed while paging"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DESCRIPTIONS, *PAGES])
async def test_a_lie_in_a_resync(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    lie, text = DESCRIPTIONS.get(name, (_as_it_is, ""))
    pages, text = PAGES.get(name, (_no_pages, text))
    async with a_source(tmp_path) as sx:
        async with receiver_site(tmp_path / "rx", dr_timeout="600") as rx:
            await push_to(sx, rx.port)
        point = sx.log.vms[0].newest
        assert point is not None
        maps = await trio.to_thread.run_sync(lambda: [*sx.config.state_dir.rglob("*.map")])
        assert maps
        for path in maps:
            await trio.Path(path).unlink()
        await trio.to_thread.run_sync(sx.write, "disk-0", 2 * GRAIN, b"changed")
        events, _, _ = await state_of_source(sx)
        caplog.clear()
        async with fake_receiver(describes(point, lie, pages)) as fake:
            with pytest.raises(WireError, match=text) as caught:
                await push_to(sx, fake.port)
        assert "receiver" in str(caught.value)
        assert "complete" not in caplog.text
        after, unfinished, snapshots = await state_of_source(sx)
        assert after[: len(events)] == events
        assert not [event for event in after[len(events) :] if event.endswith("Committed")]
        assert snapshots == unfinished
        assert sx.log.vms[0].newest == point
        await truth_goes_on(tmp_path, sx)


# The heads of the logs, after a commit that is true


HEADS: Final[dict[str, list[m.Message]]] = {
    "no key": [m.ReceiverHead("x", "y", (), 0)],
    "a key that is none": [m.ReceiverHead("log+00000000+AAAA", "log\n1\nAAAA\n\n", (), 1 << 48)],
    "a long proof": [m.ReceiverHead("x" * 400, "y" * 4096, (ROOT,) * 128, 0)],
    "something else": [m.Ready(PUSH, (0,))],
    "a refusal": [m.Refused("log-broken", "no", None, 1)],
    "nothing": [],
}


@pytest.mark.parametrize("name", HEADS)
async def test_a_lie_about_heads_changes_no_point(tmp_path: Path, name: str) -> None:
    """The push is committed, as far as the source can know; the lie is said, and is no reason to send it again."""

    async def script(session: FakeSession) -> None:
        said, finish = await pushed(session)
        await session.say(committed(said, finish))
        await session.hear(m.Compare)
        await session.say(*HEADS[name])

    async with a_source(tmp_path) as sx, fake_receiver(script) as fake:
        outcome = await push_to(sx, fake.port)
        assert outcome.point.number == 1
        assert outcome.point.kind is PushKind.SEED
        events, unfinished, _ = await state_of_source(sx)
        assert events.count("SeedCommitted") == 1
        assert not unfinished
