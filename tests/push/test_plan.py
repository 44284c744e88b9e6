# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a source does next, as a table of what the two sides have; when it does it, and how long it waits for a line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.domain.model import PushKind
from replicator.push.plan import (
    Action,
    GiveUp,
    Local,
    OnLoss,
    Refuse,
    Resume,
    Start,
    Unfinished,
    Want,
    plan,
)
from replicator.push.schedule import (
    BACKOFF_MAX_S,
    Pace,
    Told,
    backoff_s,
    beat_s,
    next_start,
    pause_s,
)
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
    " state; if this is the source, run replctl resync (it sends what differs) or replctl seed"
)


def resync(point: int, at: PointRef, reason: str) -> Start:
    return Start(PushKind.CYCLE, point, at.number, at.root, reason, resync=True)


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
    (P3, None, Want.RESYNC, Refuse(f"{NOTHING_THERE}: run replctl seed first")),
    (None, P3, Want.RUN, Refuse(NOT_OURS.format(3))),
    (None, P3, Want.PUSH, Refuse(NOT_OURS.format(3))),
    (P3, P4, Want.RUN, Refuse(NOT_OURS.format(4))),
    (P3, P4, Want.PUSH, Refuse(NOT_OURS.format(4))),
    (None, P3, Want.SEED, Start(PushKind.SEED, 4, 3, None, NO_LOG)),
    (None, P3, Want.RESYNC, resync(4, P3, NO_LOG)),
    (P3, P3, Want.RESYNC, resync(4, P3, "asked for")),
    (
        P3,
        P4,
        Want.RESYNC,
        resync(5, P4, "the two sides differ: point 3 was the last here, 4 is the newest there"),
    ),
    (P4, P3, Want.RUN, resync(5, P3, APART)),
    (P4, P3, Want.PUSH, resync(5, P3, APART)),
    (P4, P3, Want.RESYNC, resync(5, P3, APART)),
]


@pytest.mark.parametrize(("here", "there", "want", "expected"), CASES)
def test_plan(here: PointRef | None, there: PointRef | None, want: Want, expected: Action) -> None:
    local = Local(here, 1, None, here.number if here is not None else 0, seeded=here is not None)
    assert plan(local, VmState(there, 1, None), want) == expected


#: What was lost, and how it is said: nothing to go on from, another content, a chain that is suspect.
LOST: list[tuple[Local, PointRef, str]] = [
    (Local(None, 1, None, 3, seeded=True), P3, NO_LOG),
    (
        Local(P3, 1, None, 3, seeded=True),
        OTHER3,
        "the two sides differ: point 3 was the last here, 3 is the newest there",
    ),
    (Local(P3, 1, None, 3, seeded=True, suspect="tracking lies"), P3, "tracking lies"),
    (Local(P4, 1, None, 6, seeded=True), P3, APART),
]


@pytest.mark.parametrize("want", [Want.RUN, Want.PUSH])
@pytest.mark.parametrize(("local", "there", "why"), LOST)
def test_what_is_done_about_a_lost_reference(
    local: Local, there: PointRef, why: str, want: Want
) -> None:
    remote, point = VmState(there, 1, None), local.last + 1
    assert plan(local, remote, want) == resync(point, there, why)
    seed = Start(PushKind.SEED, point, 3, None, why)
    assert plan(local, remote, want, OnLoss.SEED) == seed
    refused = Refuse(
        f"{why}, and on_reference_loss is fail: run replctl resync (it sends what differs) or"
        " replctl seed --again"
    )
    assert plan(local, remote, want, OnLoss.FAIL) == refused
    # A resync that was begun is begun again, whatever the policy.
    again = replace(local, again="asked for")
    assert plan(again, remote, want, OnLoss.FAIL) == resync(point, there, "asked for")
    # What cannot be compared is sent anew, where nobody has forbidden it.
    deaf = replace(again, incomparable="no map there")
    assert plan(deaf, remote, want) == Start(PushKind.SEED, point, 3, None, f"{why}; no map there")
    assert plan(deaf, remote, want, OnLoss.FAIL) == refused
    assert plan(deaf, remote, Want.RESYNC) == Refuse("no map there: run replctl seed --again")


