# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changed regions by v4: against the simulator's real bytes, and pages that break their promises."""

from __future__ import annotations

import base64
import itertools
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from replicator.disk import Extent
from replicator.prism import v4_regions
from replicator.prism.errors import (
    PrismAnswerError,
    PrismAuthError,
    PrismPermissionError,
    PrismUnreachableError,
    RegionsLostError,
)
from replicator.prism.region_pages import RegionPages
from replicator.prism.types import Consistency, VmSnapshot
from tests.limits import HANG_S
from tests.prism.lab import Asked, Said
from tests.prism.sim import APP, CLUSTER_A, PE_A, QUICK, Lab, once, simulated, v4_error
from tests.simulator_v4.lab import MIB

COMPUTE = "compute-changed-regions"
LATER_US = 4_000_000_000_000_000
KIB64 = 65536


async def taken(lab: Lab, name: str) -> VmSnapshot:
    vm = await lab.prism.vm(APP)
    return await lab.prism.create_snapshot(vm, name, Consistency.CRASH, LATER_US, uuid4())


async def regions(
    lab: Lab, new: VmSnapshot, old: VmSnapshot | None = None, disk: int = 0
) -> list[Extent]:
    since = None if old is None else (old, old.disks[disk])
    found: list[Extent] = []
    async with aclosing(lab.prism.regions(new, new.disks[disk], since)) as pages:
        async for page in pages:
            found.extend(page.regions)
    assert all(a.end <= b.offset for a, b in itertools.pairwise(found))
    return found


async def test_what_was_ever_written(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab, "one")
            found = await regions(lab, snapshot)
            assert [one for one in found if not one.zero] == [Extent(MIB, KIB64)]
            (computed,) = [a for a in lab.script.asked if COMPUTE in a.path]
            assert computed.host == PE_A
            assert computed.headers["cookie"].startswith("NTNX_IGW_SESSION=")
            assert computed.target.startswith(
                "/api/dataprotection/v4.0/content/"
            )  # not Central's 4.4


@pytest.mark.parametrize("page", [1, 2, 1000])
async def test_what_changed_in_pages_of_any_size(tmp_path: Path, page: int) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            lab.core.knobs["regions_page"] = page
            old = await taken(lab, "one")
            guest = lab.guest(0)
            await guest.write(0, b"x")
            await guest.write(2 * MIB + 5, b"y" * KIB64)
            await guest.zero(MIB, KIB64)
            await guest.write(4 * MIB - 1, b"z")
            new = await taken(lab, "two")
            found = await regions(lab, new, old)
            assert found == [
                Extent(0, KIB64),
                Extent(MIB, KIB64, zero=True),
                Extent(2 * MIB, 2 * KIB64),
                Extent(4 * MIB - KIB64, KIB64),
            ]
            assert await regions(lab, new, new) == []
            assert await regions(lab, new, old, disk=1) == []


async def test_what_grew_is_changed(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            old = await taken(lab, "one")
            await lab.guest(0).grow(MIB)
            new = await taken(lab, "two")
            found = await regions(lab, new, old)
            assert sum(one.length for one in found) == MIB
            assert found[0].offset == 4 * MIB


async def test_a_reference_that_is_gone_is_told_at_once(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            old, new = await taken(lab, "one"), await taken(lab, "two")
            await lab.prism.delete_snapshot(old.uuid, CLUSTER_A)
            with pytest.raises(RegionsLostError, match="is gone") as caught:
                await regions(lab, new, old)
            assert old.uuid in str(caught.value)
            assert new.disks[0].disk in str(caught.value)
            assert lab.script.count("discover-cluster") == 1


async def test_a_reference_that_is_refused(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            old, new = await taken(lab, "one"), await taken(lab, "two")
            lab.core.faults.add("reference-invalid", count=None)
            with pytest.raises(RegionsLostError, match="cannot be had"):
                await regions(lab, new, old)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RegionsLostError),
        (501, RegionsLostError),
        (500, RegionsLostError),
        (403, PrismPermissionError),
        (401, PrismAuthError),
        (503, PrismUnreachableError),
    ],
)
async def test_what_an_element_may_say_instead(
    tmp_path: Path, status: int, error: type[Exception]
) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path, waits=replace(QUICK, retry_s=3.0)) as lab:
            snapshot = await taken(lab, "one")
            lab.between = once(COMPUTE, Said(status, v4_error("DP-1", "ERROR")), times=100)
            with pytest.raises(error):
                await regions(lab, snapshot)


async def test_a_new_snapshot_may_be_unknown_to_its_element_for_a_while(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            old, new = await taken(lab, "one"), await taken(lab, "two")
            lab.core.faults.add("regions-not-found")
            assert await regions(lab, new, old) == []
            assert lab.script.count(COMPUTE) == 2


async def test_a_token_that_ends_early_is_renewed_once(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab, "one")
            lab.between = once(COMPUTE, Said(401))
            assert await regions(lab, snapshot)
            assert lab.script.count("discover-cluster") == 2
            assert lab.script.count(COMPUTE) == 2


async def test_a_token_is_renewed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v4_regions, "_TOKEN_S", 0.0)
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            lab.core.knobs["regions_page"] = 1
            snapshot = await taken(lab, "one")
            assert await regions(lab, snapshot)
            assert lab.script.count("discover-cluster") == lab.script.count(COMPUTE) + 1 > 2


