# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl resync`: compare all disks of the VM with the receiver's newest point, and send what differs."""

from __future__ import annotations

from typing import Any

import click

from replicator.cli.context import CliContext
from replicator.cli.pushing import answer, push_result
from replicator.cli.text import duration, one_line, size
from replicator.log import EventLog
from replicator.push.plan import Want
from replicator.push.pusher import Outcome, Pusher


@click.command()
@click.argument("vm", required=False)
@click.pass_obj
def resync(context: CliContext, vm: str | None) -> None:
    """Compare all disks with the receiver and send only what differs.

    For a source that lost its state or its maps, or whose change tracking is in doubt. VM is the name or UUID of one of the
    VMs that this host pushes; without it, all of them.
    """
    answer(context, Want.RESYNC, vm, _result, _sentence)


def _result(log: EventLog, pusher: Pusher, outcome: Outcome) -> dict[str, Any]:
    """ResyncResult."""
    compared = outcome.compared
    return push_result(log, pusher, outcome) | {
        "compared_bytes": compared.compared if compared is not None else None,
        "differing_bytes": compared.differing if compared is not None else None,
    }


def _sentence(result: dict[str, Any]) -> str:
    found = (
        "what was compared was sent before"
        if result["compared_bytes"] is None
        else f"{size(result['compared_bytes'])} compared, {size(result['differing_bytes'])} differ"
    )
    went_on = " (went on with one begun earlier)" if result["resumed"] else ""
    return (
        f"resync of {one_line(result['vm'])} complete{went_on}: {found}; recovery point {result['point']},"
        f" {size(result['bytes_pushed'])} pushed in {duration(result['duration_s'])}"
    )


__all__ = ["resync"]
