# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a receiver tells a source that has lost its reference, asked by sources that do what ours never would."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from replicator.domain.model import Suspicion
from replicator.errors import WireError
from replicator.imagemap.tree import node_of
from replicator.wire import messages as m
from tests.limits import HANG_S
from tests.push.lab import GRAIN, VM, RawSource, raw_push, raw_source, state_of
from tests.sites import ReceiverSite, receiver_site

#: 260 grains of 4 KiB: two pages of digests, one of nodes.
CONTENT = b"".join(number.to_bytes(4) * (GRAIN // 4) for number in range(1, 261))
DESCRIBE = m.Describe(str(VM), "web")
change = msgspec.structs.replace


@asynccontextmanager
async def seeded(folder: Path) -> AsyncIterator[tuple[ReceiverSite, RawSource]]:
    async with receiver_site(folder / "rx") as rx, raw_source(rx.port) as source:
        assert isinstance(await raw_push(CONTENT).send(source), m.Committed)
        await rx.settled()
        yield rx, source


def pages(rx: ReceiverSite, level: int, *indexes: int) -> m.AskPages:
    point = rx.store.vm.newest
    assert point is not None
    return m.AskPages(str(VM), "web", "disk-0", point.disks[0].root, level, indexes)


async def ask_pages(source: RawSource, asked: m.AskPages) -> list[bytes]:
    found: list[bytes] = []
    answer = await source.ask(asked)
    while isinstance(answer, m.Pages):
        found += answer.pages
        answer = await source.hear()
    assert isinstance(answer, m.PagesEnd), answer
    return found


async def test_the_newest_point_is_described_as_the_log_has_it(tmp_path: Path) -> None:
    async with seeded(tmp_path) as (rx, source):
        said = await source.ask(DESCRIBE)
        assert isinstance(said, m.Described)
        point = rx.store.vm.newest
        assert point is not None
        for field in set(point.__struct_fields__) - {"disks"}:
            assert getattr(said, field) == getattr(point, field)
        (disk,) = said.disks
        assert disk == m.DiskMap("disk-0", "id-0", len(CONTENT), point.disks[0].root, 1, GRAIN, 1)


async def test_pages_fit_the_nodes_above_them(tmp_path: Path) -> None:
    async with seeded(tmp_path) as (rx, source):
        (top,) = await ask_pages(source, pages(rx, 1, 0))
        leaves = await ask_pages(source, pages(rx, 0, 0, 1))
        nodes = [node_of(0, leaf.ljust(4096, b"\0")) for leaf in leaves]
        assert top == b"".join(nodes)
        assert len(leaves[1]) == 4 * 16
        # In the order in which they are asked for, as often as they are.
        assert await ask_pages(source, pages(rx, 0, 1, 0, 1)) == [leaves[1], leaves[0], leaves[1]]
        # Outside the map there is nothing.
        assert await ask_pages(source, pages(rx, 0, 2, 1 << 40)) == [b"", b""]


async def test_the_largest_question_has_answers_within_the_bound(tmp_path: Path) -> None:
    async with seeded(tmp_path) as (rx, source):
        await source.say(pages(rx, 0, *[0] * m.PAGES_ASKED_MAX))
        sizes = []
        while not isinstance(answer := await source.hear(), m.PagesEnd):
            assert isinstance(answer, m.Pages)
            sizes.append(len(m.encode(answer)))
        assert max(sizes) <= 256 << 10
        # Pages of the largest kind fit as well.
        assert len(m.encode(m.Pages((b"\1" * 8192,) * m.PAGES_SENT_MAX))) <= 256 << 10


@pytest.mark.parametrize(
    "fields",
    [
        {"indexes": ()},
        {"indexes": (0,) * (m.PAGES_ASKED_MAX + 1)},
        {"indexes": (-1,)},
        {"indexes": ((1 << 40) + 1,)},
        {"level": 5},
        {"level": -1},
        {"root": b"short"},
        {"disk": "../disk-0"},
    ],
)
async def test_a_question_out_of_bounds_ends_the_session(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    async with seeded(tmp_path) as (rx, source):
        await source.say(change(pages(rx, 0, 0), **fields))
        assert await source.ended()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"root": bytes(32)}, "wrong-parent"),
        ({"disk": "disk-1"}, "wrong-parent"),
        ({"level": 2}, "bad-request"),
        ({"vm": "00000000-0000-4000-8000-000000000001"}, "unknown-vm"),
    ],
)
async def test_a_question_about_what_is_not_there_is_refused(
    tmp_path: Path, fields: dict[str, Any], code: str
) -> None:
    async with seeded(tmp_path) as (rx, source):
        before = await state_of(rx)
        answer = await source.ask(change(pages(rx, 0, 0), **fields))
        assert isinstance(answer, m.Refused)
        assert answer.code == code
        assert await state_of(rx) == before
        # The session goes on.
        assert isinstance(await source.ask(DESCRIBE), m.Described)


