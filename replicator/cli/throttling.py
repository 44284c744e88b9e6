# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl throttle`: the cap on what a source sends, shown and changed in the process that pushes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.control import SOURCE, ControlClient
from replicator.cli.text import one_line
from replicator.control.bandwidth import parse_limit, why, words
from replicator.control.source import RESET
from replicator.errors import UsageError


# A rate below zero is a bad limit, not an option: it is told what a limit is.
@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("limit", required=False)
@click.pass_obj
def throttle(context: CliContext, limit: str | None) -> None:
    """Show or change the cap on what is sent.

    LIMIT is a rate in Mbit/s, a timetable such as "mon-fri 8:00-18:00 50; * 0", off or 0 (no cap), or reset (the
    configuration again). It holds at once, for the process that is running, until that ends.
    """
    if limit is not None and limit.startswith("--"):
        raise click.NoSuchOption(limit)
    config = context.config()
    if not config.is_source:
        raise UsageError(
            "throttle works where pushes come from: run it on the source's host, beside replctl run"
        )
    if limit is not None and limit.strip() != RESET:
        try:
            parse_limit(limit, config.max_bandwidth_mbps)
        except UsageError as error:
            raise UsageError(f"limit: {error}") from None
    answer = trio.run(_ask, ControlClient(config.control_path, SOURCE), limit)
    if context.json:
        context.print_json(answer)
        return
    for line in _lines(answer):
        click.echo(one_line(line))


async def _ask(client: ControlClient, limit: str | None) -> dict[str, Any]:
    if limit is None:
        return await client.get("/v1/throttle")
    return await client.post("/v1/throttle", {"limit": limit})


def _lines(status: dict[str, Any]) -> list[str]:
    lines = [f"{words(status['mbps'])} ({why(status['origin'], status['entry'])})"]
    if status["next_change"] is not None:
        at = datetime.fromisoformat(status["next_change"]).astimezone()
        lines.append(f"{words(status['next_mbps'])} from {at:%a %Y-%m-%d %H:%M %z}")
    if status["set_by_hand"] is not None:
        lines.append(
            "set by hand until the process ends; to keep it, set max_bandwidth_mbps or max_bandwidth_schedule"
        )
    return lines


__all__ = ["throttle"]
