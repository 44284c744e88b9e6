# SPDX-License-Identifier: AGPL-3.0-or-later
"""The VMs behind one Prism that this host pushes: which they are, and their sources, over one client."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import UUID

import msgspec
import trio

from replicator.addresses import parse_dsip
from replicator.cli.source import ChosenVm, OpenSources
from replicator.config import Config
from replicator.errors import SourceError, UsageError
from replicator.iscsi import Portal
from replicator.log import EventLog
from replicator.prism.api import Prism
from replicator.prism.discovery import open_prism
from replicator.prism.errors import (
    PrismAuthError,
    PrismError,
    PrismPermissionError,
    PrismTlsError,
)
from replicator.prism.meters import Meters
from replicator.prism.types import Cluster, VmSummary
from replicator.prism_access import initiator_name, prism_settings
from replicator.sources.base import Source
from replicator.sources.nutanix import NutanixSettings, NutanixSite, NutanixSource, open_site
from replicator.sources.selection import entries, is_one_vm, select

_logger = logging.getLogger(__name__)

#: What trying again does not help against.
_LASTING = (PrismAuthError, PrismPermissionError, PrismTlsError)


class PrismSources:
    """The VMs that ``vm``, ``exclude`` and ``cluster`` choose behind one Prism; one client for all of them."""

    def __init__(self, config: Config) -> None:
        if not entries(config.vm):
            raise UsageError("vm: names no VM; * takes every one")
        self._config = config
        self._settings = prism_settings(config)
        self._meters = Meters()
        self._site: NutanixSite | None = None
        self.one = is_one_vm(config.vm)

    @property
    def api_errors(self) -> Callable[[], dict[str, int]]:
        """See ``Sources``."""
        return lambda: dict(self._meters.errors)

    @property
    def attach_failures(self) -> Callable[[], int]:
        """See ``Sources``."""
        return lambda: 0 if self._site is None else self._site.attach_failures

    @asynccontextmanager
    async def open(self, log: EventLog, retry_s: float | None = None) -> AsyncIterator[OpenSources]:
        """See ``Sources``. Raises PrismError."""
        settings = await trio.to_thread.run_sync(_nutanix_settings, self._config)
        async with AsyncExitStack() as stack:
            prism: Prism | None = None
            while prism is None:
                try:
                    prism = await stack.enter_async_context(
                        open_prism(self._settings, self._meters)
                    )
                except PrismError as error:
                    if retry_s is None or isinstance(error, _LASTING):
                        raise
                    _logger.error("%s; trying again in %.0f s", error, retry_s)
                    await trio.sleep(retry_s)
            self._site = await stack.enter_async_context(open_site(prism, log, settings))
            site = self._site

            def make(vm: VmSummary) -> Source:
                return NutanixSource(site, vm.uuid, vm.name)

            yield PrismSet(self._config, prism, make)


def _nutanix_settings(config: Config) -> NutanixSettings:
    """How VMs are read; blocks, briefly. Raises StateError where this host's initiator name cannot be had."""
    portal = parse_dsip(config.dsip)
    return NutanixSettings(
        initiator=initiator_name(config),
        working_dir=config.work_path,
        data_services=None if portal is None else Portal(*portal),
        application_consistent=config.application_consistent,
        data_path=config.data_path,
        chap=config.iscsi_chap,
        concurrent_disks=config.concurrent_disks,
        interval_s=config.push_interval,
        # As long as anything of ours may be held: then a reference is let go of anyway.
        outage_s=config.held_snapshot_hours * 3600,
    )


class PrismSet:
    """See ``OpenSources``. ``make`` gives the source of a VM."""

    def __init__(self, config: Config, prism: Prism, make: Callable[[VmSummary], Source]) -> None:
        self._config = config
        self._prism = prism
        self._make = make
        self._clusters: Sequence[Cluster] = ()
        self._sources: dict[UUID, tuple[Source, Config]] = {}
        self._missing: set[str] = set()

    async def select(self) -> Sequence[ChosenVm]:
        """See ``OpenSources``. Warns once of a VM that ``vm`` names and that is not there."""
        config = self._config
        if config.cluster and not self._clusters:
            self._clusters = await self._prism.clusters()
        found = select(
            await self._prism.vms(),
            self._clusters,
            vm=config.vm,
            exclude=config.exclude,
            cluster=config.cluster,
        )
        for entry in found.missing:
            if entry not in self._missing:
                _logger.warning("vm: Prism lists no VM %s", entry)
        self._missing = set(found.missing)
        labels = found.labels
        chosen = [self._chosen(vm, labels[vm.uuid]) for vm in found.vms]
        here = {vm.uuid for vm in chosen}
        self._sources = {uuid: made for uuid, made in self._sources.items() if uuid in here}
        return chosen

    def _chosen(self, vm: VmSummary, label: str) -> ChosenVm:
        try:
            uuid = UUID(vm.uuid)
        except ValueError:
            raise SourceError(f"Prism lists VM {vm.name!r} under {vm.uuid!r}: no UUID") from None
        made = self._sources.get(uuid)
        if made is None:
            work = self._config.work_path / str(uuid)
            own = msgspec.structs.replace(self._config, working_dir=work)
            made = self._sources[uuid] = (self._make(vm), own)
        return ChosenVm(label, vm.name, uuid, *made)


__all__ = ["PrismSet", "PrismSources"]
