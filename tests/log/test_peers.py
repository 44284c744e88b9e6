# SPDX-License-Identifier: AGPL-3.0-or-later
"""Source and receiver show each other the heads of their logs: neither can take back what the other has seen."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
import trio
from eventsourcing.persistence import InternalError

from eventstore.checkpoint import (
    Checkpoint,
    CheckpointKey,
    VerifierKey,
    cosign,
    open_checkpoint,
    sign,
)
from eventstore.merkle import EMPTY_ROOT
from receiver.service import sessions
from replicator.credentials import SourceCredentials
from replicator.domain.views import warnings
from replicator.domain.vm import ProtectedVm
from replicator.errors import DamageError, RefusedError
from replicator.log import EventLog, actions, open_log, proofs
from replicator.log.heads import SignedHead
from replicator.log.peers import Peer, PeerBrokenError, seen_size, take_head, take_signed
from replicator.push.compare import compare_heads
from replicator.push.connection import ConnectionLostError
from replicator.push.link import Link
from replicator.wire import messages as m
from replicator.wire.keys import Keyring, PreSharedKey
from tests.log.support import copy_log
from tests.push.lab import RawSource, raw_source
from tests.push.proxy import Cut, Line, proxied
from tests.sites import TOKEN, ReceiverSite, SourceSite, receiver_site, source_site

PUSH = PreSharedKey.from_hex(TOKEN)


@dataclass
class Pair:
    """Both sides, and the line between them."""

    rx: ReceiverSite
    sx: SourceSite
    line: Line

    @property
    def vm(self) -> UUID:
        return self.sx.uuid

    async def compare(self) -> None:
        """Only the exchange, as after a commit."""
        async with Link(self.sx.config, SourceCredentials(self.sx.config)).connect() as connection:
            await compare_heads(connection, self.sx.log, self.vm, "web")

    async def peers(self) -> tuple[Peer, Peer]:
        """What the source keeps, and what the receiver."""
        at_source, at_receiver = await self.sx.log.peer(self.vm), await self.rx.log.peer(self.vm)
        assert at_source is not None
        assert at_receiver is not None
        return at_source, at_receiver

    def broken(self) -> tuple[str | None, str | None]:
        """What the source says of the receiver's log, and the receiver of the source's."""
        at_source, at_receiver = self.sx.log.get(self.vm), self.rx.log.get(self.vm)
        assert at_source is not None
        assert at_receiver is not None
        return at_source.peer_broken, at_receiver.peer_broken


@asynccontextmanager
async def pair(folder: Path, keys: Keyring | None = None) -> AsyncIterator[Pair]:
    """Source and receiver with their state below ``folder``, as it was left."""
    disk = folder / "disk.raw"
    if not await trio.Path(disk).exists():
        await trio.Path(disk).write_bytes(random.Random(1).randbytes(200_000))
    async with (
        receiver_site(folder / "rx", keys=keys) as rx,
        proxied(rx.port) as line,
        source_site(folder / "sx", line.port, {"disk-0": disk}) as sx,
    ):
        yield Pair(rx, sx, line)


async def push(both: Pair) -> int:
    """One more point."""
    both.sx.write("disk-0", 7, random.Random(both.sx.log.store.head()).randbytes(9))
    outcome = await both.sx.push()
    await both.rx.settled()
    return outcome.point.number


async def note(log: EventLog, vm: UUID, number: int) -> None:
    """An event that changes no file."""
    async with log.change(vm) as changing:
        changing.point_verified(max(changing.points), number)


def kinds(log: EventLog) -> list[str]:
    return [
        type(log.store.event(stored)).__name__.removeprefix("PeerLog")
        for stored in log.store.notifications(1)
        if "peer-log" in stored.topic
    ]


# As it should be


async def test_heads_are_exchanged_at_every_commit(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        sizes: list[tuple[int, int]] = []
        for _ in range(3):
            await push(both)
            at_source, at_receiver = await both.peers()
            keys = [VerifierKey.parse(peer.key) for peer in (at_source, at_receiver)]
            assert keys == [both.rx.log.key.verifier, both.sx.log.key.verifier]
            for peer in (at_source, at_receiver):
                for text in (peer.seen, peer.ours):
                    assert text is not None
                    open_checkpoint(text, keys)
            # What the one has seen, the other has signed.
            assert open_checkpoint(at_source.seen, keys) == open_checkpoint(
                at_receiver.ours or "", keys
            )
            assert open_checkpoint(at_receiver.seen, keys) == open_checkpoint(
                at_source.ours or "", keys
            )
            sizes.append((seen_size(at_source), seen_size(at_receiver)))
        assert sizes == sorted(set(sizes))
        for log in (both.sx.log, both.rx.log):
            assert proofs.verify(log.store).signed_heads == 1
        assert both.broken() == (None, None)
        # Seen once more, with nothing new in between, and over closed books.
        await both.compare()
        before = await both.peers()
        await both.compare()
        assert [p.seen for p in before] == [p.seen for p in await both.peers()]
        for log in (both.sx.log, both.rx.log):
            await log.close_period()
            await log.seal()
        await both.compare()
        shutil.rmtree(tmp_path / "rx" / "events" / "segments")
        await push(both)
        assert both.broken() == (None, None)
    async with pair(tmp_path) as both:
        await push(both)
        assert both.broken() == (None, None)


async def test_two_vms_of_one_source_host_are_kept_apart(tmp_path: Path) -> None:
    """What one's source shows says nothing of the other's."""
    async with pair(tmp_path) as both:
        await push(both)
        disk = tmp_path / "other.raw"
        await trio.Path(disk).write_bytes(bytes(70_000))
        async with source_site(
            tmp_path / "other", both.rx.port, {"disk-0": disk}, name="db"
        ) as other:
            await other.push()
            found = await both.rx.log.peer(other.uuid)
            assert found is not None
            assert found.key == str(other.log.key.verifier)
        await both.sx.push()
        assert both.broken() == (None, None)


# One side's history is another


Change = Callable[[Path], Awaitable[None]]


async def older_copy(folder: Path) -> None:
    """The log as it was before the last thing that happened."""
    await trio.to_thread.run_sync(copy_log, folder.with_name("copy"), folder)


async def other_history(folder: Path) -> None:
    """The older log, in which something else has happened since."""
    await older_copy(folder)
    async with open_log(folder) as log:
        (vm,) = log.vms
        for number in (91, 92, 93):
            await note(log, UUID(vm.vm), number)


async def new_key(folder: Path) -> None:
    """Another key for the same log."""
    await trio.Path(folder / "log.key").unlink()


CHANGES = [
    (older_copy, "was rolled back to an older state"),
    (other_history, "its history was changed"),
    (new_key, "it began anew"),
]


async def set_up(folder: Path, side: str) -> None:
    """A pair that has seen each other; a copy of one side's log is older than what was seen of it."""
    events = folder / side / "events"
    async with pair(folder) as both:
        await push(both)
        await push(both)
    await trio.to_thread.run_sync(copy_log, events, events.with_name("copy"))
    async with pair(folder) as both:
        await note(both.rx.log if side == "rx" else both.sx.log, both.vm, 1)
        await both.compare()
        assert both.broken() == (None, None)


