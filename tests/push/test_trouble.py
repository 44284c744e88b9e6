# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an operator is told of pushes that fail, of disks that come and go, and of settings that do not hold."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
import trio

from replicator.config import Config
from replicator.credentials import SourceCredentials
from replicator.domain.model import PushKind
from replicator.errors import RefusedError, SourceError
from replicator.push import patience, trouble
from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.link import Link, _why
from replicator.push.plan import Want
from replicator.push.pusher import Outcome, Pusher
from replicator.sources.base import VmIdentity
from replicator.sources.image import ImageSource
from tests.limits import HANG_S
from tests.push.lab import raw_push, raw_source
from tests.sites import GRAIN, ReceiverSite, SourceSite, receiver_site, source_site


@asynccontextmanager
async def sites(tmp_path: Path) -> AsyncIterator[tuple[ReceiverSite, SourceSite]]:
    (tmp_path / "a.raw").write_bytes(b"a" * 4 * GRAIN)
    (tmp_path / "b.raw").write_bytes(b"b" * 4 * GRAIN)
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, {"disk-0": tmp_path / "a.raw"}) as sx,
    ):
        yield rx, sx


def link_of(config: Config) -> Link:
    return Link(config, SourceCredentials(config))


def pusher_of(
    sx: SourceSite,
    disks: dict[str, Path] | None = None,
    config: Config | None = None,
    name: str = "web",
) -> Pusher:
    """The source as a later process has it."""
    source = ImageSource(name, disks or sx.disks, sx.config.work_path, GRAIN)
    return Pusher(config or sx.config, sx.log, source, link_of(config or sx.config))


async def closed_port() -> int:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = int(listener.socket.getsockname()[1])
    await listener.aclose()
    return port


async def test_failures_are_counted_until_the_next_point(tmp_path: Path) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        assert await trouble.load(sx.log, str(sx.uuid)) is None
        away = msgspec.structs.replace(sx.config, dr_port=await closed_port())
        before = None
        for count in (1, 2):
            with pytest.raises(ConnectionLostError, match=r"\d: Connection refused$"):
                await pusher_of(sx, config=away).push(Want.RUN)
            found = await trouble.load(sx.log, str(sx.uuid))
            assert found is not None
            assert (found.failures, found.since_us) == (
                count,
                before.since_us if before is not None else found.at_us,
            )
            assert found.reason.endswith("Connection refused")
            before = found
        # A seed that is refused because there is one is no failure of the protection.
        with pytest.raises(RefusedError):
            await sx.push(Want.SEED)
        assert await trouble.load(sx.log, str(sx.uuid)) == before
        await sx.push(Want.RUN)
        assert await trouble.load(sx.log, str(sx.uuid)) is None


async def test_of_several_vms_what_fails_is_noted_of_the_one_that_was_to_be_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        other = await sx.log.register(UUID(int=7), "db", "source")

        async def identify() -> VmIdentity:
            await trio.lowlevel.checkpoint()
            raise SourceError("Prism is away")

        monkeypatch.setattr(sx.source, "identify", identify)
        link = link_of(sx.config)
        with pytest.raises(SourceError):
            await Pusher(sx.config, sx.log, sx.source, link, vm=UUID(int=7)).push(Want.RUN)
        web = next(vm.vm for vm in sx.log.vms if vm.name == "web")
        assert await trouble.load(sx.log, web) is None
        found = await trouble.load(sx.log, other.vm)
        assert found is not None
        assert found.reason == "Prism is away"


async def test_a_push_that_tries_for_ever_is_noted_while_it_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        away = msgspec.structs.replace(sx.config, dr_port=await closed_port())
        endless = Pusher(away, sx.log, sx.source, link_of(away), patience_s=float("inf"))
        pauses: list[int] = []
        scope = trio.CancelScope()

        def pause(attempt: int, *_: float) -> float:
            pauses.append(attempt)
            if attempt == 2:
                scope.cancel()
            return 0.0

        monkeypatch.setattr(patience, "pause_s", pause)
        monkeypatch.setattr(patience, "TELL_S", 0.0)
        with scope, trio.fail_after(HANG_S):
            await endless.push(Want.RUN)
        assert pauses == [0, 1, 2]
        found = await trouble.load(sx.log, str(sx.uuid))
        assert found is not None
        assert found.failures == 3
        assert endless.reconnects == {"web": 0}
        # Several that were not told one by one are counted all the same.
        await trouble.note(sx.log, str(sx.uuid), ConnectionLostError("cut"), found.at_us + 1, 5)
        later = await trouble.load(sx.log, str(sx.uuid))
        assert later == trouble.Trouble(found.since_us, found.at_us + 1, "cut", 8)


