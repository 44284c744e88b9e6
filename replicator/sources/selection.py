# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which VMs of many a host protects: what ``vm``, ``exclude`` and ``cluster`` choose out of what Prism lists. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from replicator.errors import UsageError
from replicator.prism.types import Cluster, VmSummary

_GLOB = frozenset("*?[")
#: Names that one message lists.
_SHOWN_MAX = 10


@dataclass(frozen=True, slots=True)
class Selection:
    """The VMs chosen, by name, and the entries of ``vm`` that name a VM which is not there."""

    vms: tuple[VmSummary, ...]
    missing: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, str]:
        """What to call each VM, by UUID: its name, or where two have the same, with the UUID."""
        names = Counter(vm.name for vm in self.vms)
        return {
            vm.uuid: vm.name if names[vm.name] == 1 else f"{vm.name} ({vm.uuid})" for vm in self.vms
        }


def entries(text: str) -> tuple[str, ...]:
    """The entries of a list with commas, blanks around them taken off; empty ones are none."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def is_one_vm(text: str) -> bool:
    """Whether ``vm`` names one VM, by name or UUID, rather than any number of them."""
    found = entries(text)
    return len(found) == 1 and not _GLOB & set(found[0])


def matches(entry: str, uuid: str, name: str) -> bool:
    """Whether an entry means this VM: its UUID, its exact name, or a glob that its name fits (case counts)."""
    if entry == name or entry.lower() == uuid.lower():
        return True
    return bool(_GLOB & set(entry)) and fnmatchcase(name, entry)


def is_chosen(uuid: str, name: str, vm: str, exclude: str) -> bool:
    """Whether ``vm`` chooses this VM and ``exclude`` does not take it out again."""
    return any(matches(entry, uuid, name) for entry in entries(vm)) and not any(
        matches(entry, uuid, name) for entry in entries(exclude)
    )


def select(
    vms: Sequence[VmSummary],
    clusters: Sequence[Cluster],
    *,
    vm: str = "*",
    exclude: str = "",
    cluster: str = "",
) -> Selection:
    """The VMs that the three keys choose: of the cluster, meant by ``vm``, without those of ``exclude``.

    ``clusters`` may be empty where ``cluster`` is. Raises UsageError that names the key: no such cluster, a name that two VMs
    have, nothing chosen at all.
    """
    if cluster:
        where = find_cluster(clusters, cluster).uuid
        vms = [each for each in vms if each.cluster.lower() == where.lower()]
    # ``exclude`` first: of two VMs of one name, it can say which is not meant.
    left = [
        each
        for each in vms
        if not any(matches(entry, each.uuid, each.name) for entry in entries(exclude))
    ]
    chosen: dict[str, VmSummary] = {}
    missing = []
    for entry in entries(vm):
        if not _GLOB & set(entry) and not any(matches(entry, v.uuid, v.name) for v in vms):
            missing.append(entry)
        found = [each for each in left if matches(entry, each.uuid, each.name)]
        _check_one(entry, found)
        chosen |= {each.uuid: each for each in found}
    if not chosen:
        among = f"{len(vms)} VM(s)" + (f" of cluster {cluster}" if cluster else "")
        less = f" without those of exclude = {exclude}" if exclude else ""
        raise UsageError(f"vm: {vm!r} chooses none of the {among} that Prism lists{less}")
    ordered = sorted(chosen.values(), key=lambda each: (each.name, each.uuid))
    return Selection(tuple(ordered), tuple(missing))


def find_cluster(clusters: Iterable[Cluster], name: str) -> Cluster:
    """The cluster of that name or UUID. Raises UsageError that lists what there is."""
    known = list(clusters)
    by_uuid = [each for each in known if each.uuid.lower() == name.lower()]
    found = by_uuid or [each for each in known if each.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        uuids = " and ".join(sorted(each.uuid for each in found))
        raise UsageError(f"cluster: {name!r} is the name of {uuids}: give the UUID")
    there = sorted(each.name for each in known)
    more = ", …" if len(there) > _SHOWN_MAX else ""
    raise UsageError(
        f"cluster: no cluster {name!r} (known: {', '.join(there[:_SHOWN_MAX]) or 'none'}{more})"
    )


def _check_one(entry: str, found: Sequence[VmSummary]) -> None:
    """Raise UsageError where an exact name is that of two VMs: nobody can know which is meant."""
    exact = not _GLOB & set(entry)
    named = sorted(each.uuid for each in found if exact or each.name == entry)
    if len(named) > 1:
        raise UsageError(
            f"vm: {entry!r} is the name of {len(named)} VMs ({' and '.join(named[:_SHOWN_MAX])}):"
            " name the one that is meant by its UUID, or take the other out with exclude"
        )


__all__ = ["Selection", "entries", "find_cluster", "is_chosen", "is_one_vm", "matches", "select"]