@pytest.mark.parametrize(("change", "said"), CHANGES)
async def test_the_receivers_history_is_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Change, said: str
) -> None:
    await set_up(tmp_path, "rx")
    await change(tmp_path / "rx" / "events")
    caplog.clear()
    async with pair(tmp_path) as both:
        before = await both.sx.log.peer(both.vm)
        await both.compare()
        (at_source, at_receiver) = both.broken()
        assert said in (at_source or "")
        assert at_receiver is None
        # Once, and pushes go on; what was seen before stays what is believed.
        first = await push(both)
        assert await push(both) == first + 1
        assert kinds(both.sx.log) == ["Broken"]
        errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert errors == [f"web: {at_source}"]
        assert await both.sx.log.peer(both.vm) == before
        (vm,) = both.sx.log.vms
        assert f"{at_source}; if that was you, run replctl log accept web" in warnings(vm)
        # It is shown what it signed: the receiver's side goes on.
        seen = await both.rx.log.peer(both.vm)
        assert seen is not None
        assert seen_size(seen) > 0
    async with pair(tmp_path) as both:
        await actions.accept(both.sx.log, "web")
        assert both.broken() == (None, None)
        with pytest.raises(RefusedError, match="nothing is wrong"):
            await actions.accept(both.sx.log, "web")
        await push(both)
        assert both.broken() == (None, None)
        assert kinds(both.sx.log) == ["Broken", "Accepted"]
        peer, _ = await both.peers()
        assert peer.key == str(both.rx.log.key.verifier)
        assert peer.ours is not None
        assert warnings(both.sx.log.vms[0]) == []
    # And again, if it happens again.
    await change(tmp_path / "rx" / "events")
    if change is not older_copy:  # it lacks points that the source has: another matter
        async with pair(tmp_path) as both:
            await both.compare()
            assert kinds(both.sx.log) == ["Broken", "Accepted", "Broken"]


