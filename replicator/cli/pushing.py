# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl seed`, `push` and `run`: the commands of the host that a VM runs on."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import click
import trio

from replicator import __version__
from replicator.cli import fleet as fleets
from replicator.cli.context import CliContext
from replicator.cli.cycling import cycles, is_fenced
from replicator.cli.fleet import Fleet, SeveralFailedError
from replicator.cli.progress import Report, progress
from replicator.cli.showing import is_shown_of
from replicator.cli.source import OneSource, Sources, find_sources
from replicator.cli.text import duration, one_line, size
from replicator.cli.underway import watch
from replicator.config import Config
from replicator.control.bandwidth import Regulator
from replicator.control.metrics import Live, Metrics
from replicator.control.server import check_path
from replicator.control.source import serve_source
from replicator.credentials import SourceCredentials, reload_on_hangup
from replicator.domain.views import point_info
from replicator.errors import UsageError
from replicator.log import EventLog, open_log
from replicator.memory import give_back
from replicator.nursery import flat_nursery
from replicator.push import rpo
from replicator.push.link import Link, check_congestion
from replicator.push.plan import Want
from replicator.push.progress import Progress
from replicator.push.pusher import PATIENCE_S, Outcome, Pusher
from replicator.state_dir import check_directory, open_state_dir

_logger = logging.getLogger(__name__)
#: Makes an answer out of what a push has come to.
Describe = Callable[[EventLog, Pusher, Outcome], dict[str, Any]]
_NO_PUSH: Final[dict[str, Any]] = {"vm": "", "push": None}
_PHASES = {
    Want.SEED: "F8.1 mode=seed",
    Want.SEED_AGAIN: "F8.1 mode=seed",
    Want.PUSH: "F8.2 mode=bitmap-push",
    Want.RUN: "F8.2 mode=bitmap-push",
    Want.RESYNC: "F8.2 mode=resync",
}


