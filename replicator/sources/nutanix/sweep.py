# SPDX-License-Identifier: AGPL-3.0-or-later
"""What of this product is on the clusters, why it is there, and what of it must go: nutanix-data-path.md, A6 and B6.

Only what bears this installation's id is ever removed, and of that nothing which the ledger does not prove to be dead, unless
it is old: another process may just have made it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from replicator.prism.api import Prism
from replicator.prism.types import Found, Kind
from replicator.sources.nutanix import names
from replicator.sources.nutanix.ledger import Entry, Ledger
from replicator.sources.nutanix.plan import UNCERTAIN_AGE_US, UNKNOWN_AGE_US
from replicator.sources.nutanix.removal import ORDER, Remover, delete_object

_logger = logging.getLogger(__name__)


class Why(StrEnum):
    """Why an object is on a cluster."""

    REFERENCE = "reference"
    PUSH = "push under way"
    LEFT = "left behind"
    YOUNG = "unknown, too young to be removed"
    VM = "made by a restore"
    OTHERS = "another installation's"


@dataclass(frozen=True, slots=True)
class Owned:
    """An object on a cluster that bears this product's name. ``entry``: what the ledger has of it."""

    kind: Kind
    uuid: str
    name: str
    cluster: str | None
    vm: str | None
    made_at_us: int
    why: Why
    entry: Entry | None = None

    @property
    def is_removed(self) -> bool:
        """Whether a sweep removes it."""
        return self.why is Why.LEFT


def judge(
    found: Iterable[Found],
    entries: Iterable[Entry],
    installation: str,
    live: Mapping[str, Collection[str]],
    now_us: int,
) -> list[Owned]:
    """Why each object is there, in the order of removal. No input or output.

    ``entries``: the ledger's, read after ``found``: what was found was written down before it was made. ``live``: by VM (Prism's
    id), the pushes whose objects are wanted: of the last point, and of a push that is not finished. What bears no name of ours
    is left out.
    """
    by_name = {(entry.kind, entry.name): entry for entry in entries}
    by_uuid = {(entry.kind, entry.uuid): entry for entry in entries if entry.uuid is not None}
    owned = []
    for each in found:
        name = names.ObjectName.parse(each.name)
        if name is None:
            continue
        entry = by_uuid.get((each.kind, each.uuid)) or by_name.get((each.kind, each.name))
        made_at_us = each.created_at_us or name.made_at_us
        why = Why.OTHERS
        if name.installation == installation:
            why = _why(each, entry, live, now_us - made_at_us)
        vm = entry.vm if entry is not None else each.vm
        cluster = each.cluster or (entry.cluster if entry is not None else None)
        owned.append(Owned(each.kind, each.uuid, each.name, cluster, vm, made_at_us, why, entry))
    places = {kind: place for place, kind in enumerate(ORDER)}
    return sorted(owned, key=lambda each: (places.get(each.kind, len(ORDER)), each.name, each.uuid))


def _why(
    found: Found, entry: Entry | None, live: Mapping[str, Collection[str]], age_us: int
) -> Why:
    if found.kind is Kind.VM:
        return Why.VM
    if entry is None:
        return Why.LEFT if age_us >= UNKNOWN_AGE_US else Why.YOUNG
    if entry.uuid is not None and entry.uuid != found.uuid:
        return Why.LEFT  # made a second time under the same name; the other one is known
    if entry.push_id not in live.get(entry.vm, ()):
        return Why.LEFT
    return Why.REFERENCE if entry.reference else Why.PUSH


async def sweep_clusters(
    prism: Prism, ledger: Ledger, live: Mapping[str, Collection[str]], now_us: int
) -> list[str]:
    """Remove whatever no point and no push needs; returns the names of what was removed. Raises PrismError.

    ``live`` as for ``judge``. Entries of the ledger that name nothing any more are struck out.
    """
    remover = Remover(prism, ledger)
    found = await remover.find_ours()
    entries = await ledger.entries()
    removed = []
    for each in judge(found, entries, ledger.installation, live, now_us):
        if each.is_removed:
            await delete_object(prism, each.kind, each.uuid, each.cluster or "")
            _logger.info(
                "removed %s %s (%s): no point and no push needs it", each.kind, each.name, each.uuid
            )
            removed.append(each.name)
    there = {(each.kind, each.name) for each in found}
    for entry in entries:
        if entry.push_id in live.get(entry.vm, ()) or entry.kind not in ORDER:
            continue
        known = (entry.kind, entry.name) in there
        if entry.uuid is not None and not known:
            await delete_object(
                prism, entry.kind, entry.uuid, entry.cluster
            )  # a list may lag behind
            known = True
        if known or now_us - entry.intended_at_us >= UNCERTAIN_AGE_US:
            await ledger.settle(entry)
    return removed


__all__ = ["Owned", "Why", "judge", "sweep_clusters"]