async def test_pages_of_a_point_that_is_not_the_newest_any_more(tmp_path: Path) -> None:
    """Another push was committed meanwhile: the source has to begin anew."""
    async with seeded(tmp_path) as (rx, source):
        asked = pages(rx, 0, 0)
        async with raw_source(rx.port) as other:
            push = raw_push(b"x" * len(CONTENT), rx.store.vm.newest, push_id="2" * 16)
            assert isinstance(await push.send(other), m.Committed)
        answer = await source.ask(asked)
        assert isinstance(answer, m.Refused)
        assert answer.code == "wrong-parent"
        assert answer.newest == rx.store.newest()


async def test_pages_wait_for_a_commit_that_is_under_way(tmp_path: Path) -> None:
    async with seeded(tmp_path) as (rx, source):
        async with rx.store.no_commit():
            await source.say(pages(rx, 0, 0))
            with trio.fail_after(HANG_S):
                while not rx.store._files.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
        assert isinstance(await source.hear(), m.Pages)


async def test_a_vm_without_points_has_nothing_to_say(tmp_path: Path) -> None:
    async with receiver_site(tmp_path / "rx") as rx, raw_source(rx.port) as source:
        answer = await source.ask(DESCRIBE)
        assert isinstance(answer, m.Refused)
        assert answer.code == "unknown-vm"
        # Known, but its first push did not come to its end.
        assert isinstance(await source.ask(raw_push(CONTENT).opened), m.Ready)
        await source.ask(m.Abandon(str(VM), "1" * 16, "a test"))
        answer = await source.ask(DESCRIBE)
        assert isinstance(answer, m.Refused)
        assert answer.code == "wrong-parent"


async def test_a_doubt_marks_what_rests_on_tracking_once(tmp_path: Path) -> None:
    async with seeded(tmp_path) as (rx, source):
        for number in (2, 3, 4):
            push = raw_push(CONTENT[::-1], rx.store.vm.newest, push_id=str(number) * 16)
            finish = change(push.finish, sampled=7, compared=number == 2)
            assert isinstance(await change_finish(push, finish).send(source), m.Committed)
        doubt = m.Doubt(str(VM), "web", "disk-0", 5 * GRAIN, 4)
        for _ in range(2):
            state = await source.ask(doubt)
            assert isinstance(state, m.VmState)
            assert state.newest == rx.store.newest()
        vm = rx.store.vm
        assert vm.suspect == Suspicion("disk-0", 5 * GRAIN, 4)
        assert vm.doubtful == {3, 4}
        assert [vm.points[n].sampled for n in (2, 3, 4)] == [7, 7, 7]
        events = [type(event).__name__ for event in await rx.log.history(rx.store.uuid)]
        assert events.count("ChangesMissed") == 1


def change_finish(push: Any, finish: m.Finish) -> Any:
    return type(push)(push.opened, push.stream, finish)


async def test_numbers_may_be_left_out(tmp_path: Path) -> None:
    """By a source that used them with a receiver that was put back; every point reads back all the same."""
    contents = {1: CONTENT}
    async with seeded(tmp_path) as (rx, source):
        for number in (5, 6, 9):
            contents[number] = bytes([number]) * GRAIN + CONTENT[GRAIN:]
            parent = rx.store.vm.newest
            push = raw_push(contents[number], parent, push_id=str(number) * 16, target_point=number)
            push = type(push)(change(push.opened, point=number), push.stream, push.finish)
            assert isinstance(await push.send(source), m.Committed)
        await rx.settled()
        for number, content in contents.items():
            assert await rx.read(number) == content


def test_what_does_not_fit_a_page_is_no_page() -> None:
    with pytest.raises(WireError):
        m.decode_from_receiver(m.encode(m.Pages((b"\1" * 8193,))))
    with pytest.raises(WireError):
        m.decode_from_receiver(m.encode(m.Pages((b"",) * (m.PAGES_SENT_MAX + 1))))
    with pytest.raises(WireError):
        m.decode_from_receiver(m.encode(m.Pages(())))
