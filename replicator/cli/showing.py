# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl status`, `points` and `history`: on a source from its own log, on a receiver by its control socket."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.control import ControlClient, vm_path
from replicator.config import Config
from replicator.domain.views import event_info, point_info, vm_status
from replicator.log import EventLog, open_log

_logger = logging.getLogger(__name__)

HISTORY_LIMIT = 1000
HISTORY_LIMIT_MAX = 10_000


@click.command()
@click.pass_obj
def status(context: CliContext) -> None:
    """Show every VM, its state and RPO age."""
    vms = trio.run(_status, context.config())
    if context.json:
        context.print_json(vms)
    else:
        from replicator.cli.render import show_status  # noqa: PLC0415 - only for a person

        show_status(vms)


@click.command()
@click.argument("vm")
@click.pass_obj
def points(context: CliContext, vm: str) -> None:
    """List the recovery points of a VM.

    VM is a name or UUID; the oldest comes first.
    """
    found = trio.run(_points, context.config(), vm)
    if context.json:
        context.print_json(found)
    else:
        from replicator.cli.render import show_points  # noqa: PLC0415 - only for a person

        show_points(found)


@click.command()
@click.argument("vm")
@click.option(
    "--since-id", type=click.IntRange(min=0), default=0, help="Only events with a greater id."
)
@click.option(
    "--limit",
    type=click.IntRange(1, HISTORY_LIMIT_MAX),
    default=HISTORY_LIMIT,
    show_default=True,
    help="At most so many.",
)
@click.pass_obj
def history(context: CliContext, vm: str, since_id: int, limit: int) -> None:
    """List what happened to a VM.

    VM is a name or UUID; the oldest comes first.
    """
    events = trio.run(_history, context.config(), vm, since_id, limit)
    if context.json:
        context.print_json(events)
    else:
        from replicator.cli.render import show_history  # noqa: PLC0415 - only for a person

        show_history(events)


@asynccontextmanager
async def _own_log(config: Config) -> AsyncIterator[EventLog | None]:
    """A source's own log, read only; None (and a warning) if nothing was pushed yet."""
    folder = config.state_dir / "events"
    if not await trio.Path(folder).is_dir():
        _logger.warning("no log in %s yet: nothing was pushed from here", config.state_dir)
        yield None
        return
    async with open_log(folder, readonly=True) as log:
        yield log


async def _status(config: Config) -> list[dict[str, Any]]:
    if not config.is_source:
        return list((await ControlClient(config.control_path).get("/v1/status"))["vms"])
    async with _own_log(config) as log:
        now_us = time.time_ns() // 1000
        return [vm_status(vm, now_us) for vm in log.vms] if log is not None else []


async def _points(config: Config, name: str) -> list[dict[str, Any]]:
    if not config.is_source:
        return list(
            (await ControlClient(config.control_path).get(vm_path(name, "points")))["points"]
        )
    async with _own_log(config) as log:
        if log is None:
            return []
        vm = log.find(name)
        return [point_info(vm, vm.points[number]) for number in sorted(vm.points)]


async def _history(config: Config, name: str, after: int, limit: int) -> list[dict[str, Any]]:
    if not config.is_source:
        target = f"{vm_path(name, 'history')}?after={after}&limit={limit}"
        return list((await ControlClient(config.control_path).get(target))["events"])
    async with _own_log(config) as log:
        if log is None:
            return []
        vm = log.find(name)
        events = await log.history(UUID(vm.vm), after=after, limit=limit)
        return [event_info(event) for event in events]
