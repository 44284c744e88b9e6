# SPDX-License-Identifier: AGPL-3.0-or-later
"""The failover table is total, the aggregate follows it cell by cell, and the page in docs/ shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.domain import model
from replicator.domain.failover import TABLE, Command, Refusal, State, Step, as_markdown, decide
from replicator.domain.model import PushKind
from replicator.domain.vm import ProtectedVm
from replicator.errors import RefusedError
from tests.domain.samples import VM, point

DOCS = Path(__file__).resolve().parents[2] / "docs"


def commit(kind: PushKind) -> Callable[[ProtectedVm], None]:
    def act(vm: ProtectedVm) -> None:
        newest = vm.newest.number if vm.newest else 0
        vm.commit(point(newest + 1, kind, parent=newest, epoch=vm.epoch))

    return act


ACTS: dict[Command, Callable[[ProtectedVm], None]] = {
    Command.COMMIT_SEED: commit(PushKind.SEED),
    Command.COMMIT_CYCLE: commit(PushKind.CYCLE),
    Command.TEST: lambda vm: vm.start_test(model.TestClone("c1", 1, 5)),
    Command.UNDO_TEST: ProtectedVm.end_test,
    Command.PROMOTE: lambda vm: vm.start_promotion(1),
    Command.FINISH_PROMOTION: ProtectedVm.finish_promotion,
    Command.UNDO_PROMOTION: ProtectedVm.undo_promotion,
    Command.MAKE_PERMANENT: ProtectedVm.make_permanent,
}
#: The commands that lead to each state from the beginning.
WAYS: dict[State, list[Command]] = {
    State.UNSEEDED: [],
    State.PROTECTED: [Command.COMMIT_SEED],
    State.TESTING: [Command.COMMIT_SEED, Command.TEST],
    State.PROMOTING: [Command.COMMIT_SEED, Command.PROMOTE],
    State.PROMOTED: [Command.COMMIT_SEED, Command.PROMOTE, Command.FINISH_PROMOTION],
    State.PERMANENT: [
        Command.COMMIT_SEED,
        Command.PROMOTE,
        Command.FINISH_PROMOTION,
        Command.MAKE_PERMANENT,
    ],
}


def vm_in(state: State) -> ProtectedVm:
    vm = ProtectedVm.register(VM, "web", "receiver")
    for command in WAYS[state]:
        ACTS[command](vm)
    assert vm.state is state
    vm.collect_events()
    return vm


def test_the_table_is_total() -> None:
    assert {state: list(row) for state, row in TABLE.items()} == {
        state: list(Command) for state in State
    }
    assert set(ACTS) == set(Command)


@pytest.mark.parametrize("command", Command)
@pytest.mark.parametrize("state", State)
def test_the_aggregate_follows_the_table(state: State, command: Command) -> None:
    vm = vm_in(state)
    epoch = vm.epoch
    cell = TABLE[state][command]
    if isinstance(cell, Refusal):
        with pytest.raises(RefusedError) as refused:
            ACTS[command](vm)
        assert str(refused.value) == f"{command} refused, the VM is {state}: {cell.reason}"
        assert vm.collect_events() == []
        assert (vm.state, vm.epoch) == (state, epoch)
        return
    ACTS[command](vm)
    (event,) = vm.collect_events()
    assert type(event).__name__ == cell.event
    assert vm.state is cell.state
    assert decide(state, command) == cell
    assert vm.epoch == epoch + (command is Command.PROMOTE)
    assert (vm.test is not None) == (vm.state is State.TESTING)


def test_every_state_can_be_reached_and_is_left_only_as_drawn() -> None:
    edges = {
        (state, cell.state)
        for state, row in TABLE.items()
        for cell in row.values()
        if isinstance(cell, Step)
    }
    reached = {State.UNSEEDED}
    for _ in State:
        reached |= {target for source, target in edges if source in reached}
    assert reached == set(State)
    assert not any(source is State.PERMANENT for source, _ in edges)
    assert not any(target is State.UNSEEDED for _, target in edges)


def test_an_old_epoch_is_refused_in_every_state() -> None:
    for state in State:
        vm = vm_in(state)
        vm.epoch = 3
        for kind in PushKind:
            with pytest.raises(RefusedError, match="push of epoch 2 refused: the VM is in epoch 3"):
                vm.check_commit(kind, 2)


def test_after_an_undone_promotion_the_source_pushes_in_the_new_epoch() -> None:
    vm = vm_in(State.PROMOTED)
    vm.undo_promotion()
    with pytest.raises(RefusedError, match="epoch 1 refused"):
        vm.commit(point(2, PushKind.CYCLE, parent=1, epoch=1))
    vm.commit(point(2, PushKind.CYCLE, parent=1, epoch=2))
    assert vm.newest == point(2, PushKind.CYCLE, parent=1, epoch=2)


def test_the_page_shows_the_table() -> None:
    page = (DOCS / "failover.md").read_text("utf-8")
    assert page.endswith("\n\n" + as_markdown())
    assert page.count("```mermaid") == 1
