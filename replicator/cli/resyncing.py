# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl resync`: compare all disks of the VM with the receiver's newest point, and send what differs."""

from __future__ import annotations

from typing import Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.progress import Report, progress
from replicator.cli.pushing import Host, push_result, telling
from replicator.cli.text import duration, one_line, size
from replicator.errors import UsageError
from replicator.push.plan import Want
from replicator.state_dir import open_state_dir


@click.command()
@click.argument("vm", required=False)
@click.pass_obj
def resync(context: CliContext, vm: str | None) -> None:
    """Compare all disks with the receiver and send only what differs.

    For a source that lost its state or its maps, or whose change tracking is in doubt. VM is the name or UUID of the VM
    that this host pushes, which need not be given.
    """
    host = Host(context.source_config())
    if vm is not None:
        trio.run(_check_vm, host, vm)
    with open_state_dir(host.config.state_dir), progress() as report:
        result = trio.run(_resync, host, report)
    if context.json:
        context.print_json(result)
        return
    found = (
        "what was compared was sent before"
        if result["compared_bytes"] is None
        else f"{size(result['compared_bytes'])} compared, {size(result['differing_bytes'])} differ"
    )
    went_on = " (went on with one begun earlier)" if result["resumed"] else ""
    click.echo(
        f"resync of {one_line(result['vm'])} complete{went_on}: {found}; recovery point {result['point']},"
        f" {size(result['bytes_pushed'])} pushed in {duration(result['duration_s'])}"
    )


async def _check_vm(host: Host, vm: str) -> None:
    """Raise UsageError unless it is the VM that this host pushes."""
    identity = await host.source.identify()
    if vm not in (identity.name, str(identity.uuid)):
        raise UsageError(
            f"VM: this host pushes {identity.name} ({identity.uuid}), not {vm}; nothing was touched"
        )


async def _resync(host: Host, report: Report) -> dict[str, Any]:
    async with host.pusher(Want.RESYNC, report=telling(report)) as (pusher, log):
        outcome = await pusher.push(Want.RESYNC)
        compared = outcome.compared
        return push_result(log, pusher, outcome) | {
            "compared_bytes": compared.compared if compared is not None else None,
            "differing_bytes": compared.differing if compared is not None else None,
        }


__all__ = ["resync"]
