# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl usage`: what protection has cost, by VM and day, since the first day."""

from __future__ import annotations

from typing import Any

import click

from eventstore.projections import UnknownProjectionError, View, read_projection
from replicator.cli.context import CliContext
from replicator.cli.logbook import open_store
from replicator.errors import RefusedError
from replicator.log import states
from replicator.log.store import find_vm
from replicator.log.usage import NAME, Usage, days


@click.command()
@click.argument("vm")
@click.pass_obj
def usage(context: CliContext, vm: str) -> None:
    """Show what a VM's protection has cost, day by day (UTC).

    VM is a name or UUID.
    """
    with open_store(context.config(), readonly=True) as store:
        uuid = find_vm(states.recall(store).values(), vm).vm

        def read(view: View) -> list[dict[str, Any]]:
            return [_shown(day, sums) for day, sums in days(view, uuid)]

        try:
            rows = read_projection(store.environment, NAME, read)
        except UnknownProjectionError as error:
            raise RefusedError("nothing has been added up here yet") from error
    if context.json:
        context.print_json(rows)
        return
    from replicator.cli.render import show_usage  # noqa: PLC0415 - only for a person

    show_usage(rows)


def _shown(day: str, sums: Usage) -> dict[str, Any]:
    return {
        "day": day,
        "seeds": sums.seeds,
        "cycles": sums.cycles,
        "bytes_pushed": sums.bytes_pushed,
        "busy_s": sums.busy_us / 1_000_000,
        "abandoned": sums.abandoned,
        "damages": sums.damages,
        "tests": sums.tests,
        "sampled": sums.sampled,
        "missed": sums.missed,
    }


__all__ = ["usage"]
