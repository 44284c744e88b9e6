# SPDX-License-Identifier: AGPL-3.0-or-later
"""A host that pushes several VMs without a Prism: a list that the test changes, and plain images as their disks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.cli.prism_vms import PrismSet
from replicator.cli.source import OpenSources
from replicator.config import Config
from replicator.errors import SourceError
from replicator.log import EventLog
from replicator.prism.types import Cluster, VmSummary
from replicator.sources.base import Source
from replicator.sources.image import ImageSource
from replicator.sources.selection import is_one_vm
from tests.sites import GRAIN

CLUSTER = "0005b6f1-0000-0000-0000-0000000000aa"


@dataclass
class FakePrism:
    """What a selection asks of a Prism. ``broken``: why it does not answer."""

    listed: list[VmSummary] = field(default_factory=list)
    broken: str | None = None
    asked: int = 0

    async def vms(self) -> Sequence[VmSummary]:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.broken is not None:
            raise SourceError(self.broken)
        return list(self.listed)

    async def clusters(self) -> Sequence[Cluster]:
        await trio.lowlevel.checkpoint()
        return [Cluster(CLUSTER, "cluster-a", None, None, "7.3", available=True)]


@dataclass
class Several:
    """Implements ``Sources`` over images in ``folder``."""

    folder: Path
    config: Config | None = None
    prism: FakePrism = field(default_factory=FakePrism)
    api_errors: Callable[[], dict[str, int]] = lambda: {"vmm/ahv/config/vms": 2}
    attach_failures: Callable[[], int] = lambda: 1

    @property
    def one(self) -> bool:
        assert self.config is not None
        return is_one_vm(self.config.vm)

    async def add(self, name: str, content: bytes) -> str:
        """A VM with one disk; its UUID."""
        self.image(name).write_bytes(content)
        identity = await self._source(name, self.folder).identify()
        vm = VmSummary(str(identity.uuid), name, CLUSTER, "ON")
        self.prism.listed.append(vm)
        return vm.uuid

    def image(self, name: str) -> Path:
        return self.folder / f"{name}.raw"

    def _source(self, name: str, work: Path) -> ImageSource:
        return ImageSource(name, {"disk-0": self.image(name)}, work, GRAIN)

    @asynccontextmanager
    async def open(self, log: EventLog, retry_s: float | None = None) -> AsyncIterator[OpenSources]:
        del log, retry_s
        await trio.lowlevel.checkpoint()
        config = self.config
        assert config is not None

        def make(vm: VmSummary) -> Source:
            return self._source(vm.name, config.work_path / vm.uuid)

        prism: Any = self.prism
        yield PrismSet(config, prism, make)

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the commands find their VMs here."""

        def find(config: Config) -> Several:
            self.config = config
            return self

        monkeypatch.setattr("replicator.cli.pushing.find_sources", find)
        monkeypatch.setattr("replicator.cli.estimating.find_sources", find)
