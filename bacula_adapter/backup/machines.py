# SPDX-License-Identifier: AGPL-3.0-or-later
"""From the configuration to the VMs that a Bacula job backs up, and the source of each."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final
from uuid import UUID

import trio

from bacula_adapter.backup.machine import Loss, Machine, Machines, given
from replicator.addresses import IQN_BYTES_MAX
from replicator.cli.source import make_source
from replicator.config import Config, parse_image_disks
from replicator.errors import SourceError, UsageError
from replicator.log.chains import FOLDER
from replicator.sources.snapshot_names import socket_key

if TYPE_CHECKING:
    from replicator.log import EventLog
    from replicator.prism.api import Prism
    from replicator.prism.types import Secrets, VmSummary
    from replicator.sources.base import Source

_logger = logging.getLogger(__name__)

#: What no name in Bacula's catalogue may have.
_FORBIDDEN: Final = re.compile(r"[/\0-\x1f\x7f]")
_DAY_S: Final = 86_400


def open_machines(config: Config, job: str) -> AbstractAsyncContextManager[Machines]:
    """Where the VMs are that ``job``, a job of the Director's configuration, backs up.

    Raises UsageError that names the key; opening it raises SourceError.
    """
    if config.from_ == "replica":
        from bacula_adapter.backup.replica import open_replicas  # noqa: PLC0415 - few jobs need it

        return open_replicas(config)
    if config.source == "nutanix":
        return _open_nutanix(config, job)
    return _open_one(config)


def folder_name(name: str, uuid: str, taken: set[str]) -> str:
    """What a VM is called among Bacula's names, as no other in ``taken``: its name, or where that cannot be, with its UUID."""
    found = _FORBIDDEN.sub("_", name)[:200]
    if found in (".", "..", "") or found in taken:
        found = f"{found} ({uuid})"
    taken.add(found)
    return found


# One VM: images, QEMU


@asynccontextmanager
async def _open_one(config: Config) -> AsyncIterator[Machines]:
    await trio.lowlevel.checkpoint()
    yield _One(config)


class _One:
    """The VM of a host whose ``source`` is image or qemu."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._source = make_source(config)

    async def select(self) -> Sequence[Machine]:
        """See ``Machines``."""
        identity = await self._source.identify()
        machine = Machine(
            root=f"@{self._config.source}",
            folder=folder_name(identity.name, str(identity.uuid), set()),
            name=identity.name,
            uuid=identity.uuid,
            open_source=_open_own,
            loss=Loss.ALWAYS if self._config.source == "image" else Loss.FULL,
            disks=self._disks,
        )
        if self._config.qemu_socket is not None and self._config.source == "qemu":
            key = socket_key(self._config.qemu_socket)
            alone = self._config.state_dir / FOLDER / f"qemu-{key}.lock"
            machine = replace(machine, push_id=_qemu_push, alone=alone)
        return [machine]

    async def query(self, parameter: str) -> Sequence[tuple[str, str]]:
        """See ``Machines``."""
        await trio.lowlevel.checkpoint()
        raise UsageError(
            f"query: {parameter} is not known with source = {self._config.source} (vm)"
        )

    async def _disks(self) -> Sequence[tuple[str, int]]:
        if self._config.source == "image":
            return await trio.to_thread.run_sync(_image_sizes, self._config.image_disks)
        from replicator.sources.qemu_inventory import find_disks, take_inventory  # noqa: PLC0415 - only for QEMU
        from replicator.sources.qmp import open_qmp  # noqa: PLC0415 - the same

        assert self._config.qemu_socket is not None
        async with open_qmp(self._config.qemu_socket) as qmp:
            found = await find_disks(qmp, await take_inventory(qmp))
        return [(disk.identity, disk.node.size) for disk in found]


def _image_sizes(disks: str) -> list[tuple[str, int]]:
    """Identity and size of each image. Blocks."""
    found = []
    for identity, path in sorted(parse_image_disks(disks).items()):
        with path.open("rb") as file:
            found.append((identity, file.seek(0, os.SEEK_END)))
    return found


def _open_own(own: Config, log: EventLog) -> AbstractAsyncContextManager[Source]:
    """The source with a working directory, and names in QEMU, of this chain alone."""
    del log
    return given(make_source(own, _family(own)))


def _family(own: Config) -> str:
    """What the ids of a chain's snapshots in QEMU begin with."""
    return hashlib.sha256(bytes(own.state_dir)).hexdigest()[:5]


def _qemu_push(own: Config) -> str:
    return f"{_family(own)}.{secrets.token_hex(8)}"


# Nutanix


