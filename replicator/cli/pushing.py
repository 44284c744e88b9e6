# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl seed`, `push` and `run`: the commands of the host that a VM runs on."""

from __future__ import annotations

import logging
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
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
from replicator.config import Config, load_key
from replicator.domain.views import point_info
from replicator.errors import FencedError, PeerRefusedError, ReplicatorError
from replicator.log import EventLog, open_log
from replicator.nursery import flat_nursery
from replicator.push.plan import Want
from replicator.push.pusher import PATIENCE_S, Outcome, Progress, Pusher
from replicator.push.schedule import next_start
from replicator.sources.base import Source
from replicator.state_dir import check_directory, open_state_dir
from replicator.wire.keys import PreSharedKey

_logger = logging.getLogger(__name__)
_PHASES = {
    Want.SEED: "F8.1 mode=seed",
    Want.SEED_AGAIN: "F8.1 mode=seed",
    Want.PUSH: "F8.2 mode=bitmap-push",
    Want.RUN: "F8.2 mode=bitmap-push",
}


class Host:
    """A source's configuration, checked as a whole: what ``Host`` was made from can be pushed with."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.key: PreSharedKey = load_key(config)
        self.source: Source = make_source(config)
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
        """A pusher on this host's log. The state directory is locked by the caller."""
        _logger.info(
            "replicator backend up (v%s) phase=%s vm=%s", __version__, _PHASES[want], self.config.vm
        )
        async with open_log(self.config.state_dir / "events") as log:
            yield (
                Pusher(
                    self.config, log, self.source, self.key, report=report, patience_s=patience_s
                ),
                log,
            )


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
    def tell(at: Progress) -> None:
        report(at.disk, at.done, at.total)

    async with host.pusher(want, report=tell) as (pusher, log):
        outcome = await pusher.push(want)
        point = outcome.point
        vm = next(
            vm for vm in log.vms if vm.newest is not None and vm.newest.push_id == point.push_id
        )
        return outcome, {
            "vm": vm.name,
            "uuid": vm.vm,
            "kind": str(point.kind),
            **point_info(vm, point),
            "duration_s": point.duration_us / 1_000_000,
            "resumed": outcome.resumed,
            "resumed_bytes": outcome.resumed_bytes,
            "reason": outcome.reason,
        }


async def _run(host: Host) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with flat_nursery() as nursery:
            nursery.start_soon(_stop, signals, nursery.cancel_scope)
            async with host.pusher(Want.RUN, patience_s=float("inf")) as (pusher, _):
                await cycles(pusher.push, host.config.push_interval)


async def _stop(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        _logger.info("stopping on %s", signal.Signals(number).name)
        scope.cancel()


async def cycles(push_one: Callable[[Want], Awaitable[object]], interval_s: float) -> None:
    """Push for ever, each cycle planned from the start of the last.

    A cycle that fails is logged, and the next one tried at its time. Raises RefusedError when the source is fenced:
    then nothing of it may reach the receiver any more, and going on would only hide that.
    """
    while True:
        started = trio.current_time()
        try:
            await push_one(Want.RUN)
        except (ReplicatorError, PersistenceError, OSError) as error:
            if is_fenced(error):
                raise
            _logger.error("this cycle failed: %s", explain(error).text)
        due = next_start(started, trio.current_time(), interval_s, random.random())
        await trio.sleep_until(due)


def is_fenced(error: Exception) -> bool:
    """Whether a push was refused because the VM failed over: no later cycle can succeed."""
    if isinstance(error, PeerRefusedError):
        return error.code == "stale-epoch"
    return isinstance(error, FencedError)


__all__ = ["Host", "cycles", "is_fenced", "push", "run", "seed"]
