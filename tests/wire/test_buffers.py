# SPDX-License-Identifier: AGPL-3.0-or-later
"""Memory that is used again: never by two at once, and never more kept than the pool's bound."""

from __future__ import annotations

import pytest

from replicator.wire import buffers
from replicator.wire.buffers import Buffers


def test_what_is_given_back_is_lent_again_and_what_is_not_is_nobody_elses() -> None:
    pool = Buffers(100)
    first, second = pool.take(), pool.take()
    assert len(first) == 100
    assert first.obj is not second.obj
    pool.give(first[10:20])  # a part stands for the whole
    third, fourth = pool.take(), pool.take()
    assert third.obj is first.obj
    assert all(fourth.obj is not view.obj for view in (second, third))


def test_a_buffer_given_back_twice_is_lent_once() -> None:
    pool = Buffers(100)
    view = pool.take()
    pool.give(view)
    pool.give(view)
    assert pool.take().obj is not pool.take().obj


def test_what_is_not_of_this_pool_is_passed_over() -> None:
    pool = Buffers(100)
    foreign = Buffers(50).take()
    for other in (bytes(100), bytearray(100), memoryview(bytearray(100)), foreign):
        pool.give(other)
    assert pool.take().obj is not foreign.obj


def test_no_more_is_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_KEPT_MAX", 2)
    pool = Buffers(10)
    lent = [pool.take() for _ in range(3)]
    for view in lent:
        pool.give(view)
    again = [pool.take().obj for _ in range(3)]
    assert sum(any(obj is view.obj for view in lent) for obj in again) == 2
