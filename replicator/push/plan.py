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
    RESYNC = "resync"


class OnLoss(StrEnum):
    """``on_reference_loss``: what is done where no cycle can go on from what this side knows."""

    RESYNC = "resync"
    SEED = "seed"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A push of ours that is not settled."""

    push_id: str
    kind: PushKind
    parent: int
    parent_root: bytes | None


@dataclass(frozen=True, slots=True)
class Local:
    """What the source's log says. ``newest``: the point that a cycle can go on from, None if there is none.

    ``suspect``: why no cycle may go on from it all the same. ``again``: why a resync was begun that was cut.
    ``incomparable``: why the receiver cannot be compared with.
    """

    newest: PointRef | None
    epoch: int
    unfinished: Unfinished | None
    #: The greatest number that a point of this VM ever had here; it is not used again.
    last: int = 0
    #: The number of the newest point that this side saw committed; None: ``last``.
    committed: int | None = None
    #: The push that was given up last: the receiver may have committed it all the same.
    given_up: str | None = None
    #: Whether there ever was one here.
    seeded: bool = False
    suspect: str | None = None
    again: str | None = None
    incomparable: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Begin a push that makes ``point`` on ``parent`` (0 = none). ``reason`` is for the operator.

    ``resync``: a cycle whose changes are found by comparing all disks with the receiver's digests of ``parent``.
    """

    kind: PushKind
    point: int
    parent: int
    parent_root: bytes | None
    reason: str
    resync: bool = False


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


def plan(local: Local, remote: VmState, want: Want, on_loss: OnLoss = OnLoss.RESYNC) -> Action:
    """The next action. Never raises."""
    if remote.epoch > local.epoch:
        return Refuse(
            f"the VM failed over on the receiver (epoch {remote.epoch} there, {local.epoch} here):"
            " this source is fenced",
            fenced=True,
        )
    if local.unfinished is not None:
        return _plan_unfinished(local.unfinished, remote)
    at = remote.newest
    in_step = at is not None and at == local.newest
    if want is Want.SEED and in_step:
        assert at is not None
        return Refuse(
            f"already seeded, point {at.number} is on both sides: use push"
            " (or seed --again, to send everything once more)"
        )
    if want in (Want.SEED, Want.SEED_AGAIN):
        return _seed(local, remote, "asked for once more" if in_step else None)
    if at is None:
        return _without_points(local, remote, want, on_loss)
    if want is Want.RESYNC:
        return _resync(local, at, "asked for" if in_step else _why_apart(local, remote))
    if local.again is not None and local.incomparable is None:
        return _resync(local, at, local.again)
    if in_step and local.suspect is None:
        reason = "changes since the last point"
        return Start(PushKind.CYCLE, at.number + 1, at.number, at.root, reason)
    return _lost(local, remote, at, on_loss)


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


def _without_points(local: Local, remote: VmState, want: Want, on_loss: OnLoss) -> Action:
    """The receiver has nothing to go on from, or to compare with: only a seed can help."""
    reason = _why_apart(local, remote)
    if want is not Want.RUN:
        return Refuse("the receiver has no point of this VM: run replctl seed first")
    if local.seeded and on_loss is OnLoss.FAIL:
        return Refuse(f"{reason}, and on_reference_loss is fail: run replctl seed")
    return _seed(local, remote, reason)


def _lost(local: Local, remote: VmState, at: PointRef, on_loss: OnLoss) -> Action:
    """What nobody asked for, but the policy; unless the receiver is ahead: then this may not be the VM's source."""
    committed = local.last if local.committed is None else local.committed
    if at.number > committed and at.push_id != local.given_up:
        return Refuse(
            f"the receiver has point {at.number}, which this side never pushed: another host pushes this"
            " VM, or this side lost its state; if this is the source, run replctl resync (it sends what differs) or"
            " replctl seed"
        )
    reason = local.suspect if at == local.newest else _why_apart(local, remote)
    assert reason is not None
    if on_loss is OnLoss.FAIL:
        return Refuse(
            f"{reason}, and on_reference_loss is fail: run replctl resync (it sends what differs) or"
            " replctl seed --again"
        )
    if on_loss is OnLoss.SEED:
        return _seed(local, remote, reason)
    if local.incomparable is not None:
        return _seed(local, remote, f"{reason}; {local.incomparable}")
    return _resync(local, at, reason)


def _resync(local: Local, at: PointRef, reason: str) -> Action:
    if local.incomparable is not None:
        return Refuse(f"{local.incomparable}: run replctl seed --again")
    point = max(at.number, local.last) + 1
    return Start(PushKind.CYCLE, point, at.number, at.root, reason, resync=True)


def _seed(local: Local, remote: VmState, reason: str | None = None) -> Start:
    number = remote.newest.number if remote.newest is not None else 0
    point = max(number, local.last) + 1
    return Start(PushKind.SEED, point, number, None, reason or _why_apart(local, remote))


def _why_apart(local: Local, remote: VmState) -> str:
    if remote.newest is None:
        lost = " any more" if local.seeded else ""
        return f"the receiver has no point of this VM{lost}"
    if local.newest is None:
        return f"this side has no log or no maps of point {remote.newest.number}, the receiver's newest"
    return (
        f"the two sides differ: point {local.newest.number} was the last here,"
        f" {remote.newest.number} is the newest there"
    )