def test_a_receiver_that_lost_its_points_is_not_seeded_where_that_is_forbidden() -> None:
    """The first seed is no loss, whatever was given up before it."""
    remote = VmState(None, 1, None)
    lost = plan(Local(None, 1, None, 3, seeded=True), remote, Want.RUN, OnLoss.FAIL)
    assert lost == Refuse(
        f"{NOTHING_THERE} any more, and on_reference_loss is fail: run replctl seed"
    )
    first = plan(Local(None, 1, None, 1), remote, Want.RUN, OnLoss.FAIL)
    assert first == Start(PushKind.SEED, 2, 0, None, NOTHING_THERE)


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
        # A cycle only on exactly what this side knows, or what it will have compared with.
        if action.kind is PushKind.CYCLE and not action.resync:
            assert here is not None
            assert here == there
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
    assert 0.1 <= pause <= BACKOFF_MAX_S
    assert pause <= backoff_s(attempt + 1, jitter)
    assert backoff_s(attempt, 0) == backoff_s(attempt, 1) / 2


def test_the_first_pauses() -> None:
    assert [backoff_s(attempt, 1) for attempt in range(6)] == [0.2, 0.4, 0.8, 1.6, 2, 2]


@given(st.integers(0, 100), st.floats(0, 10**6), _JITTER)
def test_time_spent_on_an_attempt_counts_as_pause(
    attempt: int, spent: float, jitter: float
) -> None:
    pause = pause_s(attempt, spent, jitter)
    assert backoff_s(0, jitter) <= pause <= backoff_s(attempt, jitter)
    assert pause_s(attempt, 0, jitter) == backoff_s(attempt, jitter)
    if spent >= BACKOFF_MAX_S:
        assert pause == backoff_s(0, jitter) <= 0.2


def test_beats_fit_into_the_time_of_silence() -> None:
    assert [beat_s(timeout) for timeout in (2, 4, 8, 600)] == [0.5, 1, 2, 2]


# Falling behind


def test_cycles_that_fall_behind_are_told_now_and_then_and_when_they_keep_up_again() -> None:
    pace = Pace(300)
    assert pace.finished(300, 0) is None
    told = pace.finished(340, 1000)
    assert told == Told(
        "cycles fall behind: the last took 340 s, push_interval is 300 s; the next starts at once",
        behind=True,
    )
    assert pace.finished(310, 1310) is None
    assert pace.finished(320, 1599) is None
    assert pace.finished(350, 1600) is not None
    assert pace.finished(9.96, 1900) == Told(
        "cycles keep up again: the last took 10.0 s, push_interval is 300 s", behind=False
    )
    assert pace.finished(200, 2100) is None


def test_cycles_that_are_now_slow_and_now_fast_fill_no_log() -> None:
    pace = Pace(10)
    lines = [pace.finished(20 if n % 2 else 5, n * 10.0) for n in range(3600)]
    # Ten hours, in which each slow one is followed by one that is not.
    told = [line.text.partition(":")[0] for line in lines if line is not None]
    assert told[:2] == ["cycles fall behind", "cycles keep up again"]
    assert len(told) <= 2 * 60
    assert all(one != two for one, two in pairwise(told))


def test_a_push_that_was_given_up_is_no_point_that_this_side_pushed() -> None:
    """Else a second source of a VM would only have to fail often enough to take it over."""
    theirs = PointRef(5, P3.root, "9" * 16)
    local = Local(None, 1, None, last=7, committed=0, given_up="8" * 16)
    for want in (Want.RUN, Want.PUSH):
        action = plan(local, VmState(theirs, 1, None), want)
        assert isinstance(action, Refuse)
        assert "never pushed" in action.reason
    # Ours after all: the receiver committed it, and this side could not follow.
    ours = PointRef(5, P3.root, "8" * 16)
    assert not isinstance(plan(local, VmState(ours, 1, None), Want.RUN), Refuse)
