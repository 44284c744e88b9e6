# SPDX-License-Identifier: AGPL-3.0-or-later
"""The failover state machine of a protected VM, as one table.

Every state stands against every command: the cell is the event that follows and the next state, or the reason for a
refusal. The diagram and the table in docs/failover.md are drawn from it (``python -m replicator.domain.failover``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum

from replicator.errors import RefusedError


class State(StrEnum):
    """Where a VM stands on the receiver."""

    UNSEEDED = "unseeded"
    PROTECTED = "protected"
    TESTING = "testing"
    PROMOTING = "promoting"
    PROMOTED = "promoted"
    PERMANENT = "permanent"


class Command(StrEnum):
    """What can be asked of a VM."""

    COMMIT_SEED = "commit seed"
    COMMIT_CYCLE = "commit cycle"
    TEST = "failover test"
    UNDO_TEST = "failover undo (test)"
    PROMOTE = "failover planned or unplanned"
    FINISH_PROMOTION = "finish promotion"
    UNDO_PROMOTION = "failover undo (promotion)"
    MAKE_PERMANENT = "failover perm"


@dataclass(frozen=True, slots=True)
class Step:
    """A legal transition: the kind of the event that records it, and the state afterwards."""

    event: str
    state: State


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a command is not possible in a state, said to an operator."""

    reason: str


_NO_POINT = Refusal("there is no recovery point yet: seed the VM first")
_FENCED = Refusal(
    "the VM has failed over: this side does not take pushes of the old source any more"
)
_NOT_TESTING = Refusal("no test clone is running")
_NOT_PROMOTING = Refusal("no promotion is under way")
_NOT_PROMOTED = Refusal("the VM has not been promoted")
_IN_TEST = Refusal("a test clone is running: undo it first")
_PROMOTING = Refusal("a promotion is under way: finish it or undo it first")
_PROMOTED = Refusal("the VM has been promoted already")
_PERMANENT = Refusal("the failover is permanent: this side is the source now")

TABLE: dict[State, dict[Command, Step | Refusal]] = {
    State.UNSEEDED: {
        Command.COMMIT_SEED: Step("SeedCommitted", State.PROTECTED),
        Command.COMMIT_CYCLE: _NO_POINT,
        Command.TEST: _NO_POINT,
        Command.UNDO_TEST: _NOT_TESTING,
        Command.PROMOTE: _NO_POINT,
        Command.FINISH_PROMOTION: _NOT_PROMOTING,
        Command.UNDO_PROMOTION: _NOT_PROMOTED,
        Command.MAKE_PERMANENT: _NOT_PROMOTED,
    },
    State.PROTECTED: {
        Command.COMMIT_SEED: Step("SeedCommitted", State.PROTECTED),
        Command.COMMIT_CYCLE: Step("CycleCommitted", State.PROTECTED),
        Command.TEST: Step("TestStarted", State.TESTING),
        Command.UNDO_TEST: _NOT_TESTING,
        Command.PROMOTE: Step("PromotionStarted", State.PROMOTING),
        Command.FINISH_PROMOTION: _NOT_PROMOTING,
        Command.UNDO_PROMOTION: _NOT_PROMOTED,
        Command.MAKE_PERMANENT: _NOT_PROMOTED,
    },
    State.TESTING: {
        Command.COMMIT_SEED: Step("SeedCommitted", State.TESTING),
        Command.COMMIT_CYCLE: Step("CycleCommitted", State.TESTING),
        Command.TEST: _IN_TEST,
        Command.UNDO_TEST: Step("TestEnded", State.PROTECTED),
        Command.PROMOTE: _IN_TEST,
        Command.FINISH_PROMOTION: _NOT_PROMOTING,
        Command.UNDO_PROMOTION: _NOT_PROMOTED,
        Command.MAKE_PERMANENT: _NOT_PROMOTED,
    },
    State.PROMOTING: {
        Command.COMMIT_SEED: _FENCED,
        Command.COMMIT_CYCLE: _FENCED,
        Command.TEST: _PROMOTING,
        Command.UNDO_TEST: _NOT_TESTING,
        Command.PROMOTE: _PROMOTING,
        Command.FINISH_PROMOTION: Step("Promoted", State.PROMOTED),
        Command.UNDO_PROMOTION: Step("PromotionUndone", State.PROTECTED),
        Command.MAKE_PERMANENT: _PROMOTING,
    },
    State.PROMOTED: {
        Command.COMMIT_SEED: _FENCED,
        Command.COMMIT_CYCLE: _FENCED,
        Command.TEST: _PROMOTED,
        Command.UNDO_TEST: _NOT_TESTING,
        Command.PROMOTE: _PROMOTED,
        Command.FINISH_PROMOTION: _PROMOTED,
        Command.UNDO_PROMOTION: Step("PromotionUndone", State.PROTECTED),
        Command.MAKE_PERMANENT: Step("MadePermanent", State.PERMANENT),
    },
    State.PERMANENT: {
        Command.COMMIT_SEED: _PERMANENT,
        Command.COMMIT_CYCLE: _PERMANENT,
        Command.TEST: _PERMANENT,
        Command.UNDO_TEST: _NOT_TESTING,
        Command.PROMOTE: _PERMANENT,
        Command.FINISH_PROMOTION: _NOT_PROMOTING,
        Command.UNDO_PROMOTION: _PERMANENT,
        Command.MAKE_PERMANENT: _PERMANENT,
    },
}


def decide(state: State, command: Command) -> Step:
    """The step that ``command`` takes from ``state``. Raises RefusedError that names both and the reason."""
    cell = TABLE[state][command]
    if isinstance(cell, Refusal):
        raise RefusedError(f"{command.value} refused, the VM is {state.value}: {cell.reason}")
    return cell


def diagram() -> str:
    """The legal transitions as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.UNSEEDED.value}"]
    for state, row in TABLE.items():
        for command, cell in row.items():
            if isinstance(cell, Step):
                lines.append(
                    f"    {state.value} --> {cell.state.value}: {command.value} / {cell.event}"
                )
    return "\n".join(lines)


def as_markdown() -> str:
    """Diagram and full table, as docs/failover.md holds them."""
    head = [command.value for command in Command]
    lines = ["```mermaid", diagram(), "```", "", "| state | " + " | ".join(head) + " |"]
    lines.append("|---" * (len(head) + 1) + "|")
    for state, row in TABLE.items():
        cells = [
            f"**{cell.event}** → {cell.state.value}"
            if isinstance(cell, Step)
            else f"refused: {cell.reason}"
            for cell in (row[command] for command in Command)
        ]
        lines.append(f"| {state.value} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
