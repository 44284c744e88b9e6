# SPDX-License-Identifier: AGPL-3.0-or-later
"""One host asked for JSON: accounts and cookies, tries again, errors by class. In memory; time is jumped."""

from __future__ import annotations

import base64
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from replicator.errors import UsageError
from replicator.prism.endpoint import REFUSALS_MAX, Hosts, segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismAuthError,
    PrismConflictError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRateLimitedError,
    PrismRefusedError,
    PrismUnreachableError,
)
from replicator.prism.settings import Account, PrismSettings, Waits, split_address
from replicator.prism.types import Cluster
from tests.prism.lab import PE, Asked, Said, in_turn, scripted, settings

BASIC = "Basic " + base64.b64encode(b"svc-dr:pass:word-of-svc").decode()
VMS = "/api/vmm/v4.3/ahv/config/vms"
ID = UUID(int=7)


def v4_error(code: str, group: str, message: str = "no") -> dict[str, Any]:
    return {"data": {"error": [{"message": message, "code": code, "errorGroup": group}]}}


async def test_a_request_says_who_asks_and_what(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    said = Said(200, {"data": []}, {"etag": "abc"})
    async with scripted(tmp_path, in_turn(said)) as (script, hosts):
        answer = await hosts.central.call(
            "POST", VMS, {"a": 1}, query={"$filter": "name eq 'x y'"}, etag="t", request_id=ID
        )
        await hosts.central.call("GET", VMS)
    first, second = script.asked
    assert answer.etag == "abc"
    assert answer.node().nodes("data") == []
    assert first.query == {"$filter": "name eq 'x y'"}
    assert first.json == {"a": 1}
    assert first.headers["authorization"] == BASIC
    assert first.headers["if-match"] == "t"
    assert first.headers["ntnx-request-id"] == str(ID)
    assert first.headers["host"] == "prism.example.test:9440"
    assert UUID(second.headers["ntnx-request-id"]) != ID
    assert "content-type" not in second.headers


async def test_an_api_key_stands_in_place_of_a_password_and_of_cookies(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    account = Account(api_key="k-1")
    async with scripted(tmp_path, in_turn(Said(200, {}, cookies=("S=1",))), account=account) as (
        script,
        hosts,
    ):
        await hosts.central.call("GET", VMS)
        await hosts.central.call("GET", VMS)
    for asked in script.asked:
        assert asked.headers["x-ntnx-api-key"] == "k-1"
        assert not {"authorization", "cookie"} & asked.headers.keys()


async def test_a_cookie_replaces_the_account_until_it_is_refused(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    answers = in_turn(
        Said(200, {}, cookies=("NTNX_IAM_SESSION=one; Path=/; Secure", "bad name=1", "B=2")),
        Said(200, {}),
        Said(401, b"<html>no</html>", {"content-type": "text/html"}),
        Said(200, {}, cookies=("NTNX_IAM_SESSION=two",)),
        Said(200, {}),
    )
    async with scripted(tmp_path, answers) as (script, hosts):
        for _ in range(4):
            await hosts.central.call("GET", VMS, request_id=ID)
    signed = [
        asked.headers.get("cookie") or asked.headers.get("authorization") for asked in script.asked
    ]
    both = "NTNX_IAM_SESSION=one; B=2"
    assert signed == [BASIC, both, both, BASIC, "NTNX_IAM_SESSION=two"]


async def test_a_wrong_password_is_not_sent_often_enough_to_lock_the_account(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    html = Said(401, b"<html>Unauthorized</html>", {"content-type": "text/html"})
    async with scripted(tmp_path, in_turn(html)) as (script, hosts):
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                await hosts.central.call("GET", VMS)
            except PrismAuthError as error:
                outcomes.append(str(error))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
    assert len(script.asked) == REFUSALS_MAX
    assert len(outcomes) == 10
    assert sum("not tried again" in text for text in outcomes) == 10 - REFUSALS_MAX
    assert not any("pass:word" in text or BASIC[6:] in text for text in outcomes)


async def test_a_session_of_the_caller_is_no_matter_of_the_account(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(Said(401))) as (script, hosts):
        element = hosts.at(PE, 9440, name="cluster-a", account=None)
        for _ in range(REFUSALS_MAX + 1):
            with pytest.raises(PrismAuthError):
                await element.call("POST", "/x", {}, session="NTNX_IGW_SESSION=j")
    assert len(script.asked) == REFUSALS_MAX + 1
    assert all(asked.headers["cookie"] == "NTNX_IGW_SESSION=j" for asked in script.asked)
    assert all("authorization" not in asked.headers for asked in script.asked)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (Said(403, v4_error("X", "FORBIDDEN")), PrismPermissionError, "View_Virtual_Machine"),
        (
            Said(403, v4_error("X", "FORBIDDEN", "needs Update_Widget_Internal")),
            PrismPermissionError,
            "lacks the permission Update_Widget_Internal",
        ),
        (Said(404, v4_error("VMM-1", "NOT_FOUND")), PrismNotFoundError, "404"),
        (Said(404, b"<html>", {"content-type": "text/html"}), PrismNotFoundError, "text/html"),
        (Said(412, v4_error("PLAT-10005", "E")), PrismConflictError, "changed meanwhile"),
        (Said(428, v4_error("PLAT-10004", "E")), PrismConflictError, "428"),
        (
            Said(409, {"message_list": [{"message": "Edit conflict: spec_version mismatch"}]}),
            PrismConflictError,
            "spec_version",
        ),
        (Said(409, {"message_list": [{"message": "exists"}]}), PrismRefusedError, "exists"),
        (
            Said(422, {"message_list": [{"message": "m", "reason": "INVALID"}]}),
            PrismRefusedError,
            ": m",
        ),
        (
            Said(
                400,
                {
                    "data": {
                        "error": {
                            "error": "Bad Request",
                            "validationErrorMessages": [{"message": "name is too long"}],
                        }
                    }
                },
            ),
            PrismRefusedError,
            "name is too long",
        ),
        (Said(501), PrismRefusedError, "501"),
        (
            Said(200, b"<html>login</html>", {"content-type": "text/html"}),
            PrismAnswerError,
            "no JSON",
        ),
    ],
)
async def test_errors_by_what_can_be_done(
    tmp_path: Path,
    said: Said,
    error: type[PrismError],
    words: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(said)) as (script, hosts):
        with pytest.raises(error) as caught:
            await hosts.central.call("GET", VMS)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert "Prism prism.example.test:9440: GET /api/vmm" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(script.asked) == 1


async def test_a_secret_that_comes_back_is_not_repeated(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    said = Said(400, v4_error("X", "INVALID", "bad targetSecret Tq8sN2vLx5Rz of pass:word-of-svc"))
    async with scripted(tmp_path, in_turn(said)) as (_, hosts):
        body = {"iscsiFeatures": {"targetSecret": "Tq8sN2vLx5Rz"}}
        with pytest.raises(PrismRefusedError) as caught:
            await hosts.central.call("POST", "/api/volumes/v4.3/config/volume-groups", body)
    assert "Tq8sN2vLx5Rz" not in str(caught.value)
    assert "pass:word-of-svc" not in str(caught.value)
    assert "bad targetSecret" in str(caught.value)


@pytest.mark.parametrize(
    "first",
    [
        Said(cut=True),
        Said(408),
        Said(503, b"<html>"),
        Said(504),
        Said(429, None, {"retry-after": "3"}),
        Said(400, v4_error("X", "RATE_LIMIT_EXCEEDED")),
        Said(500),
    ],
)
async def test_what_may_pass_is_tried_again_under_the_same_id(
    tmp_path: Path, first: Said, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(first, first, Said(202, {}))) as (script, hosts):
        began = trio.current_time()
        answer = await hosts.central.call("POST", VMS, {"a": 1})
        took_s = trio.current_time() - began
    assert answer.status == 202
    ids = {asked.headers["ntnx-request-id"] for asked in script.asked}
    assert len(script.asked) == 3
    assert len(ids) == 1
    assert {asked.raw for asked in script.asked} == {b'{"a":1}'}
    assert 2 <= took_s <= 15
    if "retry-after" in first.headers:
        assert took_s >= 6
    assert hosts.meters.errors["vmm/ahv/config/vms"] == 2
    assert hosts.meters.requests == 3


@pytest.mark.parametrize(
    ("said", "error", "most"),
    [
        (Said(429), PrismRateLimitedError, 31),
        (Said(503), PrismUnreachableError, 31),
        (Said(cut=True), PrismUnreachableError, 31),
        (Said(500), PrismError, 3),
    ],
)
async def test_tries_come_to_an_end(
    tmp_path: Path,
    said: Said,
    error: type[PrismError],
    most: int,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(said)) as (script, hosts):
        began = trio.current_time()
        with pytest.raises(error):
            await hosts.central.call("GET", VMS)
        assert trio.current_time() - began <= Waits().retry_s
    assert 2 < len(script.asked) <= most


async def test_a_wait_beyond_reason_is_not_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(Said(429, None, {"retry-after": "86400"}))) as (
        script,
        hosts,
    ):
        with pytest.raises(PrismRateLimitedError, match="prism_rate_rpm"):
            await hosts.central.call("GET", VMS)
    assert len(script.asked) == 1


async def test_too_many_requests_hold_all_who_ask_the_host(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    times: list[float] = []

    async def handler(asked: Asked) -> Said:
        times.append(trio.current_time())
        busy = len(times) == 1
        return Said(429, None, {"retry-after": "20"}) if busy else Said(200, asked.method)

    async with scripted(tmp_path, handler) as (_, hosts):
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(hosts.central.call, "GET", "/first"))
            await trio.sleep(1)
            nursery.start_soon(partial(hosts.central.call, "GET", "/second"))
    assert [time - began >= 20 for time in times] == [False, True, True]


async def test_what_may_not_be_repeated_is_not(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(Said(cut=True))) as (script, hosts):
        with pytest.raises(PrismUnreachableError):
            await hosts.central.call("POST", VMS, {}, repeat=False)
        assert len(script.asked) == 1
    async with scripted(tmp_path, in_turn(Said(429), Said(200, {}))) as (script, hosts):
        await hosts.central.call("POST", VMS, {}, repeat=False)  # 429: it was not done
        assert len(script.asked) == 2


async def test_a_host_that_is_down_for_a_while(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(Said(200, {}))) as (script, hosts):
        refused = 3

        async def dial(host: str, port: int) -> trio.abc.Stream:
            nonlocal refused
            refused -= 1
            if refused >= 0:
                raise ConnectionRefusedError(111, "Connection refused")
            return await script.dial(host, port)

        flaky = Hosts(settings(tmp_path), dial=dial)
        assert (await flaky.central.call("POST", VMS, {}, repeat=False)).status == 200
        refused = 1
        impatient = Hosts(settings(tmp_path), dial=dial)
        with pytest.raises(PrismUnreachableError, match="Connection refused"):
            await impatient.central.call("GET", VMS, retry_s=0)
        await flaky.aclose()
        await hosts.aclose()


async def test_a_burst_and_then_the_rate(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    async with scripted(tmp_path, in_turn(Said(200, {})), rate_rpm=30) as (_, hosts):
        began = trio.current_time()
        for _ in range(30):
            await hosts.central.call("GET", VMS)
        assert trio.current_time() == began
        for _ in range(10):
            await hosts.central.call("GET", VMS)
        assert trio.current_time() - began == pytest.approx(20, abs=0.1)
        # Another host has a bucket of its own.
        element = hosts.at(PE, 9440, name="a", account=None)
        now = trio.current_time()
        await element.call("GET", "/x")
        assert trio.current_time() == now


async def test_a_file_is_downloaded_with_the_account(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    data = bytes(100_000)
    path = "/api/nutanix/v3/images/x/file"
    async with scripted(tmp_path, in_turn(Said(200, data), Said(403))) as (script, hosts):
        async with hosts.central.download(path) as (length, pieces):
            got = b"".join([piece async for piece in pieces])
        with pytest.raises(PrismPermissionError, match="View_Image"):
            async with hosts.central.download(path):
                pass
    assert length == len(data)
    assert got == data
    assert script.asked[0].headers["authorization"] == BASIC


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    given = settings(tmp_path, element_account=Account("e", "other-word", "a-key"))
    for secret in ("pass:word", "other-word", "a-key"):
        assert secret not in repr(given)


async def test_what_no_header_can_carry_is_refused_without_showing_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    for account in (Account(api_key="k\ny-secret"), Account(user="a:b", password="secret")):
        with pytest.raises(UsageError) as caught:
            Hosts(settings(tmp_path, account=account))
        assert "secret" not in str(caught.value)


async def test_elements_are_found_by_what_prism_says_or_by_hand(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    cluster = Cluster("u-a", "cluster-a", PE, None, "7", True)
    nowhere = Cluster("u-b", "cluster-b", None, None, "7", True)
    other = Account("element", "x")
    hosts = Hosts(settings(tmp_path, element_account=other))
    assert hosts.element(cluster).host == PE
    assert hosts.element(cluster) is hosts.element(cluster)
    with pytest.raises(PrismError, match="cluster-b"):
        hosts.element(nowhere)
    by_hand = Hosts(settings(tmp_path, elements={"cluster-b": "10.0.0.9:9441", "u-a": "10.0.0.8"}))
    assert (by_hand.element(nowhere).host, by_hand.element(nowhere).port) == ("10.0.0.9", 9441)
    assert (by_hand.element(cluster).host, by_hand.element(cluster).port) == ("10.0.0.8", 9440)


def test_addresses() -> None:
    assert split_address("pe1", 9440) == ("pe1", 9440)
    assert split_address("pe1:9", 9440) == ("pe1", 9)
    assert split_address("[fd00::1]:9", 9440) == ("fd00::1", 9)
    assert split_address("fd00::1", 9440) == ("fd00::1", 9440)
    assert PrismSettings(host="x").element_address("u", "n", None) is None
    assert segment("ZXJnb24=:1") == "ZXJnb24%3D%3A1"