async def test_a_push_that_goes_on_after_a_break_says_when_and_the_newest_break_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        monkeypatch.setattr(patience, "pause_s", lambda *_: 0.0)
        seen: list[trouble.Trouble | None] = []
        session = sx.pusher._session

        async def cut(connection: Connection, want: Want) -> Outcome:
            seen.append(await trouble.load(sx.log, str(sx.uuid)))
            if len(seen) < 3:
                raise ConnectionLostError(f"cut {len(seen)}")
            return await session(connection, want)

        monkeypatch.setattr(sx.pusher, "_session", cut)
        await sx.push(Want.RUN)
        before, first, second = seen
        assert before is None
        assert first is not None
        assert second is not None
        assert (first.reason, first.failures) == ("cut 1", 1)
        assert (second.reason, second.failures) == ("cut 2", 2)
        assert first.back_us is not None
        assert second.back_us is not None
        assert first.at_us <= first.back_us <= second.at_us <= second.back_us
        # A later attempt that fails is not one that went on.
        await trouble.note(sx.log, str(sx.uuid), ConnectionLostError("cut"), 5)
        await trouble.went_on(sx.log, str(sx.uuid), 6)
        await trouble.note(sx.log, str(sx.uuid), ConnectionLostError("again"), 7)
        assert await trouble.load(sx.log, str(sx.uuid)) == trouble.Trouble(5, 7, "again", 2)


async def test_a_source_that_cannot_be_asked_is_noted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        later = pusher_of(sx)

        async def gone() -> None:
            raise SourceError("QEMU is\ngone")

        monkeypatch.setattr(later._source, "identify", gone)
        with pytest.raises(SourceError):
            await later.push(Want.RUN)
        found = await trouble.load(sx.log, str(sx.uuid))
        assert found is not None
        assert found.reason == "QEMU is gone"


def test_why_no_connection_could_be_made() -> None:
    refused = ConnectionRefusedError(111, "Error connecting to ('10.0.0.1', 1): Connection refused")
    unreachable = OSError(113, "No route to host")
    for cause, expected in (
        (refused, "Connection refused"),
        (
            ExceptionGroup("several", [refused, unreachable, refused]),
            "Connection refused, No route to host",
        ),
    ):
        summed_up = OSError("all attempts to connect to dr.example:9848 failed")
        summed_up.__cause__ = cause
        assert _why(summed_up, 15) == expected
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert _why(unknown, 15) == "Name or service not known"
    assert _why(trio.TooSlowError(), 15) == "no answer within 15 s"


async def test_disks_that_come_and_go_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        assert "is new" not in caplog.text
        both = {"disk-0": tmp_path / "a.raw", "disk-1": tmp_path / "b.raw"}
        await pusher_of(sx, both).push(Want.RUN)
        assert "web: disk-1 (disk-1) is new" in caplog.messages
        assert "is gone" not in caplog.text
        await pusher_of(sx).push(Want.RUN)
        gone = "web: disk-1 (disk-1) is gone: it is not protected any more from point 3 on"
        assert gone in caplog.messages
        caplog.clear()
        await pusher_of(sx).push(Want.RUN)
        assert "disk-1" not in caplog.text


async def test_a_digest_that_is_not_used_yet_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        later = pusher_of(sx, config=msgspec.structs.replace(sx.config, dr_digest="blake3-256"))
        for _ in range(2):
            await later.push(Want.RUN)
        warning = (
            "dr_digest = blake3-256 holds for new chains only; disk-0 keeps xxh3-128"
            " until replctl seed --again"
        )
        assert caplog.messages.count(warning) == 1
        await later.push(Want.SEED_AGAIN)
        caplog.clear()
        again = pusher_of(sx, config=msgspec.structs.replace(sx.config, dr_digest="blake3-256"))
        await again.push(Want.RUN)
        assert "dr_digest" not in caplog.text


async def test_an_error_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with sites(tmp_path) as (_, sx):
        await sx.push(Want.RUN)
        (tmp_path / "a.raw").write_bytes(b"a" * GRAIN)
        with pytest.raises(RefusedError, match="shrank from"):
            await pusher_of(sx).push(Want.RUN)
        assert "shrank" not in caplog.text


async def test_the_receiver_names_the_vm_of_a_refusal_and_one_called_otherwise_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sites(tmp_path) as (rx, sx):
        await sx.push(Want.RUN)
        identity = await sx.source.identify()

        async def renamed() -> object:
            return type(identity)(identity.uuid, "www")

        later = pusher_of(sx)
        monkeypatch.setattr(later._source, "identify", renamed)
        for _ in range(2):
            await later.push(Want.RUN)
        warning = (
            "web: the source calls this VM www now; it keeps the name that it was seeded with here"
        )
        assert caplog.messages.count(warning) == 1
        assert rx.store.vm.name == "web"
        again = raw_push(bytes(GRAIN)).opened
        async with raw_source(rx.port) as raw:
            await raw.ask(msgspec.structs.replace(again, vm=str(sx.uuid)))
        assert any(line.startswith("web: push refused (wrong-parent)") for line in caplog.messages)
        stranger = msgspec.structs.replace(again, kind=PushKind.CYCLE, name="db")
        async with raw_source(rx.port) as raw:
            await raw.ask(stranger)
        assert any(
            line.startswith("db (not known here): push refused (unknown-vm)")
            for line in caplog.messages
        )
