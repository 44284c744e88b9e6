# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which interface is taken: v4 first, by namespace, else v3. In memory."""

from __future__ import annotations

import logging
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from replicator.prism.api import Prism
from replicator.prism.discovery import open_prism
from replicator.prism.errors import PrismAuthError, PrismError, PrismPermissionError
from replicator.prism.meters import Meters
from replicator.prism.types import Capability
from replicator.prism.v4_versions import NEEDED, Versions
from tests.limits import HANG_S
from tests.prism.lab import Asked, Handler, Said, Script, scripted, settings

HTML = Said(404, b"<html>no such page</html>", {"content-type": "text/html"})
V3 = "/api/nutanix/v3/clusters/list"


def speaking(windows: dict[str, tuple[int, int]], *, info: bool = True, v3: bool = True) -> Handler:
    """A Prism with these minors, which tells them or not."""

    async def handler(asked: Asked) -> Said:
        await trio.lowlevel.checkpoint()
        parts = asked.path.split("/")
        if asked.path == V3 and v3:
            return Said(200, {"entities": []})
        low, high = windows.get(parts[2], (1, 0))
        if asked.method == "OPTIONS":
            return Said(200, {"data": f"v4.{high}"}) if info and high >= low else HTML
        minor = parts[3].removeprefix("v4.")
        known = minor.isdigit() and low <= int(minor) <= high
        return Said(200, {"data": []}) if known else HTML

    return handler


def opened(
    tmp_path: Path, script: Script, meters: Meters | None = None, **changes: Any
) -> AbstractAsyncContextManager[Prism]:
    return open_prism(settings(tmp_path, **changes), meters, script.dial)


ALL = dict.fromkeys(NEEDED, (0, 3))


@pytest.mark.parametrize(
    ("windows", "wanted", "capability"),
    [
        (ALL, "auto", Capability.V4),
        (ALL, "v4", Capability.V4),
        (ALL, "v3", Capability.V3),
        ({}, "auto", Capability.V3),
        ({**ALL, "volumes": (1, 0)}, "auto", Capability.V3),
    ],
)
async def test_which_is_taken_and_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    windows: dict[str, tuple[int, int]],
    wanted: Literal["auto", "v3", "v4"],
    capability: Capability,
) -> None:
    caplog.set_level(logging.INFO)
    meters = Meters()
    with trio.fail_after(HANG_S):
        async with (
            scripted(tmp_path, speaking(windows)) as (script, _),
            opened(tmp_path, script, meters, api_version=wanted, cluster="cluster-a") as prism,
        ):
            assert prism.capability is capability
            assert prism.requests == meters.requests == len(script.asked)
    line = f"Prism discovery: PC=prism.example.test cluster=cluster-a capability={capability}"
    assert [r.message for r in caplog.records if r.name.startswith("replicator")] == [line]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("auto", "neither v4 nor v3"), ("v3", "no v3"), ("v4", "prism_api_version")],
)
async def test_a_host_that_is_no_prism(
    tmp_path: Path, wanted: Literal["auto", "v3", "v4"], words: str
) -> None:
    with trio.fail_after(HANG_S):
        async with scripted(tmp_path, speaking({}, v3=False)) as (script, _):
            with pytest.raises(PrismError, match=words):
                async with opened(tmp_path, script, api_version=wanted):
                    pass


async def test_a_wrong_password_is_no_matter_of_versions(tmp_path: Path) -> None:
    async def handler(_: Asked) -> Said:
        await trio.lowlevel.checkpoint()
        return Said(401, b"<html>", {"content-type": "text/html"})

    with trio.fail_after(HANG_S):
        async with scripted(tmp_path, handler) as (script, _):
            with pytest.raises(PrismAuthError):
                async with opened(tmp_path, script):
                    pass
            assert len(script.asked) == 1


async def test_versions_are_told_by_namespace(tmp_path: Path) -> None:
    windows = {**ALL, "vmm": (0, 1), "dataprotection": (0, 9), "prism": (0, 2)}
    with trio.fail_after(HANG_S):
        async with scripted(tmp_path, speaking(windows)) as (script, hosts):
            versions = Versions(hosts.central)
            assert await versions.path("vmm", "ahv/config/vms") == "/api/vmm/v4.1/ahv/config/vms"
            assert await versions.minor("dataprotection") == 4  # the newest that is known here
            assert await versions.minor("prism") == 2
            assert await versions.minor("vmm") == 1
            assert len(script.asked) == 3


async def test_versions_are_found_where_they_are_not_told(tmp_path: Path) -> None:
    """As a Prism Central of the family 7.3 was seen: 4.1, and nothing useful at unversioned/info."""
    windows = dict.fromkeys(NEEDED, (0, 1))
    with trio.fail_after(HANG_S):
        async with scripted(tmp_path, speaking(windows, info=False)) as (script, hosts):
            versions = Versions(hosts.central)
            assert [await versions.minor(name) for name in NEEDED] == [1] * len(NEEDED)
            assert script.count("OPTIONS") == 1
            assert len(script.asked) <= 12  # of a burst of 30


async def test_a_version_that_the_account_may_not_look_at_is_there(tmp_path: Path) -> None:
    error = {"data": {"error": [{"message": "no", "code": "IAM-1", "errorGroup": "FORBIDDEN"}]}}

    async def handler(asked: Asked) -> Said:
        await trio.lowlevel.checkpoint()
        return Said(403, error) if "/v4.2/" in asked.path else HTML

    with trio.fail_after(HANG_S):
        async with scripted(tmp_path, handler) as (_, hosts):
            versions = Versions(hosts.central)
            assert await versions.minor("vmm") == 2
            with pytest.raises(PrismPermissionError):
                await hosts.central.call("GET", await versions.path("vmm", "ahv/config/vms"))


async def test_nobody_needs_to_know_iam(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with scripted(tmp_path, speaking(ALL)) as (_, hosts):
            versions = Versions(hosts.central)
            with pytest.raises(PrismError, match="no v4 of iam"):
                await versions.path("iam", "authn/users")
