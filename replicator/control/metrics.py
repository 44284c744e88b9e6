# SPDX-License-Identifier: AGPL-3.0-or-later
"""The metrics page, in the text format of Prometheus: what the log says, and a few gauges of the process that runs.

A counter is a sum over the log, so that no restart loses it, except where its help says that it counts since the start.
The library is loaded by the first scrape: a process that nobody watches does not pay for it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from replicator.control.server import NotFoundError, Page, serve_tcp
from replicator.domain.backup import LEVELS, BackupPart, Backups
from replicator.domain.failover import State
from replicator.domain.vm import ProtectedVm
from replicator.log import EventLog
from replicator.log.chains import Chain, read_chains
from replicator.log.usage import Usage

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_logger = logging.getLogger(__name__)

PATH = "/metrics"
#: Label values and the sample that they name.
_Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What only the process knows; each is asked at every scrape, and None where this side has no such thing.

    ``throttle_mbps``: the cap, 0 for none. ``reconnects``: by VM, connections made after one that broke. ``expires``: files of
    certificates, and when they expire, seconds since the epoch. ``pushing``: by VM, how much of its disks the push that is under
    way has looked at, from 0 to 1, and the bytes that it has sent. ``shows``: whether a VM of the log is one to speak of.
    ``prism_errors``: by endpoint, answers of Prism that were errors; ``attach_failures``: disks that could not be attached.
    """

    throttle_mbps: Callable[[], int] | None = None
    reconnects: Callable[[], Mapping[str, int]] | None = None
    expires: Callable[[], Iterable[tuple[str, float]]] | None = None
    pushing: Callable[[], Mapping[str, tuple[float, int]]] | None = None
    shows: Callable[[ProtectedVm], bool] = lambda _: True
    prism_errors: Callable[[], Mapping[str, int]] | None = None
    attach_failures: Callable[[], int] | None = None


