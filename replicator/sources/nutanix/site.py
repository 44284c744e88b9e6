# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the VMs behind one Prism share in a process: the client, the ledger, data services addresses, and the tasks that hold
disks readable.
"""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Final

import trio

from replicator.iscsi import Portal
from replicator.nursery import flat_nursery
from replicator.prism.api import Prism
from replicator.prism.errors import NoDataServicesError
from replicator.prism.types import Secrets
from replicator.sources.nutanix.ledger import JournalStore, Ledger
from replicator.sources.nutanix.settings import NutanixSettings

#: Prism takes 12 to 16 (nutanix-v4.md, 7).
_SECRET_CHARACTERS: Final = 16
_ALPHABET: Final = string.ascii_letters + string.digits


def now_us() -> int:
    """The wall clock, in microseconds since the epoch."""
    return time.time_ns() // 1000


def make_secrets(chap: str) -> Secrets | None:
    """New secrets; ``chap`` is mutual, one-way or none. The same for all volume groups of a process: an initiator has one secret
    on a cluster, however many groups it is attached to, and a second one would take the place of the first.
    """
    if chap == "none":
        return None
    target = _secret()
    client = _secret() if chap == "mutual" else None
    return Secrets(target, client)


def _secret() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_CHARACTERS))


class NutanixSite:
    """Made by ``open_site``; sources of its VMs are made over it.

    ``chap``: what both sides of a login prove; nowhere but in memory, so that a later process makes groups of its own.
    ``attach_failures``: how often a disk could not be made readable over iSCSI since this process began.
    """

    def __init__(
        self,
        prism: Prism,
        ledger: Ledger,
        settings: NutanixSettings,
        nursery: trio.Nursery,
        clock: Callable[[], int],
    ) -> None:
        self.prism = prism
        self.ledger = ledger
        self.settings = settings
        self.nursery = nursery
        self.clock = clock
        self.chap = make_secrets(settings.chap)
        self.attach_failures = 0
        #: Names of what open snapshots of this process hold.
        self.in_use: set[str] = set()
        #: Whether what no ledger knows was looked for in this process.
        self.looked_around = False
        self._portals: dict[str, Portal] = {}

    async def portal(self, cluster: str) -> Portal:
        """Where the cluster's iSCSI targets are found. Raises NoDataServicesError, and what else Prism may."""
        if self.settings.data_services is not None:
            return self.settings.data_services
        if cluster not in self._portals:
            for each in await self.prism.clusters():
                if each.data_services:
                    self._portals[each.uuid] = Portal.parse(each.data_services)
                elif each.uuid == cluster:
                    raise NoDataServicesError(
                        f"cluster {each.name} has no data services address, and {self.settings.initiator} needs one to read"
                        " disks over iSCSI: set it in Prism (Cluster Details), or give dsip"
                    )
        if cluster not in self._portals:
            raise NoDataServicesError(
                f"Prism does not list cluster {cluster}, so its data services address is not known: give dsip"
            )
        return self._portals[cluster]


@asynccontextmanager
async def open_site(
    prism: Prism,
    store: JournalStore,
    settings: NutanixSettings,
    *,
    clock: Callable[[], int] = now_us,
) -> AsyncGenerator[NutanixSite, None]:
    """A site over ``prism``, with the ledger in ``store`` (an ``EventLog``).

    At the end, cancelled or not, every disk that is still readable is taken down first, each within ``cleanup_s``; what cannot
    be is in the ledger. Raises StateError for a journal that cannot be read.
    """
    ledger = await Ledger.open(store)
    async with flat_nursery() as nursery:
        site = NutanixSite(prism, ledger, settings, nursery, clock)
        try:
            yield site
        finally:
            nursery.cancel_scope.cancel()


__all__ = ["NutanixSite", "make_secrets", "now_us", "open_site"]
