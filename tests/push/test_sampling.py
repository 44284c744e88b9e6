# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sampling what change tracking calls unchanged: a source whose tracking lies is caught, and what was sampled counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from replicator.disk import Extent
from replicator.domain.model import PushKind, Suspicion
from replicator.domain.views import point_info, warnings
from replicator.errors import DamageError, RefusedError, SourceError
from replicator.imagemap import ImageMap
from replicator.imagemap.layout import REGIONS
from replicator.phcbt.format import Algorithm, GrainRun
from replicator.push import sampling as module
from replicator.push.plan import Want
from replicator.push.sampling import GRACE_S, ChangesMissedError, Sample, Tracked, sampling
from tests.push import tracked as lab
from tests.sites import GRAIN, ReceiverSite, receiver_site, source_site

GRAINS = 40
SIZE = GRAINS * GRAIN


def grain(seed: object) -> bytes:
    return random.Random(str(seed)).randbytes(GRAIN)


@asynccontextmanager
async def pair(tmp_path: Path, **options: str) -> AsyncIterator[tuple[ReceiverSite, lab.Tracked]]:
    """A source that tracks, of one disk whose second half is zeros; seeded."""
    path = tmp_path / "a.raw"
    path.write_bytes(b"".join(map(grain, range(GRAINS // 2))) + bytes(SIZE // 2))
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, {"disk-0": path}, **options) as sx,
    ):
        mine = lab.tracked(sx)
        await sx.push(Want.SEED)
        yield rx, mine


async def kinds(rx: ReceiverSite | lab.Tracked) -> list[str]:
    log = rx.log if isinstance(rx, ReceiverSite) else rx.site.log
    uuid = rx.store.uuid if isinstance(rx, ReceiverSite) else rx.site.uuid
    found = [type(event).__name__ for event in await log.history(uuid)]
    return [kind for kind in found if kind not in {"Registered", "DeltaApplied"}]


# Whole pushes


async def test_what_was_sampled_stands_in_the_point_on_both_sides(tmp_path: Path) -> None:
    """All that tracking calls unchanged, holes among it, where the sample is as large as the disk."""
    async with pair(tmp_path) as (rx, mine):
        mine.write("disk-0", 3 * GRAIN + 5, b"a few bytes")
        mine.write("disk-0", 30 * GRAIN - 1, b"on a border")
        mine.source.views.clear()
        outcome = await mine.site.push()
        assert outcome.point.kind is PushKind.CYCLE
        assert not outcome.point.compared
        assert outcome.point.sampled == GRAINS - 3
        there = rx.store.vm.newest
        assert there is not None
        assert (there.root, there.sampled, there.compared) == (
            outcome.point.root,
            GRAINS - 3,
            False,
        )
        (view,) = mine.source.views
        read = Counter(
            number
            for extent in view.reads
            for number in range(extent.offset // GRAIN, extent.end // GRAIN)
        )
        assert read == Counter(range(GRAINS))
        assert await rx.read(None) == mine.site.content("disk-0")


async def test_no_more_is_sampled_than_was_asked_for(tmp_path: Path) -> None:
    async with pair(tmp_path, verify_sample_mib="1") as (_, mine):
        assert (await mine.site.push()).point.sampled == (1 << 20) // GRAIN
        mine.site.pusher.transfer.config = mine.site.config.__class__(
            **{f: getattr(mine.site.config, f) for f in mine.site.config.__struct_fields__}
            | {"verify_sample_mib": 0}
        )
        mine.source.views.clear()
        assert (await mine.site.push()).point.sampled == 0
        assert mine.source.bytes_read == 0


@dataclass
class Costly(lab.TrackedView):
    """Must be made readable first."""

    @property
    def must_be_read(self) -> bool:
        return bool(self.changed)


@pytest.mark.parametrize("turn", [0, 1])
async def test_a_disk_is_seldom_made_readable_for_a_sample_alone(
    turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cycle of many reads it also where nothing changed: tracking that always says so would never be found out."""
    monkeypatch.setattr(lab, "TrackedView", Costly)
    async with pair(tmp_path) as (_, sx):
        monkeypatch.setattr(sx.site.pusher.transfer.rng, "randrange", lambda _: turn)
        before = sx.source.bytes_read
        await sx.site.push(Want.PUSH)
        assert sx.source.bytes_read == before + (SIZE if turn == 0 else 0)
        sx.write("disk-0", 0, grain("new"))
        before = sx.source.bytes_read
        await sx.site.push(Want.PUSH)
        assert sx.source.bytes_read == before + SIZE, "the change, and all else as a sample"


async def test_where_digests_are_compared_nothing_is_sampled(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, mine):
        mine.source.reference = None
        point = (await mine.site.push()).point
        assert (point.sampled, point.compared) == (0, True)


async def test_tracking_that_cannot_answer_is_made_up_for_as_configured(tmp_path: Path) -> None:
    """Compared with the own map by default; else sent anew, or refused, and said so."""
    for policy in ("resync", "seed", "fail"):
        folder = tmp_path / policy
        folder.mkdir()
        async with pair(folder, on_reference_loss=policy) as (rx, mine):
            mine.write("disk-0", 5 * GRAIN, grain("new"))
            mine.source.reference = None
            if policy == "fail":
                for _ in range(2):
                    with pytest.raises(
                        RefusedError, match=r"tracking was lost: .*run replctl resync"
                    ):
                        await mine.site.push()
                assert mine.site.log.vms[0].tracking_lost == "the reference is gone"
                assert (await kinds(mine)).count("TrackingLost") == 1
                assert (await mine.site.push(Want.RESYNC)).compared is not None
            else:
                outcome = await mine.site.push()
                assert (outcome.point.kind is PushKind.SEED) is (policy == "seed")
                assert outcome.point.is_sure
            assert mine.site.log.vms[0].tracking_lost is None
            assert await rx.read(None) == mine.site.content("disk-0")
            mine.write("disk-0", 6 * GRAIN, grain("later"))
            assert not (await mine.site.push()).point.compared


@pytest.mark.parametrize("at", [5, 35])
async def test_tracking_that_lies_is_caught_and_all_is_compared(tmp_path: Path, at: int) -> None:
    """Before a point that lacks the change is committed; also where a hole was written to."""
    async with pair(tmp_path) as (rx, mine):
        mine.write("disk-0", GRAIN, grain("told"))
        await mine.site.push()
        mine.write("disk-0", at * GRAIN + 9, b"not told", hidden=True)
        mine.write("disk-0", 2 * GRAIN, grain("told too"))
        outcome = await mine.site.push()
        assert (outcome.point.number, outcome.point.compared) == (4, True)
        assert "change tracking missed a change on disk-0" in outcome.reason
        assert outcome.compared is not None
        assert outcome.compared.differing == 2 * GRAIN
        assert await rx.read(None) == mine.site.content("disk-0")
        began = ["SeedCommitted", "CycleCommitted", "ChangesMissed"]
        assert await kinds(mine) == [*began, "PushAbandoned", "DisksCompared", "CycleCommitted"]
        assert await kinds(rx) == [*began, "CycleCommitted"]
        # The points since the last one that is sure are marked on the receiver, which holds them.
        vm = rx.store.vm
        assert vm.suspect is None
        assert vm.doubtful == {2}
        assert [point_info(vm, vm.points[n])["state"] for n in (1, 2, 4)] == ["ok", "suspect", "ok"]
        assert any("recovery points 2 may lack changes" in line for line in warnings(vm))
        source = mine.site.log.vms[0]
        assert (source.suspect, source.doubtful) == (None, frozenset())
        # And from there tracking is gone by again.
        mine.write("disk-0", 0, grain("later"))
        point = (await mine.site.push()).point
        assert (point.compared, point.sampled) == (False, GRAINS - 1)


async def test_a_suspect_chain_stays_so_until_it_is_compared(tmp_path: Path) -> None:
    async with pair(tmp_path, on_reference_loss="fail") as (rx, mine):
        mine.write("disk-0", 5 * GRAIN, b"not told", hidden=True)
        for _ in range(2):
            with pytest.raises(RefusedError, match=r"missed a change.*run replctl resync"):
                await mine.site.push()
        (vm,) = mine.site.log.vms
        assert vm.suspect == Suspicion("disk-0", 5 * GRAIN, 1)
        assert rx.store.vm.suspect == vm.suspect
        (line,) = [line for line in warnings(vm) if line.startswith("change tracking missed")]
        assert "disk-0, byte 327680, found after point 1" in line
        assert "the next push does what on_reference_loss says" in line
        assert (await kinds(mine)).count("ChangesMissed") == 1
        # In the seed nothing rests on tracking: the point that there is stays good.
        assert rx.store.vm.doubtful == frozenset()
        await mine.site.push(Want.RESYNC)
        assert [vm.suspect for vm in (mine.site.log.vms[0], rx.store.vm)] == [None, None]
        assert await rx.read(None) == mine.site.content("disk-0")


async def test_a_damaged_map_is_not_taken_for_a_lie(tmp_path: Path) -> None:
    async with pair(tmp_path) as (_, mine):
        (path,) = (mine.site.config.state_dir / "maps").rglob("*.map")
        with path.open("r+b") as file:
            file.seek(REGIONS[0])
            file.write(b"damage")
        with pytest.raises(DamageError, match="map of digests is damaged"):
            await mine.site.push(Want.PUSH)
        assert mine.site.log.vms[0].suspect is None
        assert (await mine.site.push()).point.compared


# The sampler by itself


class View:
    """A disk that is told what tracking says, and how reading goes."""

    def __init__(self, content: bytes, changed: list[Extent]) -> None:
        self.content = content
        self.changed = changed
        self.read_grains: list[int] = []
        self.at_once = 0
        self.most_at_once = 0
        self.pause = 0.0
        self.error: Exception | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        assert since == "reference"
        for extent in self.changed:
            await trio.lowlevel.checkpoint()
            yield extent

    async def read(self, offset: int, length: int) -> bytes:
        if self.error is not None:
            raise self.error
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await trio.sleep(self.pause)
        self.at_once -= 1
        self.read_grains.append(offset // GRAIN)
        return self.content[offset : offset + length]


def disk(tmp_path: Path, name: str, view: View, content: bytes | None = None) -> Tracked:
    """The view, and the map of what it is to hold: its own content unless given."""
    path = tmp_path / f"{name}.map"
    content = view.content if content is None else content
    with ImageMap.create(path, Algorithm.XXH3_128, GRAIN, len(content), 0) as known:
        digests = known.algorithm.digest_grains(content, GRAIN)
        known.apply([GrainRun(0, known.grains, digests)], len(content), 3)
    return Tracked(name, view, "reference", path, 3)


async def test_positions_are_uniform_over_what_is_called_unchanged(tmp_path: Path) -> None:
    """Over all disks together; what has changed is never read. Counts of many draws stay within five deviations."""
    first = View(bytes(10 * GRAIN), [Extent(2 * GRAIN, 3 * GRAIN)])
    second = View(bytes(20 * GRAIN + 1), [Extent(0, 1), Extent(20 * GRAIN, 1)])
    disks = [disk(tmp_path, "disk-0", first), disk(tmp_path, "disk-1", second)]
    draws, rng = 400, random.Random(5)
    for _ in range(draws):
        async with sampling(disks, 6 * GRAIN, rng) as sample:
            pass
        assert sample.clean == 6
    counts = Counter(("a", n) for n in first.read_grains) + Counter(
        ("b", n) for n in second.read_grains
    )
    unchanged = {("a", n) for n in (0, 1, 5, 6, 7, 8, 9)} | {("b", n) for n in range(1, 20)}
    assert set(counts) == unchanged
    share = 6 / len(unchanged)
    deviation = (draws * share * (1 - share)) ** 0.5
    assert all(abs(n - draws * share) < 5 * deviation for n in counts.values())
    assert first.most_at_once <= module._READS


async def test_the_commit_does_not_wait_for_a_slow_source(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    view = View(bytes(100 * GRAIN), [])
    view.pause = GRACE_S / 2.5
    began = autojump_clock.current_time()
    async with sampling([disk(tmp_path, "disk-0", view)], 100 * GRAIN, random.Random(1)) as sample:
        pass
    assert autojump_clock.current_time() - began == pytest.approx(GRACE_S)
    # What was read until then counts: two rounds.
    assert sample.clean == 2 * module._READS


async def test_a_grown_disk_is_sampled_where_the_point_has_it(tmp_path: Path) -> None:
    old = grain("a") + b"b" * 100
    view = View(old + bytes(GRAIN - 100) + grain("c"), [Extent(2 * GRAIN, GRAIN)])
    async with sampling(
        [disk(tmp_path, "disk-0", view, old)], 10 * GRAIN, random.Random(1)
    ) as sample:
        pass
    assert sample == Sample(clean=2)


async def test_the_first_miss_ends_it(tmp_path: Path) -> None:
    view = View(b"x" * SIZE, [])
    known = disk(tmp_path, "disk-0", view, bytes(SIZE))
    with pytest.raises(ChangesMissedError) as caught:
        async with sampling([known], SIZE, random.Random(1)) as sample:
            await trio.testing.wait_all_tasks_blocked()
    assert caught.value.missed.point == 3
    assert sample.clean == 0
    assert len(view.read_grains) <= module._READS


async def test_an_error_waits_until_what_is_sent_is_whole(tmp_path: Path) -> None:
    """To break off a message that is being sent would break the line."""
    view = View(bytes(SIZE), [])
    view.error = SourceError("gone")
    reached = False

    async def work() -> None:
        nonlocal reached
        async with sampling([disk(tmp_path, "disk-0", view)], SIZE, random.Random(1)):
            await trio.testing.wait_all_tasks_blocked()
            reached = True

    with pytest.raises(SourceError, match="gone"):
        await work()
    assert reached


async def test_an_error_of_the_block_is_the_one_that_is_raised(tmp_path: Path) -> None:
    view = View(b"x" * SIZE, [])
    known = disk(tmp_path, "disk-0", view, bytes(SIZE))

    async def work() -> None:
        async with sampling([known], SIZE, random.Random(1)):
            await trio.testing.wait_all_tasks_blocked()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()


@pytest.mark.parametrize("size", [0, SIZE])
async def test_nothing_to_sample(tmp_path: Path, size: int) -> None:
    view = View(bytes(SIZE), [])
    disks: list[Any] = [] if size else [disk(tmp_path, "disk-0", view)]
    async with sampling(disks, size, random.Random(1)) as sample:
        pass
    assert sample == Sample()
    assert view.read_grains == []


async def test_everything_has_changed(tmp_path: Path) -> None:
    view = View(bytes(SIZE), [Extent(0, SIZE)])
    async with sampling([disk(tmp_path, "disk-0", view)], SIZE, random.Random(1)) as sample:
        pass
    assert (sample, view.read_grains) == (Sample(), [])
