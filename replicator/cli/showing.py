# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl status`, `points` and `history`: on a source from its own log, on a receiver by its control socket."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.control import SOURCE, ControlClient, vm_path
from replicator.cli.text import duration
from replicator.config import Config
from replicator.domain.sampling import first_day
from replicator.domain.views import event_info, instant, is_shown, point_info, vm_status
from replicator.domain.vm import ProtectedVm
from replicator.errors import ReplicatorError, UsageError
from replicator.log import EventLog, Wanted, open_log
from replicator.log.usage import sampling_of
from replicator.push import rpo, trouble
from replicator.push.trouble import Trouble
from replicator.sources.selection import is_chosen

_logger = logging.getLogger(__name__)

#: How long the running process may take to say how far its push is, seconds.
_PUSH_S = 2.0
HISTORY_LIMIT = 100
HISTORY_LIMIT_JSON = 1000
HISTORY_LIMIT_MAX = 10_000


_TIME_HELP = "a date, or a date and time such as 2026-03-01T12:00:00Z; UTC unless it says otherwise"


class _Time(click.ParamType[int]):
    """A time, as microseconds since the epoch."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """A date means its beginning."""
        if isinstance(value, int):
            return value
        try:
            stamp = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value}: expected {_TIME_HELP}", param, ctx)
        stamp = stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)
        if not 1971 <= stamp.year < 9999:  # a zone may move it into the year before
            self.fail(f"{value}: no time of this log", param, ctx)
        return round(stamp.timestamp() * 1_000_000)


@click.command()
@click.option("--at", "at_us", type=_Time(), help=f"As it was at a time: {_TIME_HELP}.")
@click.pass_obj
def status(context: CliContext, at_us: int | None) -> None:
    """Show every VM, its state and RPO age."""
    if at_us is not None and at_us > time.time_ns() // 1000:
        raise UsageError("--at: that time is yet to come")
    vms = trio.run(_status, context.config(), at_us)
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
    "--since-id",
    type=click.IntRange(min=0),
    help="Only events with a greater id, from the first of them on.",
)
@click.option("--since", "since_us", type=_Time(), help=f"Only from then on: {_TIME_HELP}.")
@click.option("--until", "until_us", type=_Time(), help="Only up to then.")
@click.option(
    "--limit",
    type=click.IntRange(1, HISTORY_LIMIT_MAX),
    help=f"At most so many.  [default: {HISTORY_LIMIT}, with --json {HISTORY_LIMIT_JSON}]",
)
@click.pass_obj
def history(
    context: CliContext,
    *,
    vm: str,
    since_id: int | None,
    since_us: int | None,
    until_us: int | None,
    limit: int | None,
) -> None:
    """List what happened to a VM.

    VM is a name or UUID. The newest events, in the order in which they happened; with --since or --since-id the first.
    """
    limit = limit or (HISTORY_LIMIT_JSON if context.json else HISTORY_LIMIT)
    wanted = Wanted(limit, since_id, since_us, until_us)
    events, more = trio.run(_history, context.config(), vm, wanted)
    if context.json:
        context.print_json(events)
    else:
        from replicator.cli.render import show_history  # noqa: PLC0415 - only for a person

        show_history(events)
    if more:
        click.echo(_left_out(events, wanted), err=True)


def _left_out(events: list[dict[str, Any]], wanted: Wanted) -> str:
    if wanted.forward:
        last = events[-1]["id"]
        return f"later events are left out: --since-id {last} goes on with them"
    first = events[0]["id"]
    return (
        f"{first - 1} earlier events are left out: --limit shows more, --since-id 0 begins with the first"
        if first != 2
        else "1 earlier event is left out: --limit shows more, --since-id 0 begins with the first"
    )


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


async def _status(config: Config, at_us: int | None) -> list[dict[str, Any]]:
    if not config.is_source:
        target = "/v1/status" if at_us is None else f"/v1/status?at={at_us}"
        return list((await ControlClient(config.control_path).get(target))["vms"])
    async with _own_log(config) as log:
        now_us = time.time_ns() // 1000
        if log is None:
            return []
        if at_us is not None:
            return [vm_status(vm, at_us) for vm in await log.at(at_us) if is_shown_of(config, vm)]
        pushes = await _under_way(config)
        common = await log.warnings() + _certificate_warnings(config, now_us / 1_000_000)
        recent = await log.usage(first_day(now_us))
        target_s = rpo.target_s(config)
        return [
            vm_status(
                vm,
                now_us,
                source_warnings(vm, await trouble.load(log, vm.vm), now_us, target_s) + common,
                rpo_target_s=target_s,
                rpo_forecast_s=rpo.forecast_s(
                    await rpo.recent_points(log, vm), config.push_interval, now_us
                ),
                sampling=sampling_of(recent, vm.vm),
                push=pushes.get(vm.vm, pushes.get(vm.name)),
            )
            for vm in log.vms
            if is_shown_of(config, vm)
        ]


def is_shown_of(config: Config, vm: ProtectedVm) -> bool:
    """Whether a source with this configuration speaks of a VM of its log; see ``is_shown``."""
    if config.source != "nutanix":
        return is_shown(vm, config.vm)
    return vm.newest is not None or is_chosen(vm.vm, vm.name, config.vm, config.exclude)


async def _under_way(config: Config) -> dict[str, dict[str, Any]]:
    """How far the pushes of the running process are, by the VM's UUID, or by the name of a host's only one; nothing where none
    runs, or none that answers.
    """
    with trio.move_on_after(_PUSH_S):
        try:
            answer = await ControlClient(config.control_path, SOURCE).get("/v1/push")
        except ReplicatorError as error:
            _logger.debug("no push to show: %s", error)
        else:
            if "pushes" in answer:
                return {each["uuid"]: each["push"] for each in answer["pushes"]}
            return {answer["vm"]: answer["push"]} if answer.get("push") is not None else {}
    return {}


def _certificate_warnings(config: Config, now: float) -> list[str]:
    if config.dr_auth_cert is None:
        return []
    from replicator.credentials import expiry_warnings  # noqa: PLC0415 - only where there are certificates

    return expiry_warnings(config, now)


def source_warnings(
    vm: ProtectedVm, failed: Trouble | None, now_us: int, target_s: int | None
) -> list[str]:
    """What a source's status says of protection that has stopped, other than a breach of ``target_s`` (rpo_target) that `run`
    has recorded.
    """
    found = []
    if failed is not None:
        found.append(_failed(failed))
    if vm.newest is not None and vm.breach is None and target_s is not None:
        age_s = (now_us - vm.newest.taken_at_us) / 1_000_000
        if age_s > target_s:
            found.append(f"no new recovery point for {duration(age_s)}, rpo_target is {target_s} s")
    return found


def _failed(trouble: Trouble) -> str:
    count, since = trouble.failures, instant(trouble.since_us)
    last = f"at {instant(trouble.at_us)}: {trouble.reason}"
    if trouble.back_us is not None:
        several = f"{count} attempts that failed since {since}, the last"
        tried = several if count > 1 else "an attempt that failed"
        return f"the push went on at {instant(trouble.back_us)}, after {tried} {last}"
    if count > 1:
        return f"the last {count} attempts at a cycle failed, since {since}, the last {last}"
    return f"the last attempt at a cycle failed, {last}"


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


async def _history(config: Config, name: str, wanted: Wanted) -> tuple[list[dict[str, Any]], bool]:
    """The events, and whether others were left out."""
    if not config.is_source:
        asked = {
            "limit": wanted.limit,
            "after": wanted.after,
            "since": wanted.since_us,
            "until": wanted.until_us,
        }
        query = urlencode({key: value for key, value in asked.items() if value is not None})
        target = f"{vm_path(name, 'history')}?{query}"
        answer = await ControlClient(config.control_path).get(target)
        return list(answer["events"]), bool(answer["more"])
    async with _own_log(config) as log:
        if log is None:
            return [], False
        vm = log.find(name)
        events, more = await log.page(UUID(vm.vm), wanted)
        return [event_info(event) for event in events], more
