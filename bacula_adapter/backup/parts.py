# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a part is, once its disks were read: as the description that goes to Bacula, and as our log has it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bacula_adapter.backend.interface import JobInfo
from bacula_adapter.backup.disks import PartShape
from bacula_adapter.description import Description, PartDisk
from replicator.domain.backup import BackupDisk, BackupPart
from replicator.hardware import Hardware
from replicator.imagemap import vm_root
from replicator.push.files import GRAIN


def describe(
    job: JobInfo,
    shape: PartShape,
    *,
    base: BackupPart | None,
    chain: str,
    point: int,
    taken_at_us: int,
    disks: Sequence[PartDisk],
    hardware: Hardware | None,
) -> Description:
    """The description of a part of ``chain``. Where every disk came to be sent in full, ``base`` is no parent."""
    parent = base if any(disk.kind == "delta" for disk in disks) else None
    return Description(
        root_name=shape.root,
        vm=shape.folder,
        uuid=str(shape.uuid),
        number=shape.number,
        part=shape.part,
        parent="" if parent is None else parent.part,
        parent_job="" if parent is None else parent.job,
        chain=chain,
        job=job.name,
        job_id=job.job_id,
        level=job.level,
        taken_at_us=taken_at_us,
        grain=GRAIN,
        algorithm=int(shape.algorithm),
        disks=tuple(disks),
        point=point,
        hardware=hardware,
    )


def record(
    description: Description, *, base: BackupPart | None, vm: str, push_id: str, now_us: int
) -> BackupPart:
    """The part as an event has it; how long it took is filled in when it is concluded."""
    disks = description.disks
    return BackupPart(
        number=description.number,
        part=description.part,
        parent=description.parent,
        vm=vm,
        chain=description.chain,
        job=description.job,
        job_id=description.job_id,
        level=description.level,
        push_id=push_id,
        taken_at_us=description.taken_at_us,
        committed_at_us=now_us,
        duration_us=0,
        bytes_stored=sum(disk.bytes for disk in disks),
        root=vm_root([(disk.disk, disk.size, disk.root) for disk in disks]),
        algorithm=description.algorithm,
        disks=tuple(_recorded(disk, base) for disk in disks),
        point=description.point,
    )


def _recorded(disk: PartDisk, base: BackupPart | None) -> BackupDisk:
    """A disk with the name of the image that is below its deltas."""
    image = disk.file
    if disk.kind == "delta":
        assert base is not None
        older = base.by_identity(disk.identity)
        assert older is not None
        image = older.image
    return BackupDisk(disk.disk, disk.identity, disk.size, disk.root, disk.kind, image)


__all__ = ["describe", "record"]
