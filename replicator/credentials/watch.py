# SPDX-License-Identifier: AGPL-3.0-or-later
"""Credentials in files that may change while the process runs: looked at again, and read again when they changed."""

from __future__ import annotations

import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import trio

from replicator.config import Config
from replicator.credentials.certificates import (
    Certificates,
    Validity,
    certificate_paths,
    load_validities,
)
from replicator.credentials.keys import key_paths
from replicator.errors import UsageError
from replicator.wire.keys import Keyring

_logger = logging.getLogger(__name__)

#: What a file was when it was looked at: modified, changed, size, mode, device, inode. None: it could not be looked at.
_Look = dict[Path, tuple[int, ...] | None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """All that one side proves or accepts, read at one time."""

    keys: Keyring
    certificates: Certificates | None

    def __str__(self) -> str:
        # The beginning of what a key's holder names it by on the wire, in the open: no secret.
        found = [f"key {key.name} (fingerprint {key.hint[:4].hex()})" for key in self.keys.values()]
        if self.certificates is not None:
            found += [str(self.certificates.own), str(self.certificates.authority)]
        return ", ".join(found)


class Credentials:
    """The credentials of one side. Reading them at first raises UsageError; later, what was read before stays in use.

    ``trouble`` says why the files as they are now cannot be used; None if they can. Only files are read again: keys that
    stand in the configuration itself hold as long as the process lives.
    """

    #: What is said behind the warning of a certificate of this side that does not hold.
    _CONSEQUENCE: ClassVar[str] = ""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = trio.Lock()
        # Before reading: what changes meanwhile is seen as changed the next time.
        self._seen = self._look()
        self._loaded = self._load()
        self.trouble: str | None = None

    def _load(self) -> Loaded:
        """Read everything anew. Raises UsageError. Blocks."""
        raise NotImplementedError

    @property
    def loaded(self) -> Loaded:
        """What is in use."""
        return self._loaded

    def summary(self) -> str:
        """What is in use, in a few words."""
        count = len(self._loaded.keys)
        found = [] if not count else [f"{count} {'key' if count == 1 else 'keys'}"]
        if self._loaded.certificates is not None:
            found.append("mTLS")
        return " and ".join(found)

    async def refresh(self) -> None:
        """Read the files again if they changed since they were last read. What is wrong with them is logged, once a change."""
        await trio.lowlevel.checkpoint()
        # In this thread: a look costs about 2 us a file, a hop to another thread 100.
        if self._look() != self._seen:
            async with self._lock:
                if (seen := self._look()) != self._seen:
                    await self._take(seen)

    async def reload(self) -> None:
        """Read the files again in any case, and log what is in use."""
        async with self._lock:
            await self._take(self._look())
        self.tell()

    def tell(self) -> None:
        """Log what an operator should look at: as an error where a certificate does not hold."""
        now = time.time()
        for each in self._validities():
            if (line := self._warning(each, now)) is not None:
                level = logging.WARNING if each.fault(now) is None else logging.ERROR
                _logger.log(level, "%s", line)

    def _warning(self, validity: Validity, now: float) -> str | None:
        line = validity.warning(now)
        held = self._loaded.certificates
        if line is None or held is None or validity is not held.own or not validity.fault(now):
            return line
        return line + self._CONSEQUENCE

    async def _take(self, seen: _Look) -> None:
        self._seen = seen
        try:
            self._loaded = await trio.to_thread.run_sync(self._load)
        except UsageError as error:
            self.trouble = str(error)
            _logger.error(
                "credentials cannot be read again, those read before stay in use: %s", error
            )
        else:
            self.trouble = None
            _logger.info("credentials in use: %s", self._loaded)

    def _look(self) -> _Look:
        paths = [*certificate_paths(self._config), *key_paths(self._config)]
        return {path: _stamp(path) for path in paths}

    def expires(self) -> list[tuple[str, float]]:
        """File and end of validity (Unix seconds) of each certificate file in use."""
        return [(str(each.path), each.not_after) for each in self._validities()]

    def warnings(self, now: float) -> list[str]:
        """What an operator should look at, one line each: files that cannot be read again, certificates near their end."""
        found = [f"credentials were not read again: {self.trouble}"] if self.trouble else []
        lines = (self._warning(each, now) for each in self._validities())
        return found + [line for line in lines if line is not None]

    def _validities(self) -> list[Validity]:
        held = self._loaded.certificates
        return [] if held is None else [held.own, held.authority]


def expiry_warnings(config: Config, now: float) -> list[str]:
    """What ``status`` says of the certificates where no process with them can be asked; needs no key. Blocks."""
    try:
        lines = (each.warning(now) for each in load_validities(config))
        return [line for line in lines if line is not None]
    except UsageError as error:
        return [str(error)]


async def reload_on_hangup(
    credentials: Credentials, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Reload at each SIGHUP, for ever."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            await credentials.reload()


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # reading it says why
    return (
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_size,
        status.st_mode,
        status.st_dev,
        status.st_ino,
    )
