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
from typing import Final

from replicator.prism.api import Prism
from replicator.prism.errors import PrismNotFoundError
from replicator.prism.types import Capability, Found, Kind
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
    JOB = "of a Bacula job that is under way, or removed by its next one"
    OTHERS = "another installation's"
    VM_GONE = "reference of a VM that is not there any more"
    BY_V3 = "made through v3, and Prism is spoken to by v4 now"
    BY_V4 = "made through v4, and Prism is spoken to by v3 now"


_OUT_OF_REACH: Final[Mapping[Capability, Why]] = {
    Capability.V3: Why.BY_V3,
    Capability.V4: Why.BY_V4,
}


@dataclass(frozen=True, slots=True)
class Owned:
    """An object on a cluster that bears this product's name. ``entry``: what the ledger has of it.

    ``uuid`` is empty for what is out of reach, and of which Prism never said that it is made.
    """

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
        return self.why in {Why.LEFT, Why.VM_GONE}


def judge(
    found: Iterable[Found],
    entries: Iterable[Entry],
    installation: str,
    live: Mapping[str, Collection[str]],
    now_us: int,
    *,
    spoken: Capability,
    gone: Collection[str] = (),
) -> list[Owned]:
    """Why each object is there, in the order of removal. No input or output.

    ``entries``: the ledger's, read after ``found``: what was found was written down before it was made. ``live``: by VM (Prism's
    id), the pushes whose objects are wanted: of the last point, and of a push that is not finished. ``spoken``: the interface
    that ``found`` came through; snapshots of the other one are told from the ledger. ``gone``: VMs that are not there any more.
    What bears no name of ours is left out.
    """
    entries = list(entries)
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
            why = _why(each, entry, live, now_us - made_at_us, gone)
        vm = entry.vm if entry is not None else each.vm
        cluster = each.cluster or (entry.cluster if entry is not None else None)
        owned.append(Owned(each.kind, each.uuid, each.name, cluster, vm, made_at_us, why, entry))
    seen = {(each.kind, each.name) for each in owned}
    owned += [
        _hidden(entry)
        for entry in entries
        if entry.is_out_of_reach(spoken)
        and not entry.has_expired(now_us)
        and (entry.kind, entry.name) not in seen
    ]
    places = {kind: place for place, kind in enumerate(ORDER)}
    return sorted(owned, key=lambda each: (places.get(each.kind, len(ORDER)), each.name, each.uuid))


def _hidden(entry: Entry) -> Owned:
    """What the other interface made."""
    assert entry.capability is not None
    return Owned(
        entry.kind,
        entry.uuid or "",
        entry.name,
        entry.cluster,
        entry.vm,
        entry.taken_at_us or entry.intended_at_us,
        _OUT_OF_REACH[entry.capability],
        entry,
    )


def _why(
    found: Found,
    entry: Entry | None,
    live: Mapping[str, Collection[str]],
    age_us: int,
    gone: Collection[str],
) -> Why:
    if found.kind is Kind.VM:
        return Why.VM
    if entry is None:
        return Why.LEFT if age_us >= UNKNOWN_AGE_US else Why.YOUNG
    if entry.uuid is not None and entry.uuid != found.uuid:
        return Why.LEFT  # made a second time under the same name; the other one is known
    if entry.push_id not in live.get(entry.vm, ()):
        return Why.VM_GONE if entry.reference and entry.vm in gone else Why.LEFT
    return Why.REFERENCE if entry.reference else Why.PUSH


async def gone_vms(prism: Prism, entries: Iterable[Entry]) -> set[str]:
    """The VMs with a reference that were deleted on their cluster. Raises PrismError.

    Prism says so of each when asked for it alone: a list may leave out what it cannot see at the moment. Nothing is said of the
    VMs of a cluster that is not there, or not available: another Prism may have been configured.
    """
    wanted = {
        entry.vm: entry.cluster
        for entry in entries
        if entry.reference and not entry.is_out_of_reach(prism.capability)
    }
    if not wanted:
        return set()
    there = {vm.uuid for vm in await prism.vms()}
    missing = {vm: cluster for vm, cluster in wanted.items() if vm not in there}
    if not missing:
        return set()
    ready = {cluster.uuid for cluster in await prism.clusters() if cluster.available}
    gone = set()
    for vm, cluster in missing.items():
        if cluster not in ready:
            continue
        try:
            await prism.vm(vm)
        except PrismNotFoundError:
            gone.add(vm)
    return gone


async def sweep_clusters(
    prism: Prism,
    ledger: Ledger,
    live: Mapping[str, Collection[str]],
    now_us: int,
    gone: Collection[str] = (),
) -> list[str]:
    """Remove whatever no point and no push needs; returns the names of what was removed. Raises PrismError.

    ``live`` and ``gone`` as for ``judge``. Entries of the ledger that name nothing any more are struck out.
    """
    remover = Remover(prism, ledger)
    found = await remover.find_ours()
    entries = await ledger.entries()
    removed = []
    judged = judge(
        found, entries, ledger.installation, live, now_us, spoken=prism.capability, gone=gone
    )
    for each in judged:
        if each.is_removed:
            await delete_object(prism, each.kind, each.uuid, each.cluster or "")
            why = "no point and no push needs it" if each.why is Why.LEFT else each.why
            _logger.info("removed %s %s (%s): %s", each.kind, each.name, each.uuid, why)
            removed.append(each.name)
    there = {(each.kind, each.name) for each in found}
    for entry in entries:
        if entry.push_id in live.get(entry.vm, ()) or entry.kind not in ORDER:
            continue
        if entry.is_out_of_reach(prism.capability):
            await remover.put_off(entry, now_us)
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


__all__ = ["Owned", "Why", "gone_vms", "judge", "sweep_clusters"]
