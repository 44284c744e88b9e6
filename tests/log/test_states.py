# SPDX-License-Identifier: AGPL-3.0-or-later
"""The VMs that a start finds are those that folding everything gives, whatever has become of what is kept beside the log."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import trio
import trio.testing

from eventstore.projection_rows import (
    DATABASE,
    Parked,
    State,
    Track,
    View,
    load_state,
    store_state,
)
from replicator.log import open_log
from replicator.log import states as states_module
from replicator.log.states import NAME, VmStates, decode, encode, recall
from replicator.log.store import Fold, LogStore
from tests.limits import HANG_S
from tests.log.support import (
    DB,
    NAMES,
    WEB,
    Calendar,
    caught_up,
    check_log,
    damage,
    events_of,
    forget_projections,
    live,
    opened,
    rebuilt,
    rows,
    states,
)

if TYPE_CHECKING:
    from eventstore.environment import Transaction


def by_hand(store: LogStore) -> dict[str, dict[str, Any]]:
    """Every VM from every event."""
    fold = Fold()
    for event in events_of(store):
        fold.add(event)
    return states(fold.vms.values())


def change_state(store: LogStore, change: Callable[[State], State]) -> None:
    """Another state row of the projection ``vms``."""
    database = store.environment.database(DATABASE)

    def write(txn: Transaction) -> None:
        state = load_state(txn, database, NAME)
        assert state is not None
        store_state(txn, database, NAME, change(state))

    store.environment.write(write)


def live_track(**changes: Any) -> Callable[[State], State]:
    def change(state: State) -> State:
        return msgspec.structs.replace(state, live=msgspec.structs.replace(state.live, **changes))

    return change


def damage_rows(store: LogStore, kind: bytes, spoil: Callable[[bytes], bytes]) -> None:
    """Spoil every row of a kind: 1 a state, 2 a projection's own."""
    database = store.environment.database(DATABASE)

    def write(txn: Transaction) -> None:
        with txn.cursor(database) as cursor:
            for key, row in list(cursor):
                if key.startswith(kind):
                    txn.put(key, spoil(row), db=database)

    store.environment.write(write)


def other_content(store: LogStore) -> None:
    """Rows with a good checksum that are no VMs."""
    database = store.environment.database(DATABASE)

    def write(txn: Transaction) -> None:
        state = load_state(txn, database, NAME)
        assert state is not None
        view = View(txn, database, NAME, state.live.generation, writable=True)
        for key, _ in list(view.items()):
            view.put(key, b"\xc1")

    store.environment.write(write)


def begin_anew(store: LogStore) -> None:
    """As a start leaves it that is cut before the first row is made."""
    forget_projections(store)
    database = store.environment.database(DATABASE)
    begun = State(Track(1, VmStates.revision))
    store.environment.write(lambda txn: store_state(txn, database, NAME, begun))