class Metrics:
    """Makes the page out of ``log`` and ``live``. ``clock``: seconds since the epoch."""

    def __init__(self, log: EventLog, live: Live, clock: Callable[[], float] = time.time) -> None:
        self._log = log
        self._live = live
        self._clock = clock

    async def page(self) -> Page:
        """The page as of now. Raises the event store's errors."""
        usage = await self._log.usage()
        live = self._live
        # Each chain of backups has a log of its own, in the same state directory.
        chains = await trio.to_thread.run_sync(read_chains, self._log.store.folder.parent)
        snapshot = _Snapshot(
            now=self._clock(),
            vms=_with_labels([vm for vm in self._log.vms if live.shows(vm)]),
            usage=usage,
            throttle_mbps=None if live.throttle_mbps is None else live.throttle_mbps(),
            reconnects=None if live.reconnects is None else dict(live.reconnects()),
            expires={} if live.expires is None else _earliest(live.expires()),
            pushing={} if live.pushing is None else dict(live.pushing()),
            prism_errors=None if live.prism_errors is None else dict(live.prism_errors()),
            attach_failures=None if live.attach_failures is None else live.attach_failures(),
            backups=_by_vm(chains),
        )
        return await trio.to_thread.run_sync(_render, snapshot)

    async def handle(self, method: str, target: str, _body: dict[str, Any]) -> Page:
        """Answer ``GET /metrics`` and nothing else."""
        if (method, target.partition("?")[0]) != ("GET", PATH):
            raise NotFoundError(f"only GET {PATH} is answered here")
        return await self.page()


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    """All that one page shows: VMs with their labels, usage by UUID."""

    now: float
    vms: list[tuple[str, ProtectedVm]]
    usage: dict[str, Usage]
    throttle_mbps: int | None
    reconnects: dict[str, int] | None
    expires: dict[str, float]
    pushing: dict[str, tuple[float, int]]
    prism_errors: dict[str, int] | None
    attach_failures: int | None
    backups: dict[str, list[Backups]]

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        yield from self._state()
        yield from self._counters()
        yield from self._process()
        yield from self._platform()
        if self.backups:
            yield from self._backups()

    def _state(self) -> Iterator[Metric]:
        newest = [((label,), vm.newest) for label, vm in self.vms if vm.newest is not None]
        aged = [
            ((label,), vm.aged_from_us(vm.newest) / 1e6)
            for label, vm in self.vms
            if vm.newest is not None
        ]
        received = [((label,), vm) for label, vm in self.vms if vm.role == "receiver"]
        yield _gauge(
            "replicator_rpo_age_seconds",
            "Seconds since the newest recovery point was taken at the source.",
            ("vm",),
            ((key, max(0.0, self.now - since)) for key, since in aged),
        )
        yield _gauge(
            "replicator_rpo_breached",
            "1 while the newest recovery point is older than rpo_target, as far as that is watched.",
            ("vm",),
            (((label,), vm.breach is not None) for label, vm in self.vms),
        )
        yield _gauge(
            "replicator_dr_cycle_bytes_pushed",
            "Bytes that travelled for the newest recovery point.",
            ("vm",),
            ((key, point.bytes_pushed) for key, point in newest),
        )
        yield _gauge(
            "replicator_recovery_points",
            "Recovery points held.",
            ("vm",),
            ((key, len(vm.points)) for key, vm in received),
        )
        yield _gauge(
            "replicator_last_verification_timestamp_seconds",
            "When a recovery point was last read in full and found to be right; 0: never.",
            ("vm",),
            ((key, vm.verified_at_us / 1e6) for key, vm in received),
        )
        yield _gauge(
            "replicator_failover_state",
            "1 for the state that the VM is in, 0 for the others.",
            ("vm", "state"),
            (
                ((label, state.value), vm.state is state)
                for label, vm in self.vms
                for state in State
            ),
        )

    def _counters(self) -> Iterator[Metric]:
        sums = [(label, self.usage.get(vm.vm, Usage())) for label, vm in self.vms]
        yield _counter(
            "replicator_push_bytes",
            "Bytes that travelled for recovery points.",
            ("vm",),
            (((label,), used.bytes_pushed) for label, used in sums),
        )
        yield _counter(
            "replicator_cycles",
            "Pushes that became a recovery point, by kind.",
            ("vm", "kind"),
            (
                ((label, kind), count)
                for label, used in sums
                for kind, count in (("seed", used.seeds), ("cycle", used.cycles))
            ),
        )
        yield _counter(
            "replicator_pushes_abandoned",
            "Pushes that were given up.",
            ("vm",),
            (((label,), used.abandoned) for label, used in sums),
        )
        yield _counter(
            "replicator_damages",
            "Damages found in recovery points.",
            ("vm",),
            (((label,), used.damages) for label, used in sums),
        )

    def _process(self) -> Iterator[Metric]:
        if self.reconnects is not None:
            yield _counter(
                "replicator_dr_reconnect",
                "Connections to the receiver made after one that broke; since the process began.",
                ("vm",),
                (((vm,), count) for vm, count in self.reconnects.items()),
            )
        if self.pushing:
            yield _gauge(
                "replicator_push_progress_ratio",
                "How much of the disks the push that is under way has looked at, from 0 to 1.",
                ("vm",),
                (((vm,), ratio) for vm, (ratio, _) in self.pushing.items()),
            )
            yield _gauge(
                "replicator_push_sent_bytes",
                "Bytes that the push that is under way has sent.",
                ("vm",),
                (((vm,), sent) for vm, (_, sent) in self.pushing.items()),
            )
        if self.throttle_mbps is not None:
            yield _gauge(
                "replicator_throttle_mbps",
                "The cap on what is sent, in Mbit/s; 0: none.",
                (),
                [((), self.throttle_mbps)],
            )
        if self.expires:
            yield _gauge(
                "replicator_certificate_expiry_timestamp_seconds",
                "When a certificate expires.",
                ("file",),
                (((file,), at) for file, at in self.expires.items()),
            )

    def _platform(self) -> Iterator[Metric]:
        if self.prism_errors is not None:
            yield _counter(
                "replicator_prism_api_errors",
                "Requests to Prism that ended in an error; since the process began.",
                ("endpoint",),
                (((endpoint,), count) for endpoint, count in self.prism_errors.items()),
            )
        if self.attach_failures is not None:
            yield _counter(
                "replicator_iscsi_attach_failures",
                "Disks that could not be attached over iSCSI; since the process began.",
                (),
                [((), self.attach_failures)],
            )

    def _backups(self) -> Iterator[Metric]:
        """What Bacula has, of all its jobs that back up a VM from this host."""
        sums: Counter[tuple[str, str]] = Counter()
        last: list[tuple[tuple[str], BackupPart]] = []
        for vm, chains in self.backups.items():
            for each in (each for known in chains for each in known.sums):
                sums[vm, LEVELS.get(each.level, each.level)] += each.bytes_stored
            parts = [known.last for known in chains if known.last is not None]
            if parts:
                last.append(((vm,), max(parts, key=lambda part: part.committed_at_us)))
        yield _counter(
            "replicator_backup_bytes",
            "Bytes of data in backups that Bacula has confirmed, by level.",
            ("vm", "type"),
            sums.items(),
        )
        yield _gauge(
            "replicator_backup_duration_seconds",
            "How long the last backup took, from its snapshot to Bacula's verdict.",
            ("vm",),
            ((key, part.duration_us / 1e6) for key, part in last),
        )
        yield _gauge(
            "replicator_backup_last_success_timestamp_seconds",
            "When the snapshot of the last backup was taken that Bacula has confirmed.",
            ("vm",),
            ((key, part.taken_at_us / 1e6) for key, part in last),
        )
        yield _counter(
            "replicator_backups_failed",
            "Backups that came to nothing.",
            ("vm",),
            (((vm,), sum(known.failed for known in chains)) for vm, chains in self.backups.items()),
        )


