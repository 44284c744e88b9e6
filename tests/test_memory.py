# SPDX-License-Identifier: AGPL-3.0-or-later
"""Memory follows the chunk and the depth of the pipelines, never the disk."""

from __future__ import annotations

from pathlib import Path

from bench.images import GIB, MIB, spread
from bench.site import site

#: 64 GiB have 16 MiB of digests, and the large disk holds 64 MiB more of data: to keep either in memory shows.
GROWTH_MAX = 12 * MIB


async def seed_peaks(folder: Path, size: int, data: int) -> tuple[int, int]:
    """What the kernel kept as the peaks of source and receiver, bytes: exact, and above the anonymous memory alone."""
    image = spread(folder / f"{size}.raw", size, data)
    options = {"source": "image", "image_disks": f"disk-0={image.path}"}
    async with site(folder / f"site-{size}", options) as pair:
        pushed = await pair.push("seed")
        await pair.applied(pushed.point)
        return pushed.memory.peak, pair.receiver_peak()


async def test_a_seed_takes_no_more_memory_for_a_larger_disk(tmp_path: Path) -> None:
    small = await seed_peaks(tmp_path, 1 * GIB, 32 * MIB)
    large = await seed_peaks(tmp_path, 64 * GIB, 96 * MIB)
    growth = [after - before for before, after in zip(small, large, strict=True)]
    assert max(growth) <= GROWTH_MAX, f"{small} bytes became {large} at source and receiver"
