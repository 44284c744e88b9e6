# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a source does next, as a table of what the two sides have; when it does it, and how long it waits for a line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.domain.model import PushKind
from replicator.push.plan import (
    Action,
    GiveUp,
    Local,
    Refuse,
    Resume,
    Start,
    Unfinished,
    Want,
    plan,
)
from replicator.push.schedule import BACKOFF_MAX_S, backoff_s, next_start
from replicator.wire.messages import PointRef, VmState

P3 = PointRef(3, b"3" * 32, "p3")
P4 = PointRef(4, b"4" * 32, "p4")
OTHER3 = PointRef(3, b"x" * 32, "q3")
CYCLE_ON_3 = Unfinished("p4", PushKind.CYCLE, 3, P3.root)
SEED_ON_3 = Unfinished("p4", PushKind.SEED, 3, None)
FIRST_SEED = Unfinished("p1", PushKind.SEED, 0, None)

NOTHING_THERE = "the receiver has no point of this VM"
CYCLE = Start(PushKind.CYCLE, 4, 3, P3.root, "changes since the last point")
FIRST = Start(PushKind.SEED, 1, 0, None, NOTHING_THERE)
APART = "the two sides differ: point 4 was the last here, 3 is the newest there"
NO_LOG = "this side has no log or no maps of point 3, the receiver's newest"
NOT_OURS = (
    "the receiver has point {}, which this side never pushed: another host pushes this VM, or this side lost its"
    " state; if this is the source, run replctl seed"
)

#: Newest here, newest there, what was asked for, what is done. Nothing unfinished, epochs the same.
CASES: list[tuple[PointRef | None, PointRef | None, Want, Action]] = [
    (None, None, Want.RUN, FIRST),
    (None, None, Want.SEED, FIRST),
    (None, None, Want.PUSH, Refuse(f"{NOTHING_THERE}: run replctl seed first")),
    (P3, P3, Want.RUN, CYCLE),
    (P3, P3, Want.PUSH, CYCLE),
    (
        P3,
        P3,
        Want.SEED,
        Refuse(
            "already seeded, point 3 is on both sides: use push"
            " (or seed --again, to send everything once more)"
        ),
    ),
    (P3, P3, Want.SEED_AGAIN, Start(PushKind.SEED, 4, 3, None, "asked for once more")),
    (P4, P3, Want.SEED_AGAIN, Start(PushKind.SEED, 5, 3, None, APART)),
    (P3, None, Want.RUN, Start(PushKind.SEED, 4, 0, None, f"{NOTHING_THERE} any more")),
    (P3, None, Want.PUSH, Refuse(f"{NOTHING_THERE}: run replctl seed first")),
    (None, P3, Want.RUN, Refuse(NOT_OURS.format(3))),
    (P3, P4, Want.RUN, Refuse(NOT_OURS.format(4))),
    (None, P3, Want.SEED, Start(PushKind.SEED, 4, 3, None, NO_LOG)),
    (None, P3, Want.PUSH, Refuse(f"{NO_LOG}: run replctl seed")),
    (P4, P3, Want.RUN, Start(PushKind.SEED, 5, 3, None, APART)),
    (P4, P3, Want.PUSH, Refuse(f"{APART}: run replctl seed")),
]


@pytest.mark.parametrize(("here", "there", "want", "expected"), CASES)
def test_plan(here: PointRef | None, there: PointRef | None, want: Want, expected: Action) -> None:
    local = Local(here, 1, None, here.number if here is not None else 0)
    assert plan(local, VmState(there, 1, None), want) == expected


def test_a_source_whose_maps_are_lost_seeds_by_itself() -> None:
    action = plan(Local(None, 1, None, 3), VmState(P3, 1, None), Want.RUN)
    assert action == Start(PushKind.SEED, 4, 3, None, NO_LOG)


