# SPDX-License-Identifier: AGPL-3.0-or-later
"""Removes what the ledger holds from its cluster, in the order of nutanix-data-path.md A6, and strikes it out when it is gone.

Every step can be repeated, and what fails stays in the ledger. So does what the other of Prism's interfaces made: this one
would say that it is not there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

import msgspec

from replicator.prism.api import Prism
from replicator.prism.types import Found, Kind
from replicator.sources.nutanix import names
from replicator.sources.nutanix.ledger import Entry, Ledger
from replicator.sources.nutanix.plan import UNCERTAIN_AGE_US

_logger = logging.getLogger(__name__)

#: What is cloned from another goes first. VMs are made by restores, and removed by them.
ORDER: Final = (Kind.VOLUME_GROUP, Kind.IMAGE, Kind.SNAPSHOT)


async def delete_object(prism: Prism, kind: Kind, uuid: str, cluster: str) -> None:
    """Delete an object, detaching whoever is attached to it; fine where it is gone. Raises PrismError."""
    match kind:
        case Kind.VOLUME_GROUP:
            await prism.delete_volume_group(uuid)
        case Kind.IMAGE:
            await prism.delete_image(uuid)
        case Kind.SNAPSHOT:
            await prism.delete_snapshot(uuid, cluster)
        case Kind.VM:
            raise AssertionError("VMs are not removed here")


def in_removal_order(entries: Iterable[Entry]) -> list[Entry]:
    """Entries as they must go; VMs are not among them."""
    kept = [entry for entry in entries if entry.kind in ORDER]
    return sorted(
        kept, key=lambda entry: (ORDER.index(entry.kind), entry.intended_at_us, entry.name)
    )


def made_as(entry: Entry, found: Iterable[Found]) -> list[str]:
    """The ids of what bears an entry's name: none if it was never made, several if it was made after all."""
    return [each.uuid for each in found if (each.kind, each.name) == (entry.kind, entry.name)]


class Remover:
    """Removal on the clusters behind one Prism."""

    def __init__(self, prism: Prism, ledger: Ledger) -> None:
        self._prism = prism
        self._ledger = ledger

    async def find_ours(self) -> Sequence[Found]:
        """Everything on the clusters whose name is of this installation, to the letter."""
        found = await self._prism.find(names.prefix(self._ledger.installation))
        return [each for each in found if names.ObjectName.parse(each.name) is not None]

    async def remove(
        self,
        entries: Iterable[Entry],
        now_us: int,
        *,
        why: str,
        found: Sequence[Found] | None = None,
    ) -> list[str]:
        """Remove these, in order; returns the names of what was removed from a cluster. Raises PrismError at the first failure.

        ``found``: what is there now; asked for where it is not given and an entry has no id. An entry without an id that is
        not there stays, as dropped, until nothing can come of it any more. One that is out of reach stays until it has expired.
        """
        removed: list[str] = []
        for entry in in_removal_order(entries):
            if entry.is_out_of_reach(self._prism.capability):
                await self.put_off(entry, now_us)
                continue
            if entry.uuid is not None:
                uuids = [entry.uuid]
            else:
                if found is None:
                    found = await self.find_ours()
                uuids = made_as(entry, found)
            for uuid in uuids:
                await delete_object(self._prism, entry.kind, uuid, entry.cluster)
            if uuids:
                _logger.info("removed %s %s (%s): %s", entry.kind, entry.name, uuids[0], why)
                removed.append(entry.name)
            elif now_us - entry.intended_at_us < UNCERTAIN_AGE_US:
                await self._drop(entry)
                continue
            await self._ledger.settle(entry)
        return removed

    async def put_off(self, entry: Entry, now_us: int) -> None:
        """Keep an entry that is out of reach, as dropped, until it has expired. A warning, once in a process."""
        if entry.has_expired(now_us):
            _logger.info("%s %s has expired on its cluster", entry.kind, entry.name)
            await self._ledger.settle(entry)
            return
        await self._drop(entry)
        if entry.name in self._ledger.told:
            return
        self._ledger.told.add(entry.name)
        _logger.warning(
            "snapshot %s stays on cluster %s: it was made through %s, and Prism is spoken to by %s now. It is removed when"
            " prism_api_version speaks %s again%s",
            entry.name,
            entry.cluster,
            entry.capability,
            self._prism.capability,
            entry.capability,
            f", and expires by itself on {_instant(entry.expires_at_us)}"
            if entry.expires_at_us
            else "",
        )

    async def _drop(self, entry: Entry) -> None:
        if not entry.dropped:
            await self._ledger.write(msgspec.structs.replace(entry, dropped=True))

    async def remove_strays(self, strays: Iterable[Found]) -> list[str]:
        """Remove objects that are in no ledger; returns their names. Raises PrismError at the first failure."""
        removed = []
        for each in strays:
            await delete_object(self._prism, each.kind, each.uuid, each.cluster or "")
            _logger.info(
                "removed %s %s (%s): nothing here knows it", each.kind, each.name, each.uuid
            )
            removed.append(each.name)
        return removed


def _instant(at_us: int) -> str:
    return datetime.fromtimestamp(at_us // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


__all__ = ["ORDER", "Remover", "delete_object", "in_removal_order", "made_as"]
