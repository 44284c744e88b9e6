# SPDX-License-Identifier: AGPL-3.0-or-later
"""What status, points and history show of a protected VM: the JSON contract of docs/json.md, on both sides.

Pure functions of the aggregate, its events and a time. The receiver's control API and the command line share them, so
that an object looks the same wherever it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
from eventsourcing.domain import Aggregate

from replicator.domain.backup import BackupPart
from replicator.domain.failover import State
from replicator.domain.model import Balance, Damage, Point, RpoBreach, Suspicion, TestClone
from replicator.domain.sampling import WINDOW_DAYS, missed_percent_max
from replicator.domain.vm import ProtectedVm, event_kind, event_time_us

#: Fields that events store as arrays, and the type that gives their items names.
_STRUCTS: dict[str, Any] = {
    "backup": BackupPart,
    "breach": RpoBreach,
    "damage": Damage,
    "clone": TestClone,
    "missed": Suspicion,
}
#: Points that one warning names.
_SHOWN_MAX = 10
_ENVELOPE = {"originator_id", "originator_version", "originator_topic", "timestamp"}


def instant(time_us: int) -> str:
    """Microseconds since the epoch as RFC 3339 in UTC, to the millisecond (cut, not rounded)."""
    seconds, rest = divmod(time_us, 1_000_000)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{stamp}.{rest // 1000:03d}Z"


def point_info(vm: ProtectedVm, point: Point, held: bool = False) -> dict[str, Any]:
    """PointInfo. ``held``: a reader keeps it from being released. The worst of the states that hold is shown."""
    if any(damage.point == point.number for damage in vm.damages):
        state = "damaged"
    elif point.number in vm.doubtful:
        state = "suspect"
    elif held:
        state = "held"
    else:
        state = "verified" if point.number in vm.verified else "ok"
    return {
        "point": point.number,
        "taken_at": instant(point.taken_at_us),
        "committed_at": instant(point.committed_at_us),
        "parent": point.parent or None,
        "root": point.root.hex(),
        "bytes_pushed": point.bytes_pushed,
        "state": state,
    }


def push_info(
    point: int,
    kind: str,
    since_us: int,
    *,
    done: int | None = None,
    total: int | None = None,
    sent: int | None = None,
    received: int | None = None,
    eta_s: float | None = None,
) -> dict[str, Any]:
    """PushProgress: a push that is under way; a source gives ``done``, ``total`` and ``sent``, a receiver ``received``. Bytes."""
    return {
        "point": point,
        "kind": kind,
        "since": instant(since_us),
        "done": done,
        "total": total,
        "sent": sent,
        "received": received,
        "eta_s": eta_s,
    }


def is_shown(vm: ProtectedVm, configured: str) -> bool:
    """Whether a source speaks of a VM: one that never came to a point, and is not the one that ``vm`` names, was a mistake.

    ``configured``: the value of ``vm``; ``*`` names any.
    """
    name = configured.strip()
    return vm.newest is not None or name in ("*", vm.name, vm.vm)


def vm_status(
    vm: ProtectedVm,
    now_us: int,
    extra_warnings: Iterable[str] = (),
    *,
    rpo_target_s: int | None = None,
    rpo_forecast_s: float | None = None,
    sampling: dict[str, Any] | None = None,
    push: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """VmStatus at ``now_us``, microseconds since the epoch. ``extra_warnings`` follow those of the VM itself.

    ``rpo_target_s``: how old the newest point may become, if that is watched; ``rpo_forecast_s``: how old it will.
    ``sampling``: SamplingInfo, where it is known; ``push``: PushProgress of the push that is under way.
    """
    newest = vm.newest
    return {
        "vm": vm.name,
        "uuid": vm.vm,
        "role": vm.role,
        "state": str(vm.state),
        "epoch": vm.epoch,
        "newest_point": newest.number if newest is not None else None,
        "rpo_age_s": _age_s(vm, now_us),
        "rpo_target_s": rpo_target_s,
        "rpo_forecast_s": rpo_forecast_s,
        "last_cycle": _last_cycle(newest),
        "sampling": sampling,
        "push": push,
        "warnings": [*warnings(vm), *extra_warnings],
    }


def event_info(event: Aggregate.Event) -> dict[str, Any]:
    """One event of the history: ``id`` within its VM, ``at``, ``kind`` and its own fields, bytes as hex.

    A committed point's fields stand beside them, so that ``point`` is a number in every kind of event.
    """
    info: dict[str, Any] = {
        "id": event.originator_version,
        "at": instant(event_time_us(event)),
        "kind": event_kind(event),
    }
    for name, value in vars(event).items():
        if name in _ENVELOPE or name.startswith("_"):
            continue
        if name == "balance":
            info["period"] = msgspec.convert(value, Balance).period
        elif name == "point" and isinstance(value, list):
            info |= _committed(msgspec.convert(value, Point))
        elif name in _STRUCTS:
            info[name] = _named(msgspec.convert(value, _STRUCTS[name]))
        else:
            info[name] = _plain(value)
    return info


def warnings(vm: ProtectedVm) -> list[str]:
    """What an operator should look at, one line each; empty if all is well."""
    found = []
    if vm.newest is None:
        found.append("no recovery point yet")
    damages: dict[int, list[Damage]] = {}
    for damage in vm.damages:
        damages.setdefault(damage.point, []).append(damage)
    for number, known in sorted(damages.items()):
        first = known[0]
        more = f", and {len(known) - 1} more" if len(known) > 1 else ""
        where = f"{first.disk}, {first.length} bytes at {first.offset}"
        found.append(f"recovery point {number} is damaged: {where}: {first.reason}{more}")
    if vm.breach is not None and vm.state in (State.PROTECTED, State.TESTING):
        since, target_s = instant(vm.breach.began_at_us), vm.breach.target_s
        found.append(
            f"the newest recovery point is older than rpo_target ({target_s} s) since {since}"
        )
    if vm.tracking_lost is not None:
        found.append(f"change tracking was lost, digests are compared: {vm.tracking_lost}")
    found += _doubts(vm)
    if vm.peer_broken is not None:
        found.append(f"{vm.peer_broken}; if that was you, run replctl log accept {vm.name}")
    if vm.abandoned is not None:
        found.append(f"the last push was given up: {vm.abandoned}")
    return found


def sampling_info(clean: int, missed: int) -> dict[str, Any]:
    """SamplingInfo: what was sampled in the last days, and what that says of what change tracking can have missed."""
    return {
        "days": WINDOW_DAYS,
        "sampled": clean,
        "missed": missed,
        "missed_percent_max": None if missed else missed_percent_max(clean),
    }


def _doubts(vm: ProtectedVm) -> list[str]:
    """That change tracking cannot be trusted, and what comes of it on this side."""
    found = []
    if vm.suspect is not None:
        at = f"{vm.suspect.disk}, byte {vm.suspect.offset}, found after point {vm.suspect.point}"
        following = (
            "the next push does what on_reference_loss says"
            if vm.role == "source"
            else "the source is to compare all disks"
        )
        found.append(f"change tracking missed a change ({at}): {following}")
    if vm.doubtful and vm.role != "source":
        numbers = sorted(vm.doubtful)
        shown = ", ".join(map(str, numbers[:_SHOWN_MAX]))
        more = f" and {len(numbers) - _SHOWN_MAX} more" if len(numbers) > _SHOWN_MAX else ""
        found.append(
            f"recovery points {shown}{more} may lack changes that change tracking at the source missed"
        )
    return found


def _age_s(vm: ProtectedVm, now_us: int) -> float | None:
    if vm.newest is None:
        return None
    # Two clocks: the source's took the point. Ahead of ours by a little must not read as a negative age.
    return max(0, now_us - vm.aged_from_us(vm.newest)) / 1_000_000


def _last_cycle(newest: Point | None) -> dict[str, Any] | None:
    if newest is None:
        return None
    return {
        "point": newest.number,
        "kind": str(newest.kind),
        "duration_s": newest.duration_us / 1_000_000,
        "bytes_pushed": newest.bytes_pushed,
        "committed_at": instant(newest.committed_at_us),
    }


def _committed(point: Point) -> dict[str, Any]:
    fields = _named(point)
    del fields["kind"]  # the event's kind says it
    return {"point": fields.pop("number"), **fields, "parent": point.parent or None}


def _named(value: msgspec.Struct) -> dict[str, Any]:
    """A struct's fields by name; times and durations in the units of the contract."""
    result: dict[str, Any] = {}
    for field in msgspec.structs.fields(value):
        inner = getattr(value, field.name)
        if field.name.endswith("_at_us"):
            result[field.name.removesuffix("_us")] = instant(inner)
        elif field.name == "duration_us":
            result["duration_s"] = inner / 1_000_000
        else:
            result[field.name] = _plain(inner)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, msgspec.Struct):
        return _named(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


__all__ = [
    "event_info",
    "instant",
    "is_shown",
    "point_info",
    "push_info",
    "sampling_info",
    "vm_status",
    "warnings",
]