@asynccontextmanager
async def _open_nutanix(config: Config, job: str) -> AsyncIterator[Machines]:
    from replicator.prism.discovery import open_prism  # noqa: PLC0415 - loads TLS and HTTP
    from replicator.prism_access import prism_settings  # noqa: PLC0415 - the same
    from replicator.sources.nutanix.site import make_secrets  # noqa: PLC0415 - the same

    settings = await trio.to_thread.run_sync(prism_settings, config)
    async with open_prism(settings) as prism:
        yield _Behind(config, job, prism, make_secrets(config.iscsi_chap))


class _Behind:
    """The VMs that ``vm``, ``exclude`` and ``cluster`` choose behind one Prism; one client for all of them."""

    def __init__(self, config: Config, job: str, prism: Prism, chap: Secrets | None) -> None:
        self._config = config
        self._job = job
        self._prism = prism
        # An initiator has one secret on a cluster: all VMs of this process share it, and no other process has that name.
        self._chap = chap
        self._initiator: str | None = None

    async def select(self) -> Sequence[Machine]:
        """See ``Machines``. Warns of a VM that ``vm`` names and that is not there."""
        from replicator.sources.selection import entries, select  # noqa: PLC0415 - as above

        config, prism = self._config, self._prism
        if not entries(config.vm):
            raise UsageError("vm: names no VM; * takes every one")
        clusters = await prism.clusters() if config.cluster else ()
        found = select(
            await prism.vms(),
            clusters,
            vm=config.vm,
            exclude=config.exclude,
            cluster=config.cluster,
        )
        for entry in found.missing:
            _logger.warning("vm: Prism lists no VM %s", entry)
        labels, taken = found.labels, set[str]()
        return [self._machine(vm, folder_name(labels[vm.uuid], vm.uuid, taken)) for vm in found.vms]

    def _machine(self, vm: VmSummary, folder: str) -> Machine:
        try:
            uuid = UUID(vm.uuid)
        except ValueError:
            raise SourceError(f"Prism lists VM {vm.name!r} under {vm.uuid!r}: no UUID") from None
        return Machine(
            root="@nutanix",
            folder=folder,
            name=vm.name,
            uuid=uuid,
            open_source=partial(self._open_vm, vm),
            hardware=partial(self._prism.hardware, vm.uuid),
            disks=partial(self._disks, vm.uuid),
        )

    async def query(self, parameter: str) -> Sequence[tuple[str, str]]:
        """See ``Machines``: ``cluster`` lists the clusters behind Prism."""
        if parameter != "cluster":
            raise UsageError(f"query: {parameter} is not known with source = nutanix (vm, cluster)")
        return [("cluster", f"{each.name} {each.uuid}") for each in await self._prism.clusters()]

    async def _disks(self, uuid: str) -> Sequence[tuple[str, int]]:
        from replicator.sources.nutanix import plan  # noqa: PLC0415 - as above

        return [(disk.identity, disk.size) for disk in plan.disks_of(await self._prism.vm(uuid))]

    @asynccontextmanager
    async def _open_vm(self, vm: VmSummary, own: Config, log: EventLog) -> AsyncIterator[Source]:
        from replicator.addresses import parse_dsip  # noqa: PLC0415 - loads iSCSI
        from replicator.iscsi import Portal  # noqa: PLC0415 - the same
        from replicator.sources.nutanix import (  # noqa: PLC0415 - the same
            NutanixSettings,
            NutanixSource,
            open_site,
        )

        if self._initiator is None:
            self._initiator = await trio.to_thread.run_sync(job_initiator, self._config, self._job)
        portal = parse_dsip(own.dsip)
        settings = NutanixSettings(
            initiator=self._initiator,
            working_dir=own.work_path,
            data_services=None if portal is None else Portal(*portal),
            application_consistent=own.application_consistent,
            data_path=own.data_path,
            chap=own.iscsi_chap,
            concurrent_disks=own.concurrent_disks,
            interval_s=_DAY_S,
            outage_s=own.backup_reference_days * _DAY_S,
        )
        async with open_site(self._prism, log, settings) as site:
            site.chap = self._chap
            # The ledger knows all that a job of this chain has begun. To look for more on all clusters, VM by VM, would
            # cost more requests than the backup; `replctl owned` does it.
            site.looked_around = True
            yield NutanixSource(site, vm.uuid, vm.name)


def job_initiator(config: Config, job: str) -> str:
    """The name by which a Bacula job logs in to iSCSI targets: this host's, and something of the job's. Blocks, briefly."""
    from replicator.prism_access import initiator_name  # noqa: PLC0415 - loads Prism's client

    tail = "-b" + hashlib.sha256(job.encode()).hexdigest()[:8]
    name = initiator_name(config)
    return name[: IQN_BYTES_MAX - len(tail)].rstrip("-.:") + tail


__all__ = ["folder_name", "job_initiator", "open_machines"]
