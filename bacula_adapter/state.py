# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where the backend keeps what outlives a job: a folder below ``state_dir/bacula`` with a log, a journal and maps of its own.

A folder belongs to one backend at a time, so that several jobs run beside each other, and beside `replctl run`: a folder a
Bacula job and VM for backups, a few for restores.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

import msgspec
import trio

from replicator import durable
from replicator.config import Config
from replicator.errors import RefusedError
from replicator.log import EventLog, chains, open_log
from replicator.state_dir import check_directory, open_state_dir

#: Below the state directory and the working directory.
FOLDER = chains.FOLDER
#: Of backups: below it a folder for each of Bacula's jobs, in that one for each VM.
JOBS = chains.JOBS


class HeldError(RefusedError):
    """Another process has the folder; the message says which."""


@dataclass(frozen=True, slots=True)
class JobState:
    """An open folder. ``config``: the host's, with the state and working directories of this folder alone."""

    config: Config
    log: EventLog


def folder_of(config: Config, *parts: str) -> Path:
    """The folder that ``open_job_state`` opens; a part may be any text."""
    return config.state_dir.joinpath(FOLDER, *(_safe(part) for part in parts))


@asynccontextmanager
async def open_job_state(config: Config, *parts: str) -> AsyncIterator[JobState]:
    """Hold a folder alone, made if need be. Raises RefusedError while another process has it, UsageError, StateError."""
    async with hold_job_state(config, *parts) as own, open_log(own.state_dir / "events") as log:
        yield JobState(own, log)


@asynccontextmanager
async def hold_job_state(config: Config, *parts: str) -> AsyncIterator[Config]:
    """The same, with its log closed: open it in ``state_dir/events`` of the configuration that this yields, when it is needed."""
    folder = folder_of(config, *parts)
    # Short, and of a length that does not depend on names: a Unix socket may have to go there.
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    work = config.work_path.joinpath(FOLDER, name)
    own = msgspec.structs.replace(config, state_dir=folder, working_dir=work)
    await trio.to_thread.run_sync(partial(_make, config, folder, work))
    with ExitStack() as held:
        try:
            held.enter_context(open_state_dir(folder))
        except RefusedError as error:
            raise HeldError(str(error)) from None
        yield own


def _make(config: Config, folder: Path, work: Path) -> None:
    for key, root, path in (
        ("state_dir", config.state_dir, folder.parent),
        ("working_dir", config.work_path, work),
    ):
        check_directory(root, key)
        durable.make_dir(root)
        for parent in reversed([path, *path.parents]):
            if parent != root and root in parent.parents:
                durable.make_dir(parent)


def _safe(part: str) -> str:
    """A file name for any text, the same for no other text."""
    name = quote(part, safe=" @+,=()")
    return name.replace(".", "%2E") if name.strip(".") == "" else name


__all__ = [
    "FOLDER",
    "JOBS",
    "HeldError",
    "JobState",
    "folder_of",
    "hold_job_state",
    "open_job_state",
]