@pytest.mark.parametrize(("change", "said"), CHANGES)
async def test_the_sources_history_is_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Change, said: str
) -> None:
    await set_up(tmp_path, "sx")
    await change(tmp_path / "sx" / "events")
    caplog.clear()
    async with pair(tmp_path) as both:
        before = await both.rx.log.peer(both.vm)
        began = both.rx.log.store.head()
        await both.compare()
        (at_source, at_receiver) = both.broken()
        assert at_source is None
        assert said in (at_receiver or "")
        errors = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
        assert errors[0] == f"web: {at_receiver}"
        assert errors[1].startswith("web: the receiver does not believe this side's log: ")
        assert said in errors[1]
        assert len(errors) == 2
        first = await push(both)
        assert await push(both) == first + 1
        assert kinds(both.rx.log) == ["Broken"]
        assert await both.rx.log.peer(both.vm) == before
        assert f"{at_receiver}; if that was you" in warnings(both.rx.log.vms[0])[0]
        # The source has seen the receiver's head all the same.
        peer = await both.sx.log.peer(both.vm)
        assert peer is not None
        assert seen_size(peer) > began
        await actions.accept(both.rx.log, "web")
        assert both.broken() == (None, None)
        await push(both)
        assert both.broken() == (None, None)
        assert kinds(both.rx.log) == ["Broken", "Accepted"]
        _, kept = await both.peers()
        assert kept.key == str(both.sx.log.key.verifier)


async def test_an_accept_that_is_cut_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept head goes first: then the warning stays until it is accepted once more."""
    await set_up(tmp_path, "rx")
    await older_copy(tmp_path / "rx" / "events")
    async with pair(tmp_path) as both:
        await both.compare()

        async def cut(*_: Any) -> None:
            await trio.lowlevel.checkpoint()
            raise OSError("cut")

        with monkeypatch.context() as patch:
            patch.setattr(EventLog, "_save", cut)
            with pytest.raises(OSError, match="cut"):
                await actions.accept(both.sx.log, "web")
        assert both.broken()[0] is not None
        await actions.accept(both.sx.log, "web")
        await both.compare()
        assert both.broken() == (None, None)


# A receiver that lies


async def lying_head(rx: ReceiverSite, lie: str, since: int) -> SignedHead:
    """The receiver's head, and one thing about it that is wrong."""
    log, key = rx.log, rx.log.key
    head = await EventLog.head(log, since)
    name = key.verifier.name
    root = log.store.root_at(head.size)
    lies: dict[str, Callable[[], SignedHead]] = {
        "no proof": lambda: replace(head, proof=()),
        "garbage": lambda: replace(head, proof=tuple(bytes([n]) * 32 for n in range(128))),
        "unsigned": lambda: replace(head, text=Checkpoint(name, head.size, root).text + "\n"),
        "no note": lambda: replace(head, text="x"),
        "another log's": lambda: replace(
            head, text=sign(Checkpoint("another", head.size, root), key)
        ),
        "larger": lambda: replace(head, text=sign(Checkpoint(name, head.size + 1, root), key)),
        "another root": lambda: replace(
            head, text=sign(Checkpoint(name, head.size, bytes(32)), key)
        ),
        "another key": lambda: replace(
            head,
            text=sign(Checkpoint(name, head.size, root), CheckpointKey.generate(name)),
        ),
        "empty": lambda: replace(head, text=sign(Checkpoint(name, 0, EMPTY_ROOT), key), proof=()),
    }
    return lies[lie]()


@pytest.mark.parametrize(
    "lie",
    [
        "no proof",
        "garbage",
        "unsigned",
        "no note",
        "another log's",
        "larger",
        "another root",
        "another key",
        "empty",
    ],
)
async def test_a_receiver_that_lies_of_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    async with pair(tmp_path) as both:
        await push(both)
        await note(both.rx.log, both.vm, 1)
        before = await both.sx.log.peer(both.vm)

        async def head(since: int) -> SignedHead:
            return await lying_head(both.rx, lie, since)

        with monkeypatch.context() as patch:
            patch.setattr(both.rx.log, "head", head)
            await both.compare()
            await both.compare()
        assert (both.broken()[0] or "").startswith("the other side's log cannot be believed: ")
        assert kinds(both.sx.log) == ["Broken"]
        assert await both.sx.log.peer(both.vm) == before


