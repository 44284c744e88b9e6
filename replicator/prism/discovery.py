# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which interface a Prism speaks, and a client of it."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from replicator.prism.api import RestorePrism
from replicator.prism.connection import Dial
from replicator.prism.endpoint import Hosts
from replicator.prism.errors import PrismError, PrismNotFoundError, PrismPermissionError
from replicator.prism.meters import Meters
from replicator.prism.settings import PrismSettings
from replicator.prism.types import Capability
from replicator.prism.v4_versions import NEEDED, Versions

_logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_prism(
    settings: PrismSettings,
    meters: Meters | None = None,
    dial: Dial = trio.open_tcp_stream,
) -> AsyncGenerator[RestorePrism, None]:
    """A client of the Prism at ``settings.host``, closed at the end; ``auto`` takes v4 where it is, else v3.

    Says in the log what was settled. Raises PrismError where nobody answers, or speaks neither; cancelled, nothing is left.
    """
    hosts = Hosts(settings, meters, dial)
    try:
        prism = await _discover(hosts)
        _logger.info(
            "Prism discovery: PC=%s cluster=%s capability=%s",
            settings.host,
            settings.cluster or "(all)",
            prism.capability,
        )
        try:
            yield prism
        finally:
            await prism.aclose()
    finally:
        await hosts.aclose()


async def _discover(hosts: Hosts) -> RestorePrism:
    versions = Versions(hosts.central)
    wanted = hosts.settings.api_version
    if wanted == "v3" or (wanted == "auto" and not await _has_v4(versions)):
        await _check_v3(hosts, wanted)
        return _client(hosts, Capability.V3, versions)
    if wanted == "v4" and not await _has_v4(versions):
        raise PrismError(
            f"{hosts.central.where}: it does not speak v4: set prism_api_version to auto or v3"
        )
    return _client(hosts, Capability.V4, versions)


async def _has_v4(versions: Versions) -> bool:
    """Whether all that is needed is there: an older Prism has v4 in parts, and a Prism Element has none of it."""
    for namespace in NEEDED:
        if await versions.minor(namespace) is None:
            return False
    return True


async def _check_v3(hosts: Hosts, wanted: str) -> None:
    try:
        try:
            await _list_v3(hosts, "cluster")
        except PrismNotFoundError:
            await _list_v3(hosts, "vm")  # an Element lists no clusters
    except PrismPermissionError:
        return  # it is there
    except PrismNotFoundError as error:
        spoken = "neither v4 nor v3" if wanted == "auto" else "no v3"
        raise PrismError(
            f"{hosts.central.where}: it speaks {spoken} (is this Prism? check prism_central and prism_port): {error}"
        ) from None


async def _list_v3(hosts: Hosts, kind: str) -> None:
    path = f"/api/nutanix/v3/{kind}s/list"
    await hosts.central.call("POST", path, {"kind": kind, "length": 1})


def _client(hosts: Hosts, capability: Capability, versions: Versions) -> RestorePrism:
    # Each client is loaded only where it is used: a start should not wait for the other one.
    if capability is Capability.V4:
        from replicator.prism.v4 import PrismV4  # noqa: PLC0415

        return PrismV4(hosts, versions)
    from replicator.prism.v3 import PrismV3  # noqa: PLC0415

    return PrismV3(hosts)