SPOILED: dict[str, Callable[[LogStore], None]] = {
    "as they are": lambda _: None,
    "absent": forget_projections,
    "of an older revision": lambda s: change_state(s, live_track(revision=0)),
    "of a later revision": lambda s: change_state(s, live_track(revision=99)),
    "not begun": begin_anew,
    "behind what is live": lambda s: change_state(s, live_track(position=3)),
    "parked": lambda s: change_state(s, live_track(parked=Parked(9, "t", "e", 10))),
    "being rebuilt": lambda s: change_state(
        s, lambda st: msgspec.structs.replace(st, building=Track(2, VmStates.revision, 4, True))
    ),
    "damaged": lambda s: damage_rows(s, b"\x02", lambda row: row[:-1] + bytes([row[-1] ^ 1])),
    "cut": lambda s: damage_rows(s, b"\x02", lambda _: b""),
    "with a damaged state": lambda s: damage_rows(s, b"\x01", lambda row: row[:-1]),
    "with a state of a later format": lambda s: damage_rows(s, b"\x01", lambda row: b"\x09" + row),
    "something else": other_content,
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_vms_are_recalled_whatever_became_of_their_rows(copied: Path, spoiled: str) -> None:
    with opened(copied, readonly=False) as store:
        expected = by_hand(store)
        SPOILED[spoiled](store)
        assert states(recall(store).values()) == expected
    with opened(copied) as store:
        assert states(recall(store).values()) == expected


@pytest.mark.parametrize("spoiled", ["absent", "not begun", "behind what is live", "damaged"])
def test_vms_are_recalled_without_rows_and_segments(copied: Path, spoiled: str) -> None:
    """The live log begins with everybody's balance."""
    with opened(copied, readonly=False) as store:
        expected = by_hand(store)
        SPOILED[spoiled](store)
    for path in (copied / "segments").iterdir():
        path.unlink()
    with opened(copied) as store:
        assert states(recall(store).values()) == expected


@pytest.mark.parametrize("spoiled", ["absent", "of an older revision", "not begun", "parked"])
async def test_rows_are_made_again(copied: Path, spoiled: str, calendar: Calendar) -> None:
    """And the log goes on meanwhile."""
    with opened(copied, readonly=False) as store:
        SPOILED[spoiled](store)
    async with open_log(copied, clock=calendar) as log:
        await live(log, WEB, random.Random(1), 2)
        if spoiled == "parked":
            await trio.to_thread.run_sync(log.projections.resume, NAME)
        with trio.fail_after(HANG_S):
            await caught_up(log)
        expected = by_hand(log.store)
        assert states(log.vms) == expected
        assert states(recall(log.store).values()) == expected
        assert len(rows(log.store, NAME)) == len(expected)
        check_log(log.store)


async def test_rows_follow_every_event(tmp_path: Path, calendar: Calendar) -> None:
    """Opened again after each event, with rows that are behind by any number of them."""
    rng = random.Random(2)
    async with open_log(tmp_path, clock=calendar) as log:
        for vm in (WEB, DB):
            await log.register(vm, NAMES[vm], "source" if vm == DB else "receiver")
        for number in range(30):
            await live(log, rng.choice((WEB, DB)), rng)
            if number % 10 == 9:
                calendar.next_month()
                await log.close_period()
                await log.seal()
            if number % 3 == 0:
                await caught_up(log)
            found = await trio.to_thread.run_sync(recall, log.store)
            assert states(found.values()) == states(log.vms) == by_hand(log.store)


async def test_a_row_is_recalled_while_rows_move_on(
    copied: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at how far the rows are and the rows."""
    looks = 0
    async with open_log(copied, clock=calendar) as log:
        await caught_up(log)

        async def go_on() -> None:
            await live(log, WEB, random.Random(looks), 2)
            await caught_up(log)

        position = states_module._position

        def look(store: LogStore) -> int | None:
            nonlocal looks
            looks += 1
            found = position(store)
            if looks in (1, 3):
                trio.from_thread.run(go_on)
            return found

        monkeypatch.setattr(states_module, "_position", look)
        found = await trio.to_thread.run_sync(recall, log.store)
        assert looks >= 2
        assert states(found.values()) == states(log.vms)


def test_a_row_is_the_whole_vm(copied: Path) -> None:
    with opened(copied) as store:
        for vm in recall(store).values():
            assert states([decode(encode(vm))]) == states([vm])
    for bad in (b"", b"\xc1", b"\x93\x01\x02\x03"):
        with pytest.raises(msgspec.MsgspecError):
            decode(bad)


async def test_a_vm_with_more_to_remember_than_a_row_may_hold(
    tmp_path: Path, calendar: Calendar
) -> None:
    """Thousands of points, or a disk that rotted under many of them: the row is in pieces, and shrinks again."""
    text = "digest of a grain " * 20_000
    async with open_log(tmp_path, clock=calendar) as log:
        for vm_id in (WEB, DB):
            await log.register(vm_id, NAMES[vm_id], "receiver")
            await live(log, vm_id, random.Random(1), 4)
        for number in range(1, 9):
            async with log.change(WEB) as vm:
                vm.damaged(msgspec.structs.replace(damage(number), reason=text))
        with trio.fail_after(HANG_S):
            await caught_up(log)
            assert len(rows(log.store, NAME)) == 2 + len(text) * 8 // states_module.PIECE
            await log.close_period()
            await log.seal()
            await caught_up(log)
        memory = states(log.vms)
        assert len(rows(log.store, NAME)) == 2 + len(text) * 8 // states_module.PIECE
    async with open_log(tmp_path, clock=calendar) as log:
        assert states(log.vms) == memory
        async with log.change(WEB) as vm:
            vm.release(list(range(3, 9)))
        with trio.fail_after(HANG_S):
            await caught_up(log)
        assert len(rows(log.store, NAME)) == 2
        assert states(recall(log.store).values()) == states(log.vms)


@pytest.mark.parametrize("piece", [1, 7, 100])
async def test_rows_in_pieces_of_any_size(
    tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(states_module, "PIECE", piece)
    rng = random.Random(piece)
    async with open_log(tmp_path, clock=calendar) as log:
        for vm in (WEB, DB):
            await log.register(vm, NAMES[vm], "receiver")
        for number in range(12):
            await live(log, rng.choice((WEB, DB)), rng)
            await caught_up(log)
            assert states(recall(log.store).values()) == states(log.vms)
            if number == 6:
                await log.close_period()
                await log.seal()


async def test_a_projection_that_is_rebuilt_is_the_same(copied: Path, calendar: Calendar) -> None:
    async with open_log(copied, clock=calendar) as log:
        await caught_up(log)
        before = rows(log.store, NAME)
        await trio.to_thread.run_sync(log.projections.request_rebuild, NAME)
        with trio.fail_after(HANG_S):
            await rebuilt(log, NAME)
        assert rows(log.store, NAME) == before
