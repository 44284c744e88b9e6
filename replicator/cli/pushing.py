# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl seed`, `push` and `run`: the commands of the host that a VM runs on."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import click
import trio
from eventsourcing.persistence import PersistenceError

from replicator import __version__
from replicator.cli.context import CliContext
from replicator.cli.failures import explain
from replicator.cli.progress import Report, progress
from replicator.cli.source import make_source
from replicator.cli.text import duration, one_line, size
from replicator.cli.underway import watch
from replicator.config import Config
from replicator.control.bandwidth import Regulator
from replicator.control.metrics import Live, Metrics
from replicator.control.server import check_path
from replicator.control.source import serve_source
from replicator.credentials import SourceCredentials, reload_on_hangup
from replicator.domain.model import PushKind
from replicator.domain.views import is_shown, point_info
from replicator.errors import FencedError, PeerRefusedError, ReplicatorError
from replicator.log import EventLog, open_log
from replicator.memory import give_back
from replicator.nursery import flat_nursery
from replicator.push import rpo
from replicator.push.link import Link, check_congestion
from replicator.push.plan import Want
from replicator.push.progress import Progress
from replicator.push.pusher import PATIENCE_S, Outcome, Pusher
from replicator.push.schedule import Pace, next_start
from replicator.sources.base import Source
from replicator.state_dir import check_directory, open_state_dir

_logger = logging.getLogger(__name__)
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
        self.source: Source = make_source(config)
        check_path(config.control_path)
        check_congestion(config.dr_congestion)
        if config.work_path.parent != config.state_dir:
            check_directory(config.work_path, "working_dir")

    @asynccontextmanager
    async def pusher(
        self,
        want: Want,
        *,
        patience_s: float = PATIENCE_S,
        report: Callable[[Progress], None] = lambda _: None,
    ) -> AsyncIterator[tuple[Pusher, EventLog]]:
        """A pusher on this host's log, and the control socket for as long. The state directory is locked by the caller."""
        _logger.info(
            "replicator backend up (v%s) phase=%s vm=%s", __version__, _PHASES[want], self.config.vm
        )
        self.credentials.tell()
        async with open_log(self.config.state_dir / "events") as log, flat_nursery() as nursery:
            pusher = Pusher(
                self.config, log, self.source, self.link, report=report, patience_s=patience_s
            )
            live = Live(
                throttle_mbps=lambda: self.regulator.throttle.mbps,
                reconnects=lambda: pusher.reconnects,
                expires=self.credentials.expires,
                pushing=lambda: pushing(pusher),
                shows=lambda vm: is_shown(vm, self.config.vm),
            )
            metrics = Metrics(log, live)
            push = partial(push_progress, pusher)
            await serve_source(nursery, self.config, self.regulator, metrics, push)
            yield pusher, log
            nursery.cancel_scope.cancel()


def push_progress(pusher: Pusher) -> tuple[str, dict[str, Any] | None]:
    """The VM and PushProgress, for the control socket."""
    under_way = pusher.under_way
    return pusher.name, None if under_way is None else under_way.info()


def pushing(pusher: Pusher) -> dict[str, tuple[float, int]]:
    """How far the push is that is under way, for metrics."""
    under_way = pusher.under_way
    return {} if under_way is None else {pusher.name: (under_way.ratio, under_way.sent)}


@click.command()
@click.option(
    "--again", is_flag=True, help="Also where both sides have a point: after a disk shrank, say."
)
@click.pass_obj
def seed(context: CliContext, again: bool) -> None:
    """Push all disks in full: the first recovery point."""
    _push_once(context, Want.SEED_AGAIN if again else Want.SEED)


@click.command()
@click.pass_obj
def push(context: CliContext) -> None:
    """Push what changed since the last recovery point."""
    _push_once(context, Want.PUSH)


@click.command()
@click.pass_obj
def run(context: CliContext) -> None:
    """Protect the VM until stopped.

    Seeds if need be, then pushes every push_interval seconds.
    """
    host = Host(context.source_config())
    with open_state_dir(host.config.state_dir):
        trio.run(_run, host)


def _push_once(context: CliContext, want: Want) -> None:
    host = Host(context.source_config())
    with open_state_dir(host.config.state_dir), progress() as report:
        outcome, result = trio.run(_push, host, want, report)
    if context.json:
        context.print_json(result)
        return
    point = outcome.point
    went_on = " (went on with one begun earlier)" if outcome.resumed else ""
    click.echo(
        f"{point.kind} of {one_line(result['vm'])} complete{went_on}: recovery point {point.number},"
        f" {size(point.bytes_pushed)} pushed in {duration(point.duration_us / 1e6)}"
    )


async def _push(host: Host, want: Want, report: Report) -> tuple[Outcome, dict[str, Any]]:
    async with host.pusher(want, report=telling(report)) as (pusher, log):
        outcome = await pusher.push(want)
        return outcome, push_result(log, pusher, outcome)


def telling(report: Report) -> Callable[[Progress], None]:
    """Shows how far a push is."""

    def tell(at: Progress) -> None:
        report(at.disk, at.done, at.total)

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
                host.pusher(Want.RUN, patience_s=float("inf")) as (pusher, log),
                flat_nursery() as watches,
            ):
                if (target_s := rpo.target_s(host.config)) is not None:
                    watches.start_soon(rpo.watch, log, target_s)
                watches.start_soon(watch, lambda: pusher.under_way)
                await cycles(pusher.push, host.config.push_interval)


async def _stop(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        _logger.info("stopping on %s", signal.Signals(number).name)
        scope.cancel()


async def cycles(push_one: Callable[[Want], Awaitable[Outcome | None]], interval_s: float) -> None:
    """Push for ever, each cycle planned from the start of the last; one that took longer than that is followed at once.

    A cycle that fails is logged, and the next one tried at its time. Raises RefusedError when the source is fenced:
    then nothing of it may reach the receiver any more, and going on would only hide that.
    """
    pace = Pace(interval_s)
    while True:
        started = trio.current_time()
        try:
            outcome = await push_one(Want.RUN)
        except (ReplicatorError, PersistenceError, OSError) as error:
            if is_fenced(error):
                raise
            _logger.error("this cycle failed: %s", explain(error).text)
        else:
            # A seed takes what it takes: it is not what push_interval is about.
            if outcome is None or outcome.point.kind is PushKind.CYCLE:
                ended = trio.current_time()
                if (told := pace.finished(ended - started, ended)) is not None:
                    _logger.log(logging.WARNING if told.behind else logging.INFO, "%s", told.text)
        due = next_start(started, trio.current_time(), interval_s, random.random())
        await trio.sleep_until(due)


def is_fenced(error: Exception) -> bool:
    """Whether a push was refused because the VM failed over: no later cycle can succeed."""
    if isinstance(error, PeerRefusedError):
        return error.code == "stale-epoch"
    return isinstance(error, FencedError)


__all__ = ["Host", "cycles", "is_fenced", "push", "push_result", "run", "seed", "telling"]