@pytest.mark.parametrize("lie", ["another head", "an older one", "not signed", "garbage"])
async def test_a_receiver_that_does_not_sign_what_it_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    async with pair(tmp_path) as both:
        await push(both)
        before, _ = await both.peers()
        await note(both.sx.log, both.vm, 1)
        own, theirs = both.sx.log.key, both.rx.log.key

        def signed(head: str) -> str:
            was = open_checkpoint(head, [own.verifier])
            if lie == "not signed":
                return sign(was, own)
            if lie == "an older one":
                assert before.ours is not None
                return before.ours
            if lie == "garbage":
                return "garbage"
            other = sign(Checkpoint(was.origin, was.size, bytes(32)), own)
            return cosign(other, [own.verifier], theirs)

        real = take_head

        def take(*args: Any) -> Peer:
            return msgspec.structs.replace(real(*args), seen=signed(args[2]))

        with monkeypatch.context() as patch:
            patch.setattr(sessions, "take_head", take)
            await both.compare()
        assert (both.broken()[0] or "").startswith("the other side did not sign our head: ")
        after = await both.sx.log.peer(both.vm)
        assert after is not None
        assert after.ours == before.ours


async def test_a_receiver_whose_log_fails_is_not_said_to_disbelieve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair(tmp_path) as both:
        await push(both)

        async def head(_since: int) -> SignedHead:
            await trio.lowlevel.checkpoint()
            raise InternalError("one of events 1..256")

        with monkeypatch.context() as patch:
            patch.setattr(both.rx.log, "head", head)
            caplog.clear()
            await push(both)
        said = [r.getMessage() for r in caplog.records if r.name == "replicator.push.compare"]
        assert len(said) == 1
        assert said[0].startswith("web: the heads of the logs were not compared: the receiver")
        assert both.broken() == (None, None)