def _by_vm(chains: Sequence[Chain]) -> dict[str, list[Backups]]:
    """The backups of each VM, by what it is called on the page."""
    newest = {chain.vm.vm: chain.name for chain in chains}
    names = Counter(newest.values())
    found: dict[str, list[Backups]] = {}
    for chain in chains:
        name = newest[chain.vm.vm]
        label = name if names[name] == 1 else f"{name} ({chain.vm.vm})"
        found.setdefault(label, []).append(chain.backups)
    return found


def _with_labels(vms: list[ProtectedVm]) -> list[tuple[str, ProtectedVm]]:
    """VMs and what they are called on the page: their name, or where two have the same, with the UUID."""
    names = Counter(vm.name for vm in vms)
    return [(vm.name if names[vm.name] == 1 else f"{vm.name} ({vm.vm})", vm) for vm in vms]


def _earliest(expires: Iterable[tuple[str, float]]) -> dict[str, float]:
    """By file; one that is named twice has one sample."""
    found: dict[str, float] = {}
    for file, at in expires:
        found[file] = min(at, found.get(file, at))
    return found


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    from prometheus_client.metrics_core import (  # noqa: PLC0415 - see the module's docstring
        GaugeMetricFamily,
    )

    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    """``name`` without the ``_total`` that the page adds."""
    from prometheus_client.metrics_core import (  # noqa: PLC0415 - see the module's docstring
        CounterMetricFamily,
    )

    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _render(snapshot: _Snapshot) -> Page:
    from prometheus_client import (  # noqa: PLC0415 - see the module's docstring
        CONTENT_TYPE_PLAIN_0_0_4,
        CollectorRegistry,
        generate_latest,
    )

    registry = CollectorRegistry(auto_describe=False)
    registry.register(snapshot)
    return Page(CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry))


async def start_metrics(
    nursery: trio.Nursery, address: tuple[str, int] | None, metrics: Metrics
) -> int | None:
    """Show the page on TCP as well, at the host and port of ``metrics_listen``; returns the port. Raises StateError."""
    if address is None:
        return None
    host, port = address
    bound: int = await nursery.start(serve_tcp, host, port, metrics.handle, "metrics_listen")
    _logger.info("metrics on %s, port %d", host, bound)
    return bound


__all__ = ["PATH", "Live", "Metrics", "start_metrics"]
