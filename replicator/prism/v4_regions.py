# SPDX-License-Identifier: AGPL-3.0-or-later
"""Changed regions by v4: Prism Central says where and gives a token, the cluster's Element computes (nutanix-v4.md, 6.4)."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
import trio

from replicator.disk import Extent
from replicator.prism.answers import Node
from replicator.prism.endpoint import Answer, Endpoint, segment
from replicator.prism.errors import (
    PrismAnswerError,
    PrismAuthError,
    PrismError,
    PrismNotFoundError,
    PrismRefusedError,
    RegionsLostError,
)
from replicator.prism.region_pages import RegionPages
from replicator.prism.types import Cluster, DiskSnapshot, RegionPage, VmSnapshot
from replicator.prism.v4_calls import V4Calls
from replicator.prism.v4_read import read_address, typed

BLOCK: Final = 65536
#: A token lives for about 15 minutes.
_TOKEN_S: Final = 720.0
_TOKEN_MAX: Final = 16384
_PAGES_MAX: Final = 1_000_000
_REGIONS_MAX: Final = 1_000_000
_GAPS_S: Final = (1.0, 2.0, 4.0, 8.0)
_SCOPE: Final = re.compile(r"/api/dataprotection/v(4\.[0-9]{1,3}(?:\.[a-z][0-9]{1,2})?)/content")
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+")

_T = TypeVar("_T")
Since = tuple[VmSnapshot, DiskSnapshot] | None


@dataclass(frozen=True, slots=True)
class _Pass:
    """Where regions are computed, and by what right."""

    element: Endpoint
    version: str
    session: str
    until: float


@dataclass(frozen=True, slots=True)
class _Page:
    regions: list[Extent]
    next_offset: int | None
    file_size: int


class Regions:
    """The part of PrismV4 for changed regions. ``cluster``: finds a cluster by id; ``is_gone``: whether a recovery point is."""

    def __init__(
        self,
        calls: V4Calls,
        cluster: Callable[[str], Awaitable[Cluster | None]],
        is_gone: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._calls = calls
        self._cluster = cluster
        self._is_gone = is_gone

    async def pages(
        self, snapshot: VmSnapshot, disk: DiskSnapshot, since: Since
    ) -> AsyncGenerator[RegionPage, None]:
        """As ``Prism.regions``."""
        reading = RegionPages(
            f"changed regions of disk {disk.disk}", None if since is None else since[1].size
        )
        right = await self._settled(lambda: self._discover(snapshot, disk, since), disk, since)
        for _ in range(_PAGES_MAX):
            if trio.current_time() >= right.until:
                right = await self._settled(
                    lambda: self._discover(snapshot, disk, since), disk, since
                )
            try:
                answer = await self._compute(right, snapshot, disk, since, reading.offset)
            except PrismAuthError:
                # The token ended early, or was made for another version of the path: once more with a new one.
                right = await self._settled(
                    lambda: self._discover(snapshot, disk, since), disk, since
                )
                answer = await self._compute(right, snapshot, disk, since, reading.offset)
            page = _read_page(answer)
            extents = reading.take(page.regions, page.next_offset, page.file_size)
            if extents or reading.done:
                yield RegionPage(reading.file_size, tuple(extents))
            if reading.done:
                return
        raise PrismAnswerError(f"{right.element.where}: changed regions have no end")

    async def _compute(
        self, right: _Pass, snapshot: VmSnapshot, disk: DiskSnapshot, since: Since, offset: int
    ) -> Answer:
        path = (
            f"/api/dataprotection/v{right.version}/content/recovery-points/{segment(snapshot.uuid)}"
            f"/vm-recovery-points/{segment(disk.part)}/disk-recovery-points/{segment(disk.handle)}"
            "/$actions/compute-changed-regions"
        )
        body: dict[str, Any] = {"offset": offset, "blockSizeByte": BLOCK}
        if since is not None:
            body["referenceRecoveryPointExtId"] = since[0].uuid
            body["referenceVmRecoveryPointExtId"] = since[1].part
            body["referenceDiskRecoveryPointExtId"] = since[1].handle
        return await self._settled(
            lambda: right.element.call("POST", path, body, session=right.session), disk, since
        )

    async def _settled(
        self, ask: Callable[[], Awaitable[_T]], disk: DiskSnapshot, since: Since
    ) -> _T:
        """What ``ask`` returns, asked again while a new recovery point is not known everywhere.

        Raises RegionsLostError where Prism says that it cannot be had.
        """
        reference = "" if since is None else f" against recovery point {since[0].uuid}"
        lost = f"changed regions of disk {disk.disk}{reference} cannot be had"
        deadline = trio.current_time() + self._calls.waits.settle_s
        for gap_s in itertools.chain(_GAPS_S, itertools.repeat(_GAPS_S[-1])):
            try:
                return await ask()
            except PrismNotFoundError as error:
                if gap_s == _GAPS_S[0] and since is not None and await self._is_gone(since[0].uuid):
                    raise RegionsLostError(f"{lost}: that recovery point is gone") from None
                if trio.current_time() + gap_s > deadline:
                    raise RegionsLostError(f"{lost}: {error}") from None
                await trio.sleep(gap_s)
            except PrismRefusedError as error:
                raise RegionsLostError(f"{lost}: {error}") from None
            except PrismError as error:
                if type(error) is PrismError and error.status is not None:
                    raise RegionsLostError(f"{lost}: {error}") from None
                raise
        raise AssertionError

    async def _discover(self, snapshot: VmSnapshot, disk: DiskSnapshot, since: Since) -> _Pass:
        spec = typed(
            "dataprotection.v4.content.ComputeChangedRegionsClusterDiscoverSpec",
            diskRecoveryPoint=_reference(snapshot, disk),
        )
        if since is not None:
            spec["referenceDiskRecoveryPoint"] = _reference(*since)
        answer = await self._calls.call(
            "dataprotection",
            "POST",
            f"config/recovery-points/{segment(snapshot.uuid)}/$actions/discover-cluster",
            typed(
                "dataprotection.v4.content.ClusterDiscoverSpec",
                operation="COMPUTE_CHANGED_REGIONS",
                spec=spec,
            ),
        )
        data = answer.node().node("data")
        token = data.raw.get("jwtToken")
        if not isinstance(token, str) or len(token) > _TOKEN_MAX or not _TOKEN.fullmatch(token):
            raise data.error("jwtToken", "a token")
        cluster = await self._cluster(snapshot.cluster)
        name = snapshot.cluster if cluster is None else cluster.name
        told = read_address(data.maybe("clusterIp"))
        address = self._calls.hosts.settings.element_address(snapshot.cluster, name, told)
        if address is None:
            raise data.error("clusterIp", "an address")
        version = _scope_version(token, answer)
        if version is None:
            version = f"4.{await self._calls.versions.minor('dataprotection') or 0}"
        return _Pass(
            element=self._calls.hosts.at(*address, name=name, account=None),
            version=version,
            session=f"NTNX_IGW_SESSION={token}",
            until=trio.current_time() + _TOKEN_S,
        )


def _reference(snapshot: VmSnapshot, disk: DiskSnapshot) -> dict[str, Any]:
    return typed(
        "dataprotection.v4.content.VmDiskRecoveryPointReference",
        recoveryPointExtId=snapshot.uuid,
        vmRecoveryPointExtId=disk.part,
        diskRecoveryPointExtId=disk.handle,
    )


def _read_page(answer: Answer) -> _Page:
    root = answer.node()
    items = root.nodes("data")
    if len(items) > _REGIONS_MAX:
        raise root.error("data", f"at most {_REGIONS_MAX} regions")
    regions = []
    for item in items:
        length = item.number("length")
        kind = item.text("regionType")
        if kind not in {"REGULAR", "ZEROED"}:
            raise item.error("regionType", "REGULAR or ZEROED")
        if length:
            regions.append(Extent(item.number("offset"), length, zero=kind == "ZEROED"))
    extra = {pair.text("name", ""): pair for pair in root.node("metadata").nodes("extraInfo")}
    size, following = extra.get("fileSize"), extra.get("nextOffset")
    if size is None:
        raise root.error("metadata.extraInfo", "a fileSize")
    has_next = following is not None and following.has("value")
    return _Page(
        regions=regions,
        next_offset=following.number("value") if has_next and following is not None else None,
        file_size=size.number("value"),
    )


def _scope_version(token: str, answer: Answer) -> str | None:
    """The version that the token is good for: it is not that of Prism Central's own paths."""
    parts = token.split(".")
    if len(parts) == 3:
        with suppress(binascii.Error, ValueError, msgspec.DecodeError, RecursionError):
            payload = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
            match = _SCOPE.search(" ".join(_texts(msgspec.json.decode(payload))))
            if match is not None:
                return match[1]
    metadata: Node | None = answer.node().maybe("metadata")
    for link in metadata.nodes("links") if metadata is not None else []:
        match = _SCOPE.search(link.text("href", ""))
        if match is not None:
            return match[1]
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
