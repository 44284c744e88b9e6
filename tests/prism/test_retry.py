# SPDX-License-Identifier: AGPL-3.0-or-later
"""When a try is followed by another one: pure."""

from __future__ import annotations

import pytest

from replicator.prism.meters import Meters, endpoint_name
from replicator.prism.retry import FEW, TRIES_MAX, Passing, Tries, passing, retry_after_s


@pytest.mark.parametrize(
    ("status", "words", "kind"),
    [
        (429, (), Passing.BUSY),
        (400, ("RATE_LIMIT_EXCEEDED",), Passing.BUSY),
        (503, ("RATE_LIMIT_ERROR",), Passing.BUSY),
        (408, (), Passing.AWAY),
        (503, (), Passing.AWAY),
        (504, (), Passing.AWAY),
        (500, (), Passing.BROKEN),
        (502, (), Passing.BROKEN),
        (501, (), Passing.NO),
        (400, ("INVALID",), Passing.NO),
        (401, (), Passing.NO),
        (404, (), Passing.NO),
        (412, (), Passing.NO),
    ],
)
def test_classes(status: int, words: tuple[str, ...], kind: Passing) -> None:
    assert passing(status, words) is kind


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-3", None),
        (" 7 ", 7.0),
        ("9" * 50, 1e6),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_s(value, lambda: 10.0) == seconds


@pytest.mark.parametrize("jitter", [0.0, 0.999])
def test_waits_grow_and_stay_in_bounds(jitter: float) -> None:
    tries = Tries(0.0, 1e9, lambda: jitter)
    waits = [tries.wait_s(Passing.AWAY, 0.0) for _ in range(TRIES_MAX)]
    assert waits[-1] is None
    numbers = [wait for wait in waits if wait is not None]
    assert len(numbers) == TRIES_MAX - 1
    assert all(1.0 <= wait <= 60.0 for wait in numbers)
    assert numbers == sorted(numbers)
    assert (numbers[-1] > 59) == (jitter > 0.5)


def test_few_tries_where_the_server_is_broken() -> None:
    tries = Tries(0.0, 1e9)
    waits = [tries.wait_s(Passing.BROKEN, 0.0) for _ in range(FEW)]
    assert [wait is None for wait in waits] == [False] * (FEW - 1) + [True]


def test_no_try_begins_after_the_limit() -> None:
    tries = Tries(100.0, 10.0, lambda: 0.0)
    assert tries.wait_s(Passing.AWAY, 105.0) == 1.0
    assert tries.wait_s(Passing.AWAY, 109.5) is None
    assert Tries(0.0, 0.0).wait_s(Passing.BUSY, 0.0, 0.0) is None


def test_the_servers_own_time_is_kept_within_reason() -> None:
    tries = Tries(0.0, 1000.0, lambda: 0.5)
    assert tries.wait_s(Passing.BUSY, 0.0, 30.0) == 30.5
    assert tries.wait_s(Passing.BUSY, 0.0, 121.0) is None


def test_endpoints_have_few_names() -> None:
    uuid = "0005b6f1-0000-0000-0000-0000000000aa"
    assert (
        endpoint_name(f"/api/vmm/v4.0.a3/ahv/config/vms/{uuid}?$page=1") == "vmm/ahv/config/vms/{}"
    )
    assert endpoint_name("/api/prism/v4.1/config/tasks/ZXJnb24%3D%3A1") == "prism/config/tasks/{}"
    assert endpoint_name(f"/api/nutanix/v3/vms/{uuid}") == "v3/vms/{}"
    assert endpoint_name("/PrismGateway/services/rest/v2.0/cluster") == "v2.0/cluster"
    meters = Meters()
    for number in range(1000):
        meters.count_error(f"odd/{number}")
    assert sum(meters.errors.values()) == 1000
    assert len(meters.errors) <= 201