async def test_what_is_kept_of_the_other_side_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pushes go on; it is said, and not taken for a reason to believe anything."""
    async with pair(tmp_path) as both:
        await push(both)
        kept, _ = await both.peers()
        bads = (
            b"\xc1",
            msgspec.msgpack.encode(["x", 1]),
            msgspec.msgpack.encode(Peer("no key", kept.seen)),
            msgspec.msgpack.encode(Peer(kept.key, "no head")),
        )
        for log in (both.sx.log, both.rx.log):
            good = log.store.peers.get(str(both.vm))
            assert good is not None
            for bad in bads:
                log.store.peers.put(str(both.vm), bad)
                caplog.clear()
                await push(both)
                assert any("not compared" in r.getMessage() for r in caplog.records)
                assert log.store.peers.get(str(both.vm)) == bad
                with pytest.raises(DamageError, match="what is kept of the other side's log"):
                    await log.peer(both.vm)
            log.store.peers.put(str(both.vm), good)
        await push(both)
        assert both.broken() == (None, None)


# A source that lies


@asynccontextmanager
async def speaking(both: Pair) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """A session that shows the receiver what it is told to, after a true question; gives the answer."""
    async with raw_source(both.rx.port) as source:

        async def show(key: str, head: str, proof: Any = (), signed: str | None = None) -> Any:
            shown = await source.ask(m.Compare(str(both.vm), "web", 0))
            assert isinstance(shown, m.ReceiverHead)
            return await source.ask(m.SourceHead(key, head, tuple(proof), signed))

        yield show


async def test_a_source_that_lies_of_its_head(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        await push(both)
        _, kept = await both.peers()
        key = both.sx.log.key
        text, name = str(key.verifier), key.verifier.name
        size = seen_size(kept)
        root = both.sx.log.store.root_at(size)
        other = CheckpointKey.generate("other")
        lies: list[tuple[Any, ...]] = [
            (text, sign(Checkpoint(name, 0, EMPTY_ROOT), key)),
            (text, sign(Checkpoint(name, size, bytes(32)), key)),
            (text, sign(Checkpoint(name, size + 1, bytes(32)), key), [bytes(32)] * 128),
            (text, sign(Checkpoint("other", size, root), key)),
            (text, sign(Checkpoint(name, size, root), CheckpointKey.generate(name))),
            (text, "x"),
            (str(other.verifier), sign(Checkpoint("other", size, root), other)),
            ("x", sign(Checkpoint(name, size, root), key)),
            (text, sign(Checkpoint(name, size, root), key), [], "x"),
            (text, sign(Checkpoint(name, size, root), key), [], kept.seen),
        ]
        async with speaking(both) as show:
            for lie in lies:
                answer = await show(*lie)
                assert isinstance(answer, m.Refused), lie
                assert answer.code == "log-broken"
                assert await both.rx.log.peer(both.vm) == kept
        assert kinds(both.rx.log) == ["Broken"]
        # The truth is believed still, for a log that was never changed.
        await note(both.sx.log, both.vm, 1)
        await both.compare()
        assert seen_size((await both.peers())[1]) > size


OTHER_TOKEN = "6b" * 32


async def test_heads_are_shown_for_ones_own_vm_only(tmp_path: Path) -> None:
    keys = Keyring([PUSH, PreSharedKey.from_hex(OTHER_TOKEN, name="other", vm="other")])
    async with pair(tmp_path, keys) as both:
        await push(both)
        before = await both.peers()
        async with raw_source(both.rx.port, OTHER_TOKEN) as source:
            answer = await source.ask(m.Compare(str(both.vm), "web", 0))
            assert isinstance(answer, m.Refused)
            assert (answer.code, answer.newest) == ("wrong-key", None)
        async with raw_source(both.rx.port) as source:
            answer = await source.ask(m.Compare(str(UUID(int=5)), "nobody", 0))
            assert isinstance(answer, m.Refused)
            assert (answer.code, answer.newest) == ("unknown-vm", None)
            # The session goes on, and a head without a question ends it.
            await honest(source, both, 1 << 40)
            await honest(source, both, 0)
            await source.say(m.SourceHead("x", "x", (), None))
            assert await source.ended()
        assert both.broken() == (None, None)
        assert (await both.peers())[0] == before[0]


async def honest(source: RawSource, both: Pair, seen: int) -> None:
    shown = await source.ask(m.Compare(str(both.vm), "web", seen))
    assert isinstance(shown, m.ReceiverHead)
    assert shown.proof == ()
    head = await both.sx.log.head(shown.seen)
    key = str(both.sx.log.key.verifier)
    answer = await source.ask(m.SourceHead(key, head.text, head.proof, None))
    assert isinstance(answer, m.Signed)


# A line that breaks


@pytest.mark.parametrize("way", ["to_receiver", "to_source"])
async def test_an_exchange_that_is_cut_anywhere_costs_nothing(tmp_path: Path, way: str) -> None:
    async with pair(tmp_path) as both:
        await push(both)
        both.line.passed.clear()
        await both.compare()
        total = both.line.passed[0][way == "to_source"]
        cuts = sorted({*range(1, total, 61), total - 1})
        for number, at in enumerate(cuts):
            log = (both.sx.log, both.rx.log)[number % 2]
            await note(log, both.vm, number)
            both.line.cuts = [Cut(to_receiver=at) if way == "to_receiver" else Cut(to_source=at)]
            try:
                await both.compare()
            except ConnectionLostError as error:
                assert "while authenticating" in str(error)  # noqa: PT017 -- not every cut does
            assert both.broken() == (None, None)
        await both.compare()
        at_source, at_receiver = await both.peers()
        assert seen_size(at_source) == both.rx.log.store.head()
        assert seen_size(at_receiver) == both.sx.log.store.head()
        for log in (both.sx.log, both.rx.log):
            assert proofs.verify(log.store).signed_heads == 1


# Alone


def test_what_is_taken_for_true() -> None:
    own, theirs = CheckpointKey.generate("own"), CheckpointKey.generate("theirs")
    key = str(theirs.verifier)
    empty = sign(Checkpoint("theirs", 0, EMPTY_ROOT), theirs)
    first = take_head(None, key, empty, (), own)
    assert (first.key, first.ours, seen_size(first), seen_size(None)) == (key, None, 0, 0)
    open_checkpoint(first.seen, [own.verifier, theirs.verifier])
    # Nobody is made to sign the same twice, nor what he has not shown.
    with pytest.raises(PeerBrokenError, match="has signed this checkpoint already"):
        take_head(first, key, first.seen, (), own)
    ours = sign(Checkpoint("own", 0, EMPTY_ROOT), own)
    signed = cosign(ours, [own.verifier], theirs)
    assert take_signed(first, ours, signed, own.verifier).ours == signed
    for bad in (ours, first.seen, signed.replace("own", "OWN", 1), "", signed * 2):
        with pytest.raises(PeerBrokenError, match="did not sign our head"):
            take_signed(first, ours, bad, own.verifier)


def test_the_event_carries_no_more_than_it_must() -> None:
    """A reason that another side can choose is bounded by what a head may be."""
    own, theirs = CheckpointKey.generate("own"), CheckpointKey.generate("x" * 255)
    head = sign(Checkpoint("y" * 255, 0, EMPTY_ROOT), theirs)
    with pytest.raises(PeerBrokenError) as caught:
        take_head(None, str(theirs.verifier), head, (), own)
    vm = ProtectedVm.register(UUID(int=1), "web", "source")
    vm.break_peer(str(caught.value))
    assert len(vm.peer_broken or "") < 700
