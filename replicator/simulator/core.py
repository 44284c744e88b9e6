# SPDX-License-Identifier: AGPL-3.0-or-later
"""The one place where the simulated world changes: what both APIs can have done.

Each action checks what was asked, raises HttpError for what can be refused at once, then starts a task that does it.
``common`` of every action: ``request_id``, ``owner``, ``cluster``, ``task_uuid``; see ``Engine.start``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from replicator import durable
from replicator.nursery import flat_nursery
from replicator.simulator.core_groups import GroupActions
from replicator.simulator.core_images import ImageActions
from replicator.simulator.core_snapshots import SnapshotActions
from replicator.simulator.engine import Engine
from replicator.simulator.faults import Faults
from replicator.simulator.model import AffectedEntity, Entity, Snapshot, Task, World
from replicator.simulator.sources import DiskSource, Sources
from replicator.simulator.storage import Storage
from replicator.simulator.targets import Targets
from replicator.simulator.web import HttpError

WORLD_FILE = "world.json"
_WORLD_MAX = 256 << 20
_EXPIRY_LOOK_S = 1.0
#: How each collection of the world is called in tasks.
KINDS = {
    "clusters": "cluster",
    "containers": "container",
    "subnets": "subnet",
    "vms": "vm",
    "snapshots": "snapshot",
    "volume_groups": "volume_group",
    "images": "image",
    "users": "user",
    "roles": "role",
}


class Core(SnapshotActions, GroupActions, ImageActions):
    """The world, its files, its tasks and its targets. Made by ``open_core``."""

    def __init__(
        self, world: World, directory: Path, nursery: trio.Nursery, faults: Faults, targets: Targets
    ) -> None:
        self.world = world
        self.directory = directory
        self.faults = faults
        self.targets = targets
        self.storage = Storage(directory)
        self.sources = Sources(world, self.storage)
        self.engine = Engine(world, nursery, faults, self.save)
        #: Knobs of both APIs, as ``docs/simulator.md`` lists them.
        self.knobs: dict[str, Any] = {}
        self._dirty = True

    def save(self) -> None:
        """The world has changed: it is written down soon."""
        self._dirty = True

    def write_down(self) -> None:
        """Write the world to the directory, if it has changed. Blocks, briefly."""
        if self._dirty:
            self._dirty = False
            durable.write_file(self.directory / WORLD_FILE, msgspec.json.encode(self.world))

    async def _write_down_soon(self) -> None:
        """As ``write_down``, but nobody waits for the disk."""
        if self._dirty:
            self._dirty = False
            data = msgspec.json.encode(self.world)
            await trio.to_thread.run_sync(durable.write_file, self.directory / WORLD_FILE, data)

    def get(self, collection: str, uuid: str) -> Any:
        """An entity by its id. Raises HttpError 404."""
        found = getattr(self.world, collection).get(uuid)
        if found is None:
            raise HttpError(
                404, f"no {KINDS.get(collection, collection)} with the id {uuid}", "not_found"
            )
        return found

    def put_entity(self, collection: str, entity: Entity, **common: Any) -> Task:
        """Add or replace an entity that needs nothing else."""

        async def work(task: Task) -> None:
            del task
            self.touch(entity)
            getattr(self.world, collection)[entity.uuid] = entity
            await trio.lowlevel.checkpoint()

        affected = [AffectedEntity(kind=KINDS[collection], uuid=entity.uuid, name=entity.name)]
        return self.engine.start(f"Put{KINDS[collection].title()}", affected, work, **common)

    def delete_entity(self, collection: str, uuid: str, **common: Any) -> Task:
        """Remove an entity that holds nothing else."""
        entity = self.get(collection, uuid)

        async def work(task: Task) -> None:
            del task
            getattr(self.world, collection).pop(uuid, None)
            await trio.lowlevel.checkpoint()

        affected = [AffectedEntity(kind=KINDS[collection], uuid=uuid, name=entity.name)]
        return self.engine.start(f"Delete{KINDS[collection].title()}", affected, work, **common)

    async def keep_time(self) -> None:
        """Let snapshots expire and write the world down; for ever."""
        while True:
            now = time.time()
            gone = [s for s in self.world.snapshots.values() if _expired(s, now)]
            for snapshot in gone:
                await self.forget_snapshot(snapshot)
            await self._write_down_soon()
            await trio.sleep(_EXPIRY_LOOK_S)


def _expired(snapshot: Snapshot, now: float) -> bool:
    return snapshot.expires_at is not None and snapshot.expires_at <= now


def load_world(directory: Path) -> World | None:
    """The world of an earlier run; tasks that were under way have failed. None if there is none. Raises ValueError."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with (directory / WORLD_FILE).open("rb") as file:
            world = msgspec.json.decode(file.read(_WORLD_MAX), type=World)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ValueError(f"{directory / WORLD_FILE} is damaged: {error}") from error
    for task in world.tasks.values():
        if task.completed_at is None:
            task.status, task.completed_at, task.progress = "FAILED", time.time(), 100
    return world


@asynccontextmanager
async def open_core(
    directory: Path,
    make_world: Callable[[], World],
    *,
    iscsi_port: int = 3260,
    prepare: Callable[[Core], None] | None = None,
) -> AsyncIterator[Core]:
    """The world of an earlier run in ``directory``, or a new one; ``prepare`` gives a new one's disks their bytes.

    What is under way is cancelled, targets end and the world is written down when the block ends, however it does.
    """
    world = await trio.to_thread.run_sync(load_world, directory)
    fresh = world is None
    world = make_world() if world is None else world
    targets = Targets(iscsi_port)
    core: Core | None = None
    try:
        async with flat_nursery() as nursery:
            core = Core(world, directory, nursery, Faults(), targets)
            if fresh and prepare is not None:
                await trio.to_thread.run_sync(prepare, core)
            await core.restore_targets()
            nursery.start_soon(core.keep_time)
            yield core
            nursery.cancel_scope.cancel()
    finally:
        # When nothing of it runs any more: a thread may still have been writing.
        targets.close()
        if core is not None:
            core.save()
            core.write_down()


__all__ = ["Core", "DiskSource", "load_world", "open_core"]
