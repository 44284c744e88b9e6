# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source's host as processes that can be killed: each line on stdin is a job, which a forked process does.

Answers each line with the process's id, and when it has ended, with its status. The forked process loads nothing any more.
"""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import msgspec

from replicator import durable
from replicator.errors import SnapshotGoneError
from replicator.log import open_log
from replicator.prism import v3, v4  # noqa: F401 - so that they are loaded
from replicator.prism.discovery import open_prism
from replicator.prism.settings import Account, PrismSettings
from replicator.sources.base import Snapshot, SnapshotName
from replicator.sources.nutanix import NutanixSource, open_site
from tests.forking import serve
from tests.sources.nutanix_lab import fake_settings
from tests.sources.simulated import WAITS


class Job(msgspec.Struct, kw_only=True):
    """What a process does: first it comes back as the pusher would, then it makes a cycle of this name.

    ``goes_on``: with a push that was begun, where its snapshot is there.
    """

    host: str
    port: int
    password: str
    ca: str
    api: str
    folder: str
    vm: str
    push_id: str
    goes_on: bool = False


class Host:
    """What lies on the disk of the source's host: the log, the replica in place of a receiver, and the names of pushes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def note(self, what: str, text: str) -> None:
        """Durable, and all of it or nothing."""
        durable.write_file(self.folder / what, text.encode())

    def noted(self, what: str) -> str | None:
        path = self.folder / what
        return (path.read_text() or None) if path.exists() else None

    def replica(self, push_id: str | None) -> Path:
        return self.folder / f"replica-{push_id}"


async def run(job: Job) -> None:
    host = Host(Path(job.folder))
    settings = PrismSettings(
        host=job.host,
        port=job.port,
        api_version=job.api,  # type: ignore[arg-type]  # one of them
        account=Account("admin", job.password),
        ca=Path(job.ca),
        rate_rpm=0,
        waits=WAITS,
    )
    async with (
        open_log(host.folder / "events") as log,
        open_prism(settings) as prism,
        open_site(prism, log, fake_settings(host.folder / "work", data_path="iscsi")) as site,
    ):
        source = NutanixSource(site, job.vm)
        await _come_back(host, source, goes_on=job.goes_on)
        await _cycle(host, source, job.push_id)


async def _come_back(host: Host, source: NutanixSource, *, goes_on: bool) -> None:
    begun, newest = host.noted("begun"), host.noted("newest")
    if begun is not None and newest != begun:
        name = SnapshotName(begun, newest)
        await source.sweep(name, newest)
        snapshot = None
        if goes_on:
            try:
                snapshot = await source.reopen(name)
            except SnapshotGoneError:
                snapshot = None
        if snapshot is None:
            await source.abandon(name)
        else:
            await _finish(host, source, name, snapshot)
            newest = begun
    elif begun is not None:
        await source.confirm(SnapshotName(begun, host.noted("before")))
    await source.sweep(None, newest)


async def _cycle(host: Host, source: NutanixSource, push_id: str) -> None:
    newest = host.noted("newest")
    host.note("before", newest or "")
    host.note("begun", push_id)
    name = SnapshotName(push_id, newest)
    await _finish(host, source, name, await source.take(name))


async def _finish(
    host: Host, source: NutanixSource, name: SnapshotName, snapshot: Snapshot
) -> None:
    assert snapshot.lost_tracking is None, snapshot.lost_tracking
    (disk,) = snapshot.disks
    older = host.replica(name.reference)
    image = bytearray(older.read_bytes() if name.reference is not None else b"")
    image = image.ljust(disk.view.size, b"\0")
    async with aclosing(disk.view.extents(name.reference)) as extents:
        async for extent in extents:
            data = bytes(extent.length)
            if not extent.zero:
                data = await disk.view.read(extent.offset, extent.length)
            image[extent.offset : extent.end] = data
    await snapshot.check()
    host.replica(name.push_id).write_bytes(image)
    host.note("newest", name.push_id)  # the commit
    await source.confirm(name)
    await snapshot.aclose()


if __name__ == "__main__":
    serve(Job, run)
