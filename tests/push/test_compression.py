# SPDX-License-Identifier: AGPL-3.0-or-later
"""The choice of a zstd level, on a clock and lines that are made up: what ``auto`` settles on, and what it gives up again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from replicator.push.compression import LADDER, Compression

MIB = 1 << 20
CHUNK = MIB
GB = 1e9
#: Plain bytes a second of one processor, and what is left of a byte: mixed data, as docs/figures.md has it.
MIXED: dict[int | None, tuple[float, float]] = {
    -5: (1.0 * GB, 0.75),
    1: (0.4 * GB, 0.55),
    3: (0.2 * GB, 0.52),
}
NOISE: dict[int | None, tuple[float, float]] = {
    -5: (4 * GB, 1.0),
    1: (4 * GB, 1.0),
    3: (2 * GB, 1.0),
}


@dataclass
class World:
    """A processor that packs, a disk, a line that takes ``line`` bytes a second, a receiver that takes ``receiver`` plain bytes."""

    line: float
    data: dict[int | None, tuple[float, float]] = field(default_factory=lambda: MIXED)
    receiver: float = 1e12
    disk: float = 3 * GB
    now: float = 100.0
    used: dict[int | None, int] = field(default_factory=dict)

    def clock(self) -> float:
        return self.now

    def push(self, compression: Compression, seconds: float) -> float:
        """Push for a while; plain bytes a second."""
        end, chunks = self.now + seconds, 0
        while self.now < end:
            level = compression.next_level()
            self.used[level] = self.used.get(level, 0) + 1
            speed, left = self.data.get(level, (1e12, 1.0))
            packing, payload = CHUNK / speed, int(CHUNK * left)
            compression.packed(level, CHUNK, payload, packing)
            out = max(payload / self.line, CHUNK / self.receiver)
            ahead = max(packing, CHUNK / self.disk)
            self.now += max(ahead, out)
            compression.sent(payload, max(0.0, out - ahead))
            chunks += 1
        return chunks * CHUNK / seconds


def auto(world: World) -> Compression:
    return Compression.of("auto", workers=1, clock=world.clock)


@pytest.mark.parametrize(
    ("line", "levels"),
    [
        (2 * GB, {None}),
        (1.25 * GB, {None}),
        (0.3125 * GB, {-5, 1}),
        (0.118 * GB, {1}),
        (0.0118 * GB, {1, 3}),
    ],
)
def test_auto_settles_on_what_carries_most(line: float, levels: set[int | None]) -> None:
    """At 10 and 2.5 Gbit/s, at 1 Gbit/s and at 100 Mbit/s."""
    world = World(line)
    compression = auto(world)
    world.push(compression, 30)
    assert compression.level in levels
    rate = world.push(compression, 10)
    fixed = max(
        World(line).push(Compression.of(str(each or "off"), workers=1, clock=world.clock), 10)
        for each in LADDER
    )
    assert rate > 0.9 * fixed


def test_where_the_line_is_fast_nothing_is_packed_even_to_try() -> None:
    """Also where the receiver is what the push waits for, as long as that is fast."""
    for world in (World(1e12), World(1e12, receiver=0.6 * GB)):
        world.push(auto(world), 10)
        assert set(world.used) == {None}


def test_a_line_that_is_known_to_be_slow_is_packed_for_from_the_start() -> None:
    """A cycle of some megabytes is over before anything could be learnt."""
    world = World(0.005 * GB)
    compression = Compression.of("auto", workers=1, clock=world.clock, line=0.005 * GB)
    world.push(compression, 4)
    assert world.used.get(None, 0) == 0
    noise = World(0.005 * GB, NOISE)
    compression = Compression.of("auto", workers=1, clock=noise.clock, line=0.005 * GB)
    noise.push(compression, 10)
    assert noise.used[None] > 0.8 * sum(noise.used.values())


def test_a_line_that_turns_out_to_be_slow_is_packed_for_soon() -> None:
    world = World(0.005 * GB)
    world.push(auto(world), 10)
    assert world.used[None] <= 3


def test_data_that_does_not_shrink_is_not_packed_except_to_try() -> None:
    world = World(0.1 * GB, NOISE)
    compression = auto(world)
    world.push(compression, 30)
    assert compression.level is None
    assert world.used[None] > 0.95 * sum(world.used.values())


def test_a_receiver_that_is_the_slow_part_is_not_taken_for_a_slow_line() -> None:
    """Packing promises more and brings nothing: it is given up, and left alone for a while."""
    world = World(10 * GB, receiver=0.2 * GB)
    compression = auto(world)
    world.push(compression, 60)
    assert world.used[None] > 0.8 * sum(world.used.values())


def test_a_line_that_changes_is_followed() -> None:
    world = World(2 * GB)
    compression = auto(world)
    settled: list[int | None] = []
    for line in (2 * GB, 0.05 * GB, 5 * GB):
        world.line = line
        world.push(compression, 60)
        settled.append(compression.level)
    assert settled[0] is None
    assert settled[1] in {1, 3}
    assert settled[2] is None


@pytest.mark.parametrize(("setting", "level"), [("off", None), ("-5", -5), ("1", 1), ("19", 19)])
def test_a_fixed_setting_stays(setting: str, level: int | None) -> None:
    world = World(0.01 * GB)
    compression = Compression.of(setting, workers=1, clock=world.clock)
    world.push(compression, 5)
    assert set(world.used) == {level}
    assert compression.level == level