class Host:
    """A source's configuration, checked as a whole: what ``Host`` was made from can be pushed with."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.credentials = SourceCredentials(config)
        self.regulator = Regulator(config)
        self.link = Link(config, self.credentials, self.regulator.throttle)
        self.sources: Sources = find_sources(config)
        check_path(config.control_path)
        check_congestion(config.dr_congestion)
        if config.work_path.parent != config.state_dir:
            check_directory(config.work_path, "working_dir")

    @asynccontextmanager
    async def fleet(
        self,
        want: Want,
        *,
        patience_s: float = PATIENCE_S,
        report: fleets.Report = lambda _label, _progress: None,
    ) -> AsyncIterator[Fleet]:
        """The VMs of this host on its log, and the control socket for as long. The state directory is locked by the caller.

        Which VMs there are was not asked yet. Raises SourceError where they cannot be asked for; `run` goes on trying.
        """
        _logger.info(
            "replicator backend up (v%s) phase=%s vm=%s", __version__, _PHASES[want], self.config.vm
        )
        self.credentials.tell()
        retry_s = float(self.config.push_interval) if want is Want.RUN else None
        async with (
            open_log(self.config.state_dir / "events") as log,
            self.sources.open(log, retry_s) as sources,
            flat_nursery() as nursery,
        ):
            fleet = Fleet(self.config, log, self.link, sources, patience_s, report)
            live = Live(
                throttle_mbps=lambda: self.regulator.throttle.mbps,
                reconnects=lambda: fleet.reconnects,
                expires=self.credentials.expires,
                pushing=lambda: pushing(fleet),
                shows=partial(is_shown_of, self.config),
                prism_errors=self.sources.api_errors,
                attach_failures=self.sources.attach_failures,
            )
            metrics = Metrics(log, live)
            push = partial(fleet_progress, fleet, one=self.sources.one)
            await serve_source(nursery, self.config, self.regulator, metrics, push)
            yield fleet
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def pusher(self, want: Want) -> AsyncIterator[tuple[Pusher, EventLog]]:
        """As ``fleet``, of a host that pushes one VM."""
        async with self.fleet(want) as fleet:
            (member,) = await fleet.select()
            yield member.pusher, fleet.log


def push_progress(pusher: Pusher) -> dict[str, Any]:
    """The VM and PushProgress, for the control socket."""
    under_way = pusher.under_way
    return {"vm": pusher.name, "push": None if under_way is None else under_way.info()}


def fleet_progress(fleet: Fleet, *, one: bool) -> dict[str, Any]:
    """As ``push_progress``, and of a host that pushes several VMs every push under way."""
    found = fleet.under_way
    if one:
        return push_progress(fleet.members[0].pusher) if fleet.members else _NO_PUSH
    each = [{"vm": m.vm.name, "uuid": str(m.vm.uuid), "push": push} for m, push in found]
    first = {"vm": each[0]["vm"], "push": each[0]["push"]} if each else _NO_PUSH
    return {**first, "pushes": each}


def pushing(fleet: Fleet) -> dict[str, tuple[float, int]]:
    """How far the pushes are that are under way, by VM, for metrics."""
    return {
        member.label: (under_way.ratio, under_way.sent)
        for member in fleet.members
        if (under_way := member.pusher.under_way) is not None
    }


@click.command()
@click.argument("vm", required=False)
@click.option(
    "--again", is_flag=True, help="Also where both sides have a point: after a disk shrank, say."
)
@click.pass_obj
def seed(context: CliContext, vm: str | None, again: bool) -> None:
    """Push all disks in full: the first recovery point.

    VM is the name or UUID of one of the VMs that this host pushes; without it, all of them.
    """
    _push_once(context, Want.SEED_AGAIN if again else Want.SEED, vm)


@click.command()
@click.argument("vm", required=False)
@click.pass_obj
def push(context: CliContext, vm: str | None) -> None:
    """Push what changed since the last recovery point.

    VM is the name or UUID of one of the VMs that this host pushes; without it, all of them.
    """
    _push_once(context, Want.PUSH, vm)


@click.command()
@click.pass_obj
def run(context: CliContext) -> None:
    """Protect the VMs until stopped.

    Seeds if need be, then pushes every push_interval seconds.
    """
    host = Host(context.source_config())
    with open_state_dir(host.config.state_dir):
        trio.run(_run, host)


def _push_once(context: CliContext, want: Want, vm: str | None) -> None:
    answer(context, want, vm, push_result, _sentence)


def _sentence(result: dict[str, Any]) -> str:
    went_on = " (went on with one begun earlier)" if result["resumed"] else ""
    return (
        f"{result['kind']} of {one_line(result['vm'])} complete{went_on}: recovery point {result['point']},"
        f" {size(result['bytes_pushed'])} pushed in {duration(result['duration_s'])}"
    )


def answer(
    context: CliContext,
    want: Want,
    vm: str | None,
    describe: Describe,
    sentence: Callable[[dict[str, Any]], str],
) -> None:
    """Push every VM of this host once, or ``vm`` alone, and answer with what came of it.

    Of one VM the answer is an object, of several a list; those that failed are named in the error that is raised then.
    """
    host = Host(context.source_config())
    if vm is not None:
        check_vm(host, vm)
    with open_state_dir(host.config.state_dir), progress() as report:
        found = trio.run(_push, host, want, report, vm, describe)
    if isinstance(found, dict):
        found = [found]
        if context.json:
            context.print_json(found[0])
    elif context.json:
        context.print_json(found)
    failed = [each for each in found if "error" in each]
    if not context.json:
        for each in found:
            if "error" not in each:
                click.echo(sentence(each))
    if failed:
        raise SeveralFailedError(failed, len(found))


def check_vm(host: Host, vm: str) -> None:
    """Raise UsageError unless ``vm`` is what a host with one VM pushes. Of several, that is seen when they are listed."""
    if isinstance(host.sources, OneSource):
        identity = trio.run(host.sources.source.identify)
        if vm not in (identity.name, str(identity.uuid)):
            raise UsageError(
                f"VM: this host pushes {identity.name} ({identity.uuid}), not {vm}; nothing was touched"
            )


async def _push(
    host: Host, want: Want, report: Report, vm: str | None, describe: Describe
) -> dict[str, Any] | list[dict[str, Any]]:
    several = not isinstance(host.sources, OneSource)
    async with host.fleet(want, report=telling(report, several=several)) as fleet:
        members = await fleet.select()
        if several and vm is not None:
            members = [fleet.find(vm)]
        if host.sources.one or vm is not None:
            (member,) = members
            return describe(fleet.log, member.pusher, await fleet.push(member, want))
        return [
            describe(fleet.log, each.member.pusher, each.outcome)
            if each.outcome is not None
            else each.failure()
            for each in await fleet.push_each(members, want)
        ]


def telling(report: Report, *, several: bool = False) -> fleets.Report:
    """Shows how far a push is; where there are ``several``, of which VM."""

    def tell(label: str, at: Progress) -> None:
        report(f"{label} {at.disk}" if several else at.disk, at.done, at.total)

    return tell


def push_result(log: EventLog, pusher: Pusher, outcome: Outcome) -> dict[str, Any]:
    """PushResult."""
    point = outcome.point
    vm = next(vm for vm in log.vms if vm.newest is not None and vm.newest.push_id == point.push_id)
    return {
        "vm": vm.name,
        "uuid": vm.vm,
        "kind": str(point.kind),
        **point_info(vm, point),
        "duration_s": point.duration_us / 1_000_000,
        "resumed": outcome.resumed,
        "resumed_bytes": outcome.resumed_bytes,
        "resent_bytes": outcome.resent_bytes,
        "reconnects": pusher.patience.reconnects,
        "reason": outcome.reason,
    }


async def _run(host: Host) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with flat_nursery() as nursery:
            nursery.start_soon(_stop, signals, nursery.cancel_scope)
            nursery.start_soon(give_back)
            await nursery.start(reload_on_hangup, host.credentials)
            async with (
                host.fleet(Want.RUN, patience_s=float("inf")) as fleet,
                flat_nursery() as watches,
            ):
                if (target_s := rpo.target_s(host.config)) is not None:
                    watches.start_soon(rpo.watch, fleet.log, target_s)
                if isinstance(host.sources, OneSource):
                    (member,) = await fleet.select()
                    watches.start_soon(watch, lambda: member.pusher.under_way)
                    await cycles(member.pusher.push, host.config.push_interval)
                await fleet.protect()


async def _stop(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        _logger.info("stopping on %s", signal.Signals(number).name)
        scope.cancel()


__all__ = [
    "Host",
    "answer",
    "cycles",
    "is_fenced",
    "push",
    "push_progress",
    "push_result",
    "run",
    "seed",
]
