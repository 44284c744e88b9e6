# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which of a few folders of state a restore has to itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from bacula_adapter.state import JobState, folder_of, open_job_state
from replicator.config import Config
from replicator.errors import RefusedError

#: Restores at once on one host.
SLOTS: Final = 8
_FOLDER: Final = "restores"
#: In a slot's folder while a restore is at work there; longer if it is killed.
_DIRTY: Final = "at-work"


@asynccontextmanager
async def open_slot(config: Config) -> AsyncIterator[JobState]:
    """The first folder that no other restore has; before all those that a restore left without cleaning up."""
    numbers = sorted(
        range(SLOTS),
        key=lambda n: (not (folder_of(config, _FOLDER, str(n)) / _DIRTY).exists(), n),
    )
    async with AsyncExitStack() as stack:
        for number in numbers:
            try:
                state = await stack.enter_async_context(
                    open_job_state(config, _FOLDER, str(number))
                )
            except RefusedError:
                continue
            mark = state.config.state_dir / _DIRTY
            await trio.to_thread.run_sync(mark.touch)
            yield state
            await trio.to_thread.run_sync(_forget, mark)
            return
    raise RefusedError(
        f"{SLOTS} restores are at work on this host already: wait for one of them to end"
    )


def _forget(mark: Path) -> None:
    mark.unlink(missing_ok=True)


__all__ = ["SLOTS", "open_slot"]
