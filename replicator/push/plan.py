# SPDX-License-Identifier: AGPL-3.0-or-later
"""What to do next for a VM: a pure comparison of what the two sides have."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from replicator.domain.model import PushKind
from replicator.wire.messages import PointRef, VmState


class Want(StrEnum):
    """What was asked for."""

    SEED = "seed"
    SEED_AGAIN = "seed again"
    PUSH = "push"
    RUN = "run"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A push of ours that is not settled."""

    push_id: str
    kind: PushKind
    parent: int
    parent_root: bytes | None


@dataclass(frozen=True, slots=True)
class Local:
    """What the source's log says. ``newest``: the point that a cycle can go on from, None if there is none."""

    newest: PointRef | None
    epoch: int
    unfinished: Unfinished | None
    #: The greatest number that a point of this VM ever had here; it is not used again.
    last: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a push that makes ``point`` on ``parent`` (0 = none). ``reason`` is for the operator."""

    kind: PushKind
    point: int
    parent: int
    parent_root: bytes | None
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with the unfinished push: it may be committed already, the receiver will say."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The unfinished push cannot be gone on with: abandon it, then plan again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing may be done, and why. ``fenced``: because the VM failed over, which no later push can change."""

    reason: str
    fenced: bool = False


Action = Start | Resume | GiveUp | Refuse


def plan(local: Local, remote: VmState, want: Want) -> Action:
    """The next action. Never raises."""
    if remote.epoch > local.epoch:
        return Refuse(
            f"the VM failed over on the receiver (epoch {remote.epoch} there, {local.epoch} here):"
            " this source is fenced",
            fenced=True,
        )
    if local.unfinished is not None:
        return _plan_unfinished(local.unfinished, remote)
    in_step = remote.newest is not None and remote.newest == local.newest
    if want is Want.SEED:
        if in_step and remote.newest is not None:
            return Refuse(
                f"already seeded, point {remote.newest.number} is on both sides: use push"
                " (or seed --again, to send everything once more)"
            )
        return _seed(local, remote)
    if want is Want.SEED_AGAIN:
        return _seed(local, remote, "asked for once more" if in_step else None)
    if in_step and remote.newest is not None:
        at = remote.newest
        return Start(
            PushKind.CYCLE, at.number + 1, at.number, at.root, "changes since the last point"
        )
    if want is Want.RUN:
        return _seed_unasked(local, remote)
    if remote.newest is None:
        return Refuse("the receiver has no point of this VM: run replctl seed first")
    return Refuse(f"{_why_apart(local, remote)}: run replctl seed")


def _plan_unfinished(unfinished: Unfinished, remote: VmState) -> Action:
    newest = remote.newest
    if newest is not None and newest.push_id == unfinished.push_id:
        return Resume()
    number, root = (newest.number, newest.root) if newest is not None else (0, None)
    if number == unfinished.parent and (
        root == unfinished.parent_root or unfinished.kind is PushKind.SEED
    ):
        return Resume()
    return GiveUp(
        f"it was built on point {unfinished.parent}, and the receiver's newest is {number}"
    )


def _seed_unasked(local: Local, remote: VmState) -> Action:
    """A seed that nobody asked for, unless the receiver is ahead: then this may not be the VM's source."""
    if remote.newest is not None and remote.newest.number > local.last:
        return Refuse(
            f"the receiver has point {remote.newest.number}, which this side never pushed: another host pushes this"
            " VM, or this side lost its state; if this is the source, run replctl seed"
        )
    return _seed(local, remote)


def _seed(local: Local, remote: VmState, reason: str | None = None) -> Start:
    number = remote.newest.number if remote.newest is not None else 0
    point = max(number, local.last) + 1
    return Start(PushKind.SEED, point, number, None, reason or _why_apart(local, remote))


def _why_apart(local: Local, remote: VmState) -> str:
    if remote.newest is None:
        lost = "" if local.newest is None else " any more"
        return f"the receiver has no point of this VM{lost}"
    if local.newest is None:
        return f"this side has no log or no maps of point {remote.newest.number}, the receiver's newest"
    return (
        f"the two sides differ: point {local.newest.number} was the last here,"
        f" {remote.newest.number} is the newest there"
    )
