# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the parts of ``Core`` share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import trio

from replicator.simulator.engine import Engine
from replicator.simulator.faults import Faults
from replicator.simulator.model import Entity, World
from replicator.simulator.sources import Sources
from replicator.simulator.storage import Storage
from replicator.simulator.targets import Targets
from replicator.simulator.web import HttpError


class CoreBase:
    """The world and what changes it."""

    world: World
    directory: Path
    faults: Faults
    targets: Targets
    storage: Storage
    sources: Sources
    engine: Engine
    knobs: dict[str, Any]

    def save(self) -> None:
        """The world has changed."""
        raise NotImplementedError

    def get(self, collection: str, uuid: str) -> Any:
        """An entity by its id. Raises HttpError 404."""
        raise NotImplementedError

    def touch(self, entity: Entity) -> None:
        """The entity has changed: its version and times say so."""
        now = time.time()
        entity.created_at = entity.created_at or now
        entity.updated_at = now
        entity.version += 1
        self.save()

    def check_name(self, name: str, length_max: int) -> None:
        """Raises HttpError 400 for a name that is none."""
        if not 1 <= len(name) <= length_max:
            raise HttpError(400, f"a name has 1 to {length_max} characters")

    async def remove(self, path: Path) -> None:
        """Unlink a file, if it is there."""
        await trio.to_thread.run_sync(lambda: path.unlink(missing_ok=True))