async def test_an_address_by_hand_wins(tmp_path: Path) -> None:
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path, elements={"cluster-a": "pe.example.test"}) as lab:
            snapshot = await taken(lab, "one")
            lab.names["pe.example.test"] = CLUSTER_A
            assert await regions(lab, snapshot)
            assert [a.host for a in lab.script.asked if COMPUTE in a.path] == ["pe.example.test"]


@pytest.mark.parametrize(
    ("extra", "data", "words"),
    [
        ([], [], "fileSize"),
        ([("fileSize", -1)], [], "a number"),
        ([("fileSize", "many")], [], "a number"),
        ([("fileSize", 1 << 22), ("nextOffset", 100)], [], "is to begin at 100"),
        ([("fileSize", 1 << 22)], [{"offset": 0, "length": 5, "regionType": "ODD"}], "REGULAR"),
        ([("fileSize", 1 << 22)], [{"offset": 0, "length": -5, "regionType": "ZEROED"}], "length"),
        ([("fileSize", 1 << 22)], [{"length": 5, "regionType": "ZEROED"}], "offset"),
        (
            [("fileSize", 1 << 22)],
            [{"offset": 1 << 40, "length": 5, "regionType": "ZEROED"}],
            "outside",
        ),
        ([("fileSize", 1 << 22)], ["x"], "an object"),
    ],
)
async def test_answers_that_make_no_sense(
    tmp_path: Path, extra: list[tuple[str, Any]], data: list[Any], words: str
) -> None:
    body = {
        "data": data,
        "metadata": {"extraInfo": [{"name": name, "value": value} for name, value in extra]},
    }
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab, "one")
            lab.between = once(COMPUTE, Said(200, body))
            with pytest.raises(PrismAnswerError, match=words):
                await regions(lab, snapshot)


def token(payload: Any) -> str:
    text = base64.urlsafe_b64encode(msgspec.json.encode(payload)).decode().rstrip("=")
    return f"h.{text}.s"


@pytest.mark.parametrize(
    ("given", "link", "path"),
    [
        (token({"scope": "/api/dataprotection/v4.1/content"}), "", "/v4.1/"),
        (token({"a": {"b": ["x", "/api/dataprotection/v4.2/content"]}}), "", "/v4.2/"),
        ("opaque", "https://pe:9440/api/dataprotection/v4.3/content/recovery-points/x", "/v4.3/"),
        (token("no object"), "", "/v4.4/"),
    ],
)
async def test_the_version_of_the_path_is_the_tokens(
    tmp_path: Path, given: str, link: str, path: str
) -> None:
    body = {
        "data": {"clusterIp": {"ipv4": {"value": PE_A}}, "jwtToken": given},
        "metadata": {"links": [{"rel": "redirect", "href": link}]},
    }
    page = {"data": [], "metadata": {"extraInfo": [{"name": "fileSize", "value": "4194304"}]}}
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab, "one")

            async def between(asked: Asked) -> Said | None:
                await trio.lowlevel.checkpoint()
                if "discover-cluster" in asked.path:
                    return Said(200, body)
                return Said(200, page) if COMPUTE in asked.path else None

            lab.between = between
            assert await regions(lab, snapshot) == []
            (computed,) = [a for a in lab.script.asked if COMPUTE in a.path]
            assert path in computed.path
            assert computed.headers["cookie"] == f"NTNX_IGW_SESSION={given}"


@pytest.mark.parametrize("bad", ["", "a b", "x\r\nHost: y", "é", 7, None, "a" * 20_000])
async def test_a_token_that_no_header_could_carry(tmp_path: Path, bad: Any) -> None:
    body = {"data": {"clusterIp": {"ipv4": {"value": PE_A}}, "jwtToken": bad}}
    with trio.fail_after(HANG_S):
        async with simulated(tmp_path) as lab:
            snapshot = await taken(lab, "one")
            lab.between = once("discover-cluster", Said(200, body))
            with pytest.raises(PrismAnswerError, match="jwtToken"):
                await regions(lab, snapshot)


SIZE = 64 * KIB64


@given(
    marks=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8), st.booleans()), max_size=12),
    cuts=st.sets(st.integers(1, 63), max_size=5),
    old=st.sampled_from([None, SIZE, SIZE // 2 + 5]),
)
def test_pages_say_the_same_wherever_they_are_cut(
    marks: list[tuple[int, int, bool]], cuts: set[int], old: int | None
) -> None:
    """Each block of the disk is data, zero or unchanged as the regions say, data first; what grew is never unchanged."""
    extents = [Extent(at * KIB64, length * KIB64, zero) for at, length, zero in marks]
    pages = RegionPages("x", old)
    found: list[Extent] = []
    edges = [cut * KIB64 for cut in sorted(cuts)] + [None]
    start = 0
    for edge in edges:
        inside = [e for e in extents if e.end > start and e.offset < (edge or SIZE)]
        found.extend(pages.take(inside, edge, SIZE))
        start = edge or SIZE
    assert pages.done
    assert all(a.end <= b.offset for a, b in itertools.pairwise(found))
    for position in range(0, SIZE, KIB64 // 2):
        said = {e.zero for e in extents if e.offset <= position < e.end}
        told = [e.zero for e in found if e.offset <= position < e.end]
        if said:
            assert told == [said == {True}]
        elif old is not None and position >= old:
            assert told == [False]
