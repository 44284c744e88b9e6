# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which minor version of each v4 namespace is spoken: every namespace has its own (nutanix-v4.md, section 1.1)."""

from __future__ import annotations

import re
from typing import Final

import trio

from replicator.prism.endpoint import Endpoint
from replicator.prism.errors import (
    PrismAnswerError,
    PrismError,
    PrismNotFoundError,
    PrismPermissionError,
    PrismRefusedError,
)

#: The newest minor that is known of each namespace, and a cheap list of it.
_KNOWN: Final = {
    "clustermgmt": (3, "config/clusters"),
    "vmm": (3, "ahv/config/vms"),
    "dataprotection": (4, "config/recovery-points"),
    "volumes": (3, "config/volume-groups"),
    "prism": (4, "config/tasks"),
    "networking": (4, "config/subnets"),
    "iam": (0, "authn/users"),
}
#: Without these there is no v4 to work with.
NEEDED: Final = ("clustermgmt", "vmm", "dataprotection", "volumes", "prism")
_VERSION = re.compile(r"v?4\.([0-9]{1,3})(?:\..*)?")
#: How long a probe is tried again: whether there is v4 should be known soon.
_RETRY_S: Final = 20.0


class Versions:
    """The minors of one Prism Central, found when they are first needed, and again after ``forget``."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._minors: dict[str, int | None] = {}
        self._turns = {namespace: trio.Lock() for namespace in _KNOWN}
        self._told = True  # whether Prism answers unversioned/info

    async def minor(self, namespace: str) -> int | None:
        """The minor to use, None where the namespace has no v4. Raises PrismError where nobody answers, or 401."""
        async with self._turns[namespace]:
            if namespace not in self._minors:
                self._minors[namespace] = await self._find(namespace)
            return self._minors[namespace]

    async def path(self, namespace: str, rest: str) -> str:
        """``/api/<namespace>/v4.<minor>/<rest>``. Raises PrismError where the namespace has no v4."""
        minor = await self.minor(namespace)
        if minor is None:
            raise PrismNotFoundError(f"{self._endpoint.where}: no v4 of {namespace}")
        return f"/api/{namespace}/v4.{minor}/{rest}"

    def forget(self, namespace: str) -> None:
        """Look again: Prism may have been upgraded."""
        self._minors.pop(namespace, None)

    async def _find(self, namespace: str) -> int | None:
        newest, cheap = _KNOWN[namespace]
        if self._told:
            told = await self._ask(namespace)
            if told is not None:
                return min(told, newest)
        # A namespace is at most one minor ahead of another: start there, once one is known.
        known = [minor for minor in self._minors.values() if minor is not None]
        first = min(newest, max(known) + 1) if known else newest
        for minor in range(first, -1, -1):
            if await self._exists(f"/api/{namespace}/v4.{minor}/{cheap}"):
                return minor
        return None

    async def _ask(self, namespace: str) -> int | None:
        path = f"/api/{namespace}/unversioned/info"
        try:
            answer = await self._endpoint.call("OPTIONS", path, retry_s=_RETRY_S)
            match = _VERSION.fullmatch(answer.node().text("data"))
        except (PrismNotFoundError, PrismRefusedError, PrismAnswerError, PrismPermissionError):
            match = None
        except PrismError as error:
            if error.status is None or type(error) is not PrismError:
                raise  # nobody there, TLS, the account: not a matter of versions
            match = None
        if match is None:
            self._told = False
            return None
        return int(match[1])

    async def _exists(self, path: str) -> bool:
        try:
            answer = await self._endpoint.call("GET", path, query={"$limit": 1}, retry_s=_RETRY_S)
        except (PrismPermissionError, PrismRefusedError) as error:
            return bool(error.words)
        except (PrismNotFoundError, PrismAnswerError):
            return False
        return isinstance(answer.body, dict)
