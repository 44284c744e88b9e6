# SPDX-License-Identifier: AGPL-3.0-or-later
"""How the VMs of one Prism are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from replicator.iscsi import Portal


@dataclass(frozen=True, slots=True, kw_only=True)
class NutanixSettings:
    """Times in seconds.

    ``initiator``: the IQN that this host logs in with. ``data_services``: in place of the clusters' own data services
    addresses. ``chap``: how the two sides of a login prove themselves. ``concurrent_disks``: of one VM, as many are made
    readable at once. ``interval_s``: between two points; ``outage_s``: how long a reference is kept while none is made.
    ``working_dir``: for what is read over REST: a disk at a time is kept there, sparse.
    ``discovery_s``: how long a new target may take to appear; ``cleanup_s``: how long taking a disk down may take once
    everything else has been cancelled.
    """

    initiator: str
    working_dir: Path
    data_services: Portal | None = None
    application_consistent: Literal["true", "try", "false"] = "try"
    data_path: Literal["auto", "iscsi", "rest"] = "auto"
    chap: Literal["mutual", "one-way", "none"] = "mutual"
    concurrent_disks: int = 4
    interval_s: int = 300
    outage_s: int = 48 * 3600
    depth: int = 16
    read_size: int = 256 << 10
    discovery_s: float = 60.0
    cleanup_s: float = 120.0


__all__ = ["NutanixSettings"]
