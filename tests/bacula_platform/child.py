# SPDX-License-Identifier: AGPL-3.0-or-later
"""A restoring host as processes that can be killed: as ``tests.nutanix.child``, with a restore as the job."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bacula_adapter.backend.interface import JobInfo, JobKind
from bacula_adapter.restore.platform import open_platform_target
from replicator import durable
from replicator.config import check
from replicator.hardware import Hardware
from replicator.log import open_log
from replicator.prism import v3, v4  # noqa: F401 - so that they are loaded
from replicator.prism.settings import Account, PrismSettings
from tests.bacula_platform.lab import make_vm
from tests.forking import serve
from tests.sources.simulated import WAITS

#: In the folder: the restore that Bacula has called good.
VERDICT = "verdict"


class Job(msgspec.Struct, kw_only=True):
    """A restore of a VM that is described by ``hardware``, as ``name``; empty: the target is only opened."""

    host: str
    port: int
    password: str
    ca: str
    api: str
    folder: str
    name: str
    hardware: Hardware


async def run(job: Job) -> None:
    folder = Path(job.folder)
    config = check({"state_dir": job.folder, "restore_vm_name": job.name, "power_on": "yes"})
    settings = PrismSettings(
        host=job.host,
        port=job.port,
        api_version=job.api,  # type: ignore[arg-type]  # one of them
        account=Account("admin", job.password),
        ca=Path(job.ca),
        rate_rpm=0,
        waits=WAITS,
    )
    info = JobInfo(name="Restore.2026-11-25_10.00.00_03", job_id=7, kind=JobKind.RESTORE)
    async with (
        open_log(folder / "events") as log,
        open_platform_target(config, info, log, settings=settings) as target,
    ):
        if job.name:
            await target.finish([make_vm(target, job.hardware)])
            durable.write_file(folder / VERDICT, job.name.encode())
            await target.keep()


if __name__ == "__main__":
    serve(Job, run)