def test_the_same_number_with_other_content_is_another_point() -> None:
    action = plan(Local(P3, 1, None, 3), VmState(OTHER3, 1, None), Want.RUN)
    assert isinstance(action, Start)
    assert (action.kind, action.point, action.parent) == (PushKind.SEED, 4, 3)


#: The unfinished push, newest there, what is done, whatever was asked for.
UNFINISHED: list[tuple[Unfinished, PointRef | None, Action]] = [
    (CYCLE_ON_3, P3, Resume()),
    (CYCLE_ON_3, P4, Resume()),  # it was committed, the answer was lost
    (SEED_ON_3, P3, Resume()),
    (SEED_ON_3, OTHER3, Resume()),  # a seed needs no content to stand on
    (FIRST_SEED, None, Resume()),
    (
        CYCLE_ON_3,
        OTHER3,
        GiveUp("it was built on point 3, and the receiver's newest is 3"),
    ),
    (CYCLE_ON_3, None, GiveUp("it was built on point 3, and the receiver's newest is 0")),
    (FIRST_SEED, P3, GiveUp("it was built on point 0, and the receiver's newest is 3")),
]


@pytest.mark.parametrize("want", Want)
@pytest.mark.parametrize(("unfinished", "there", "expected"), UNFINISHED)
def test_plan_with_an_unfinished_push(
    unfinished: Unfinished, there: PointRef | None, expected: Action, want: Want
) -> None:
    assert plan(Local(P3, 1, unfinished), VmState(there, 1, None), want) == expected


@pytest.mark.parametrize("want", Want)
@pytest.mark.parametrize("unfinished", [None, CYCLE_ON_3])
def test_a_higher_epoch_there_fences_this_side(want: Want, unfinished: Unfinished | None) -> None:
    action = plan(Local(P3, 1, unfinished), VmState(P3, 2, None), want)
    assert isinstance(action, Refuse)
    assert "this source is fenced" in action.reason


_REFS = st.sampled_from([None, P3, P4, OTHER3])
_UNFINISHED = st.sampled_from([None, CYCLE_ON_3, SEED_ON_3, FIRST_SEED])


@given(_REFS, _REFS, _UNFINISHED, st.sampled_from(Want), st.tuples(*[st.integers(1, 2)] * 2))
def test_a_new_push_always_continues_what_the_receiver_has(
    here: PointRef | None,
    there: PointRef | None,
    unfinished: Unfinished | None,
    want: Want,
    epochs: tuple[int, int],
) -> None:
    epoch, there_epoch = epochs
    action = plan(Local(here, epoch, unfinished), VmState(there, there_epoch, None), want)
    if isinstance(action, Start):
        number = there.number if there else 0
        assert (action.parent, action.point) == (number, number + 1)
        assert unfinished is None
        assert epoch >= there_epoch
        # A cycle only on exactly what this side knows.
        assert (action.kind is PushKind.CYCLE) == (here is not None and here == there)
        assert (action.parent_root is not None) == (action.kind is PushKind.CYCLE)


_SECONDS = st.floats(0, 1e9, allow_nan=False)
_JITTER = st.floats(0, 1)


@given(_SECONDS, _SECONDS, st.floats(1, 86400), _JITTER)
def test_the_next_cycle_is_never_late_and_never_in_the_past(
    started: float, took: float, interval: float, jitter: float
) -> None:
    now = started + took
    due = next_start(started, now, interval, jitter)
    assert due >= now
    assert due <= max(now, started + interval)
    assert due == now or due >= started + 0.95 * interval - 1e-6


@given(st.integers(0, 10**6), _JITTER)
def test_the_pause_grows_and_is_bounded(attempt: int, jitter: float) -> None:
    pause = backoff_s(attempt, jitter)
    assert 0.25 <= pause <= BACKOFF_MAX_S
    assert pause <= backoff_s(attempt + 1, jitter)
    assert backoff_s(attempt, 0) == backoff_s(attempt, 1) / 2


def test_the_first_pauses() -> None:
    assert [backoff_s(attempt, 1) for attempt in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
