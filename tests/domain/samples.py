# SPDX-License-Identifier: AGPL-3.0-or-later
"""One example of everything that the domain stores."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from replicator.domain.backup import BackupDisk, BackupPart
from replicator.domain.model import (
    Balance,
    Damage,
    Point,
    PointDisk,
    PushKind,
    RpoBreach,
    Suspicion,
    TestClone,
    plain,
    stream_id,
)
from replicator.domain.vm import ProtectedVm

VM = UUID("3f6c1df0-8c39-4a54-9b1f-0d5a3a1f7e10")
STAMP = datetime(2026, 3, 4, 5, 6, 7, 890123, tzinfo=UTC)


def point(number: int, kind: PushKind, *, parent: int = 0, epoch: int = 1, since: int = 1) -> Point:
    """A point of two disks whose identities are as long as a hypervisor's."""
    disks = tuple(
        PointDisk(
            f"disk-{n}",
            f"9d1c2b3a-0000-4000-8000-00000000000{n}",
            (n + 1) << 40,
            bytes([n]) * 32,
            since,
        )
        for n in range(2)
    )
    return Point(
        number=number,
        parent=parent,
        push_id="0123456789abcdef",
        kind=kind,
        epoch=epoch,
        taken_at_us=1_772_600_000_000_000 + number,
        committed_at_us=1_772_600_009_000_000 + number,
        duration_us=9_000_000_000,
        bytes_pushed=123_456_789_012,
        root=bytes(range(32)),
        disks=disks,
    )


def balance() -> Balance:
    """The balance of a VM with two points, a damaged one and a test clone."""
    points = (point(4, PushKind.SEED), point(5, PushKind.CYCLE, parent=4))
    return Balance(
        vm=str(VM),
        name="web",
        role="receiver",
        created_us=1_772_500_000_000_000,
        period=2,
        epoch=3,
        state="testing",
        points=points,
        newest=points[1],
        applied=4,
        damages=(Damage(4, "disk-1", 0, 65536, "replica/disk-1.raw", "why"),),
        verified={5: 1_772_600_009_000_000},
        test=TestClone("c0ffee", 5, 1_772_600_009_000_000),
        tracking_lost=None,
        abandoned="snapshot is gone",
        abandoned_point=3,
        abandoned_push="0123456789abcdef",
        peer_broken=None,
    )


def backup(number: int = 1, parent: str = "", level: str = "F") -> BackupPart:
    """A part of a chain, of two disks."""
    kind = "delta" if parent else "full"
    disks = tuple(
        BackupDisk(
            f"disk-{n}",
            f"9d1c2b3a-0000-4000-8000-00000000000{n}",
            (n + 1) << 40,
            bytes([n]) * 32,
            kind,  # type: ignore[arg-type]  # one of the two
            f"@nutanix/web/disks/disk-{n}.raw",
        )
        for n in range(2)
    )
    return BackupPart(
        number=number,
        part=f"{number:08x}",
        parent=parent,
        vm="web",
        chain="Nightly",
        job=f"Nightly.2026-03-04_05.06.07_{number:02}",
        job_id=17 + number,
        level=level,
        push_id="0123456789abcdef",
        taken_at_us=1_772_600_000_000_000 + number,
        committed_at_us=1_772_600_009_000_000 + number,
        duration_us=9_000_000_000,
        bytes_stored=123_456_789_012,
        root=bytes(range(32)),
        algorithm=1,
        disks=disks,
    )


def read_back(value: Any) -> Any:
    """As a value of an event comes from the log: arrays as lists."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(plain(value)))


#: The fields of one event of each kind.
FIELDS: dict[str, dict[str, Any]] = {
    "Registered": {"vm": str(VM), "name": "web", "role": "receiver", "period": 1},
    "PeriodOpened": {"balance": read_back(balance())},
    "SeedCommitted": {"point": read_back(point(1, PushKind.SEED))},
    "CycleCommitted": {"point": read_back(point(2_000_000, PushKind.CYCLE, parent=1_999_999))},
    "DeltaApplied": {"point": 2},
    "PointsReleased": {"points": [1]},
    "PointDamaged": {
        "damage": read_back(Damage(2, "disk-0", 65536, 131072, "points/2/disk-0.rev.phcbt", "why"))
    },
    "PointVerified": {"point": 2, "bytes_read": 1 << 40},
    "TrackingLost": {"reason": "bitmap is inconsistent"},
    "DisksCompared": {
        "point": read_back(point(1, PushKind.SEED)),
        "reason": "asked for",
    },
    "ChangesMissed": {"missed": read_back(Suspicion("disk-1", 65536, 3))},
    "PushAbandoned": {"push_id": "0123456789abcdef", "point": 3, "reason": "snapshot is gone"},
    "TestStarted": {"clone": read_back(TestClone("c0ffee", 2, 1_772_600_009_000_000))},
    "TestEnded": {"clone_id": "c0ffee"},
    "PromotionStarted": {"epoch": 2, "point": 2},
    "Promoted": {},
    "PromotionUndone": {},
    "MadePermanent": {},
    "PeerLogBroken": {"reason": "it has 3 events, but it had 5"},
    "PeerLogAccepted": {},
    "BackupCommitted": {"backup": read_back(backup())},
    "BackupFailed": {
        "job": "Nightly.2026-03-04_05.06.07_09",
        "job_id": 26,
        "level": "I",
        "reason": "cancelled",
    },
    "RestoreDone": {
        "job": "Restore.2026-03-04_05.06.07_10",
        "job_id": 27,
        "target": "/srv/restored",
        "bytes": 1 << 40,
    },
    "RestoreFailed": {
        "job": "Restore.2026-03-04_05.06.07_11",
        "job_id": 28,
        "target": "cluster-b",
        "reason": "cancelled",
    },
    "RpoBreached": {"breach": read_back(RpoBreach(2, 601, 600, 1_772_600_600_000_000))},
}


def event(name: str, version: int = 7) -> Any:
    """The example of a kind of event."""
    kind = getattr(ProtectedVm, name)
    more = {"originator_topic": ProtectedVm.TOPIC} if name == "Registered" else {}
    return kind(
        originator_id=stream_id(VM, 1),
        originator_version=version,
        timestamp=STAMP,
        **more,
        **FIELDS[name],
    )
