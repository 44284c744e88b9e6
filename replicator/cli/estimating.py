# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl estimate`: how much the next Full and the next Incremental of each VM would carry. No data is moved.

A snapshot is taken, asked where it holds data and what changed since the last point, and removed again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.fleet import FAILURES, SeveralFailedError, in_turn, make_work_dir, vm_failure
from replicator.cli.source import ChosenVm, Sources, find_sources
from replicator.cli.text import one_line
from replicator.config import Config
from replicator.disk import data_bytes
from replicator.domain.model import Point
from replicator.domain.views import instant
from replicator.errors import ReferenceLostError, RefusedError, SourceError, UsageError
from replicator.log import EventLog, open_log
from replicator.push import journal
from replicator.push.naming import disk_names
from replicator.sources.base import Snapshot, SnapshotName, SourceDisk
from replicator.state_dir import open_state_dir

_logger = logging.getLogger(__name__)

#: How long the snapshot's removal may take once everything else was cancelled, seconds.
_REMOVE_S = 60.0


@click.command()
@click.argument("vm", required=False)
@click.pass_obj
def estimate(context: CliContext, vm: str | None) -> None:
    """Show the sizes of the next Full and Incremental.

    Of every disk, without moving data. VM is the name or UUID of one of the VMs of this host; without it, all of them.
    """
    config = context.config()
    if config.source == "nutanix" and config.prism_central is None and not config.is_source:
        raise UsageError(
            "estimate works where the VMs' disks are: this configuration names no source of them"
        )
    context.warn_of_idle_keys()
    sources = find_sources(config)
    with open_state_dir(config.state_dir):
        found = trio.run(_estimate, config, sources, vm)
    failed = [each for each in found if "error" in each]
    one = sources.one or vm is not None
    if context.json:
        context.print_json(found[0] if one else found)
    else:
        from replicator.cli.render import show_estimates  # noqa: PLC0415 - only for a person

        show_estimates([each for each in found if "error" not in each])
    if failed:
        raise SeveralFailedError(failed, len(found))


async def _estimate(config: Config, sources: Sources, vm: str | None) -> list[dict[str, Any]]:
    async with open_log(config.state_dir / "events") as log, sources.open(log) as opened:
        chosen = list(await opened.select())
        if vm is not None:
            chosen = [await _named(chosen, vm)]
        if sources.one or vm is not None:
            return [await estimate_vm(config, log, chosen[0])]
        return await _each(config, log, chosen)


async def _named(chosen: Sequence[ChosenVm], name: str) -> ChosenVm:
    """The VM of that name or UUID. Raises UsageError."""
    known = []
    for vm in chosen:
        if vm.uuid is None:
            identity = await vm.source.identify()
            known.append((identity.name, str(identity.uuid), vm))
        else:
            known.append((vm.name, str(vm.uuid), vm))
    found = [each for each in known if name in each[:2]]
    if len(found) == 1:
        return found[0][2]
    if found:
        uuids = " and ".join(uuid for _, uuid, _ in found)
        raise UsageError(f"VM: {name} is the name of {uuids}: give the UUID")
    names = ", ".join(one_line(each[0]) for each in known)
    raise UsageError(f"VM: this host has {names}, not {name}; nothing was touched")


async def _each(config: Config, log: EventLog, chosen: Sequence[ChosenVm]) -> list[dict[str, Any]]:
    async def work(vm: ChosenVm) -> dict[str, Any]:
        try:
            return await estimate_vm(config, log, vm)
        except FAILURES as error:
            return vm_failure(vm, error)

    return await in_turn(config.concurrent_vms, chosen, work)


async def estimate_vm(config: Config, log: EventLog, vm: ChosenVm) -> dict[str, Any]:
    """Estimate of docs/json.md. Raises SourceError, and RefusedError while a push is unfinished. Cancelled, it removes the
    snapshot all the same, for as long as that takes no longer than a minute.
    """
    identity = await vm.source.identify()
    await make_work_dir(config, vm.config)
    if await journal.load(log, str(identity.uuid)) is not None:
        raise RefusedError(
            f"{identity.name}: a push is unfinished, and holds its snapshot: estimate when it is done (replctl push)"
        )
    known = log.get(identity.uuid)
    newest = known.newest if known is not None else None
    name = SnapshotName(secrets.token_hex(8), newest.push_id if newest is not None else None)
    for left in await vm.source.sweep(None, name.reference):
        _logger.warning("removed %s, left by an earlier run", left)
    try:
        snapshot = await vm.source.take(name)
        try:
            names = disk_names(
                known.disk_names() if known is not None else {},
                [disk.identity for disk in snapshot.disks],
            )
            disks = [
                await _disk(snapshot, disk, names[disk.identity], newest) for disk in snapshot.disks
            ]
            taken_at_us = snapshot.taken_at_us
        finally:
            with trio.move_on_after(_REMOVE_S, shield=True):
                await snapshot.aclose()
    finally:
        await _remove(vm, name)
    return {
        "vm": identity.name,
        "uuid": str(identity.uuid),
        "taken_at": instant(taken_at_us),
        "reference_point": newest.number if newest is not None else None,
        "size": sum(disk["size"] for disk in disks),
        "full_bytes": sum(disk["full_bytes"] for disk in disks),
        "incremental_bytes": _sum([disk["incremental_bytes"] for disk in disks]),
        "disks": disks,
    }


async def _remove(vm: ChosenVm, name: SnapshotName) -> None:
    """Remove the snapshot, whatever became of the estimate; where that fails, the next run's sweep does it."""
    why = f"not within {_REMOVE_S:.0f} s"
    with trio.move_on_after(_REMOVE_S, shield=True):
        try:
            await vm.source.abandon(name)
        except SourceError as error:
            why = str(error)
        else:
            return
    _logger.warning("%s: the snapshot is left for the next run to remove: %s", vm.label, why)


async def _disk(
    snapshot: Snapshot, disk: SourceDisk, name: str, newest: Point | None
) -> dict[str, Any]:
    """DiskEstimate."""
    full = await data_bytes(disk.view, None)
    incremental: int | None = None
    reason = None
    old = newest.disk(name) if newest is not None else None
    if newest is None:
        reason = "there is no recovery point yet"
    elif old is None:
        incremental, reason = full, "the disk is new"
    elif snapshot.lost_tracking is not None:
        reason = snapshot.lost_tracking
    else:
        try:
            incremental = await data_bytes(disk.view, newest.push_id)
        except ReferenceLostError as error:
            reason = str(error)
    return {
        "disk": name,
        "identity": disk.identity,
        "size": disk.view.size,
        "full_bytes": full,
        "incremental_bytes": incremental,
        "reason": reason,
    }


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


__all__ = ["estimate", "estimate_vm"]
