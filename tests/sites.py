# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source and a receiver in one test process: real sockets, real logs, real files; image sources that a test writes to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import trio

from receiver.service.sessions import PushServer
from receiver.store.stores import Stores
from receiver.store.vm_store import VmStore
from replicator import durable
from replicator.config import Config, check
from replicator.credentials import ReceiverCredentials, SourceCredentials
from replicator.credentials.watch import Loaded
from replicator.log import EventLog, open_log
from replicator.push.link import Link
from replicator.push.plan import Want
from replicator.push.pusher import Outcome, Pusher
from replicator.sources.base import Source
from replicator.sources.image import ImageSource
from replicator.wire.keys import Keyring

TOKEN = "5a" * 32
GRAIN = 65536


@dataclass
class ReceiverSite:
    """A receiver that listens on a port of the loopback; see ``receiver_site``."""

    config: Config
    log: EventLog
    stores: Stores
    server: PushServer
    port: int

    @property
    def store(self) -> VmStore:
        """The only VM's store."""
        (store,) = self.stores.all
        return store

    async def settled(self) -> VmStore:
        """The only VM's store, once nothing is left to apply or to let go of."""
        store = self.store
        while not store.settled.is_set():
            await store.settled.wait()
        return store

    async def read(self, number: int | None, disk: str = "disk-0") -> bytes:
        """A whole disk of a point."""
        async with self.store.hold(number) as point:
            found = point.disk(disk)
            assert found is not None
            async with self.store.open_disk(point, found) as view:
                return await view.read(0, view.size)


class _Given(ReceiverCredentials):
    """A test's own keys."""

    def __init__(self, config: Config, keys: Keyring) -> None:
        self._given = keys
        super().__init__(config)

    def _load(self) -> Loaded:
        return Loaded(self._given, None)


@asynccontextmanager
async def receiver_site(
    folder: Path,
    *,
    keys: Keyring | None = None,
    listeners: list[trio.SocketListener] | None = None,
    **options: str,
) -> AsyncIterator[ReceiverSite]:
    """A receiver with its state in ``folder`` (made if needed), stopped at the end as a crash would leave it.

    It listens on a port of its own unless ``listeners`` are given.
    """
    await trio.Path(folder).mkdir(exist_ok=True)
    values = {"state_dir": str(folder), "dr_auth_token": TOKEN, "source": "image"}
    config = check(values | options)
    async with open_log(folder / "events") as log, trio.open_nursery() as nursery:
        stores = Stores(config, log, nursery)
        await stores.start()
        credentials = ReceiverCredentials(config) if keys is None else _Given(config, keys)
        server = PushServer(stores, credentials, config.dr_timeout)
        if listeners is None:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = int(listeners[0].socket.getsockname()[1])
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        try:
            yield ReceiverSite(config, log, stores, server, port)
        finally:
            nursery.cancel_scope.cancel()


@dataclass
class SourceSite:
    """A VM of plain images that pushes to a port; see ``source_site``."""

    config: Config
    log: EventLog
    source: Source
    pusher: Pusher
    disks: dict[str, Path] = field(default_factory=dict)

    @property
    def uuid(self) -> UUID:
        """The only VM's UUID; it must have been pushed once."""
        (vm,) = self.log.vms
        return UUID(vm.vm)

    async def push(self, want: Want = Want.RUN) -> Outcome:
        """One push, to its end."""
        return await self.pusher.push(want)

    def write(self, disk: str, offset: int, data: bytes) -> None:
        """Change a disk as its VM would; beyond the end it grows."""
        with self.disks[disk].open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def content(self, disk: str) -> bytes:
        """What the disk holds now."""
        return self.disks[disk].read_bytes()


@asynccontextmanager
async def source_site(
    folder: Path,
    port: int,
    disks: Mapping[str, Path],
    *,
    token: str = TOKEN,
    name: str = "web",
    **options: str,
) -> AsyncIterator[SourceSite]:
    """A source with its state in ``folder`` (made if needed)."""
    await trio.Path(folder).mkdir(exist_ok=True)
    values = {
        "state_dir": str(folder),
        "dr_auth_token": token,
        "source": "image",
        "dr_host": "127.0.0.1",
        "dr_port": str(port),
    }
    config = check(values | options)
    await trio.to_thread.run_sync(durable.make_dir, config.work_path)
    async with open_log(folder / "events") as log:
        source = ImageSource(name, disks, config.work_path, GRAIN)
        pusher = Pusher(config, log, source, Link(config, SourceCredentials(config)))
        yield SourceSite(config, log, source, pusher, dict(disks))
