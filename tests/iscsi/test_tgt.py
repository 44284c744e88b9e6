# SPDX-License-Identifier: AGPL-3.0-or-later
"""Against a real tgtd: logins, redirects, bytes, holes, and every failure that it can be made to show."""

from __future__ import annotations

import itertools
import os
import random
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from replicator.disk import Extent
from replicator.iscsi import (
    AmbiguousDiskError,
    Chap,
    DiskChangedError,
    IscsiError,
    LoginAuthenticationError,
    LoginNotFoundError,
    LunGoneError,
    MediumError,
    Portal,
    PortalUnreachableError,
    RedirectUnreachableError,
    ScsiError,
    SessionLostError,
    Target,
    TargetNotTrustedError,
    TimedOutError,
    discover,
    open_disk,
    open_reader,
)
from replicator.iscsi.session import ABORT_TIMEOUT_S
from replicator.nursery import flat_nursery
from tests.iscsi.lab import TARGET, TargetDaemon, free_portal, settings, target_daemon
from tests.limits import HANG_S

MIB = 1 << 20
OTHER = "iqn.2010-06.com.nutanix:vg-b-tgt0"


def make_disk(daemon: TargetDaemon, name: str = "disk", size: int = 4 * MIB) -> tuple[Path, bytes]:
    data = random.Random(name).randbytes(size)
    path = daemon.root / name
    path.write_bytes(data)
    return path, data


async def served(daemon: TargetDaemon, size: int = 4 * MIB) -> bytes:
    path, data = make_disk(daemon, size=size)
    await daemon.add_target()
    await daemon.add_disk(path)
    return data


async def test_discovery_lists_what_this_initiator_may_use() -> None:
    async with target_daemon() as daemon:
        await daemon.add_target(1)
        await daemon.add_target(2, OTHER, allow="ALL")
        await daemon.add_target(3, "iqn.2010-06.com.nutanix:hidden", allow="iqn.2026-01.example:x")
        found = await discover(daemon.portal, settings())
    assert sorted(found, key=lambda target: target.name) == [
        Target(TARGET, (daemon.portal,)),
        Target(OTHER, (daemon.portal,)),
    ]


async def test_a_long_list_of_targets_comes_in_parts() -> None:
    async with target_daemon() as daemon:
        names = [f"iqn.2010-06.com.nutanix:{'x' * 150}-{number:03}" for number in range(60)]
        for number, name in enumerate(names):
            await daemon.add_target(number + 1, name)
        found = await discover(daemon.portal, settings())
    assert sorted(target.name for target in found) == names


async def test_what_a_disk_says_of_itself() -> None:
    async with target_daemon() as daemon:
        await served(daemon)
        async with open_disk(daemon.portal, TARGET, None, settings()) as disk:
            assert (disk.size, disk.block_size, disk.lun) == (4 * MIB, 512, 1)
            assert disk.serial == "SN1-1"
            assert any(name.startswith("naa.") for name in disk.identifiers)
            assert disk.portal == daemon.portal


@pytest.mark.parametrize("depth", [1, 16])
async def test_bytes_equal_the_file(depth: int) -> None:
    chance = random.Random(depth)
    async with target_daemon() as daemon:
        data = await served(daemon, 8 * MIB)
        given = settings(depth=depth, read_size=64 << 10)
        async with open_disk(daemon.portal, TARGET, 1, given) as disk:
            assert await disk.read(0, disk.size) == data
            for _ in range(100):
                offset = chance.randrange(len(data))
                length = chance.randrange(1, min(len(data) - offset, 300_000) + 1)
                assert await disk.read(offset, length) == data[offset : offset + length]
            assert await disk.read(len(data) - 1, 1) == data[-1:]
            assert await disk.read(7, 0) == b""


async def test_many_readers_share_a_session() -> None:
    async with target_daemon() as daemon:
        data = await served(daemon)
        right = 0

        async def read(at: int) -> None:
            nonlocal right
            found = await disk.read(at, 100_001)
            right += found == data[at : at + 100_001]

        async with open_disk(daemon.portal, TARGET, 1, settings(depth=4)) as disk:
            async with flat_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(read, number * 90_001)
            assert right == 40


async def test_a_range_outside_the_disk_is_the_callers_mistake() -> None:
    async with target_daemon() as daemon:
        await served(daemon)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            for offset, length in ((-1, 1), (4 * MIB, 1), (4 * MIB - 1, 2)):
                with pytest.raises(ValueError, match="of a disk of"):
                    await disk.read(offset, length)


async def test_holes_are_told() -> None:
    async with target_daemon() as daemon:
        path = daemon.root / "disk"
        with path.open("wb") as file:
            file.truncate(256 * MIB)
            os.pwrite(file.fileno(), b"x" * (3 * MIB), 7 * MIB)
        await daemon.add_target()
        await daemon.add_disk(path)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            found = [extent async for extent in disk.allocated()]
            assert found == [
                Extent(0, 7 * MIB, zero=True),
                Extent(7 * MIB, 3 * MIB),
                Extent(10 * MIB, 246 * MIB, zero=True),
            ]
            later = [extent async for extent in disk.allocated(8 * MIB + 5)]
            assert later == [
                Extent(8 * MIB + 5, 2 * MIB - 5),
                Extent(10 * MIB, 246 * MIB, zero=True),
            ]


async def test_a_map_of_many_holes_comes_in_parts() -> None:
    async with target_daemon() as daemon:
        path = daemon.root / "disk"
        with path.open("wb") as file:
            file.truncate(64 * MIB)
            for number in range(700):
                os.pwrite(file.fileno(), b"x", number * 65536)
        await daemon.add_target()
        await daemon.add_disk(path)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            found = [extent async for extent in disk.allocated()]
        assert sum(not extent.zero for extent in found) == 700
        assert found[0].offset == 0
        assert found[-1].end == 64 * MIB
        assert all(a.end == b.offset for a, b in itertools.pairwise(found))


async def test_the_only_disk_is_found_and_several_are_refused() -> None:
    async with target_daemon() as daemon:
        await daemon.add_target()
        with pytest.raises(AmbiguousDiskError, match="has no disk"):
            async with open_disk(daemon.portal, TARGET, None, settings()):
                pass
        first, _ = make_disk(daemon, "first")
        second, data = make_disk(daemon, "second")
        await daemon.add_disk(first, lun=3)
        async with open_disk(daemon.portal, TARGET, None, settings()) as disk:
            assert disk.lun == 3
        await daemon.add_disk(second, lun=300)
        with pytest.raises(AmbiguousDiskError, match=r"2 disks \(LUN 3, 300\)"):
            async with open_disk(daemon.portal, TARGET, None, settings()):
                pass
        async with open_disk(daemon.portal, TARGET, 300, settings()) as disk:
            assert await disk.read(0, disk.size) == data
        with pytest.raises(LunGoneError):
            async with open_disk(daemon.portal, TARGET, 7, settings()):
                pass
        with pytest.raises(AmbiguousDiskError, match="LUN 0 is no disk"):
            async with open_disk(daemon.portal, TARGET, 0, settings()):
                pass


RIGHT = Chap("alice", "secretsecret1")
MUTUAL = Chap("alice", "secretsecret1", "target-a", "othersecret12")


@pytest.mark.parametrize(
    ("chap", "expected"),
    [
        (RIGHT, None),
        (MUTUAL, None),
        (Chap("alice", "secretsecret1", "", "othersecret12"), None),
        (None, LoginAuthenticationError),
        (Chap("alice", "secretsecret2"), LoginAuthenticationError),
        (Chap("bob", "secretsecret1"), LoginAuthenticationError),
        (Chap("alice", "secretsecret1", "target-a", "othersecret13"), TargetNotTrustedError),
        (Chap("alice", "secretsecret1", "target-b", "othersecret12"), TargetNotTrustedError),
    ],
)
async def test_chap(chap: Chap | None, expected: type[IscsiError] | None) -> None:
    async with target_daemon() as daemon:
        data = await served(daemon)
        await daemon.add_account("alice", "secretsecret1")
        await daemon.add_account("target-a", "othersecret12", outgoing=True)
        given = settings(chap=chap)
        if expected is None:
            async with open_disk(daemon.portal, TARGET, 1, given) as disk:
                assert await disk.read(0, 5000) == data[:5000]
        else:
            with pytest.raises(expected) as caught:
                async with open_disk(daemon.portal, TARGET, 1, given):
                    pass
            assert "secretsecret" not in str(caught.value)
            assert TARGET in str(caught.value)
        # Discovery is without CHAP here, whoever asks.
        assert [target.name for target in await discover(daemon.portal, given)] == [TARGET]


async def test_a_target_without_chap_takes_who_has_a_secret_but_cannot_prove_itself() -> None:
    async with target_daemon() as daemon:
        data = await served(daemon)
        async with open_disk(daemon.portal, TARGET, 1, settings(chap=RIGHT)) as disk:
            assert await disk.read(0, 512) == data[:512]
        with pytest.raises((TargetNotTrustedError, LoginAuthenticationError)):
            async with open_disk(daemon.portal, TARGET, 1, settings(chap=MUTUAL)):
                pass


async def test_a_target_that_is_not_ours_is_not_found() -> None:
    async with target_daemon() as daemon:
        await daemon.add_target(1, allow="iqn.2026-01.example:someone-else")
        for name in (TARGET, "iqn.2026-01.example:nothing"):
            with pytest.raises(LoginNotFoundError, match="0x0203"):
                async with open_disk(daemon.portal, name, None, settings()):
                    pass


async def test_nobody_at_the_portal() -> None:
    portal = free_portal()
    with pytest.raises(PortalUnreachableError, match=r"vg-a-tgt0 at 127\..*refused"):
        async with open_disk(portal, TARGET, None, settings()):
            pass
    with pytest.raises(PortalUnreachableError, match="portal 127"):
        await discover(portal, settings())


async def test_a_redirect_is_followed() -> None:
    async with target_daemon() as portal, target_daemon() as host:
        data = await served(host)
        await portal.add_target()
        await portal.redirect(1, host.portal)
        async with open_disk(portal.portal, TARGET, None, settings()) as disk:
            assert disk.portal == host.portal
            assert await disk.read(0, disk.size) == data


async def test_a_redirect_to_nobody_says_who_sent_us() -> None:
    async with target_daemon() as portal:
        gone = free_portal()
        await portal.add_target()
        await portal.redirect(1, gone)
        with pytest.raises(RedirectUnreachableError) as caught:
            async with open_disk(portal.portal, TARGET, None, settings()):
                pass
        assert str(gone) in str(caught.value)
        assert f"sent there by {portal.portal}" in str(caught.value)


async def test_redirects_in_a_circle_end() -> None:
    async with target_daemon() as one, target_daemon() as two:
        for daemon, to in ((one, two), (two, one)):
            await daemon.add_target()
            await daemon.redirect(1, to.portal)
        with pytest.raises(IscsiError, match="point at each other"):
            async with open_disk(one.portal, TARGET, None, settings()):
                pass


@pytest.mark.parametrize("header", ["None", "CRC32C"])
@pytest.mark.parametrize("data", ["None", "CRC32C"])
async def test_a_target_that_insists_on_digests_gets_them(header: str, data: str) -> None:
    async with target_daemon() as daemon:
        content = await served(daemon)
        await daemon.set_target(1, "HeaderDigest", header)
        await daemon.set_target(1, "DataDigest", data)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            shown = await daemon.admin("conn", "show", "--tid=1")
            assert await disk.read(1, disk.size - 2) == content[1:-1], shown


async def read_for_ever(portal: Portal, strike: trio.Event, struck: trio.Event) -> None:
    """The caller strikes after the first read."""
    async with open_disk(portal, TARGET, 1, settings()) as disk:
        await disk.read(0, disk.size)
        strike.set()
        await struck.wait()
        while True:
            await disk.read(0, disk.size)


@pytest.mark.parametrize("how", ["killed", "deleted"])
async def test_a_target_that_goes_ends_what_reads(how: str) -> None:
    strike, struck = trio.Event(), trio.Event()
    async with target_daemon() as daemon:
        await served(daemon)

        async def read() -> None:
            with pytest.raises(SessionLostError, match=TARGET):
                await read_for_ever(daemon.portal, strike, struck)

        with trio.fail_after(HANG_S):
            async with flat_nursery() as nursery:
                nursery.start_soon(read)
                await strike.wait()
                if how == "killed":
                    await daemon.stop()
                else:
                    await daemon.admin("target", "delete", "--tid=1", "--force")
                struck.set()


async def test_a_target_that_hangs_is_given_up_and_everyone_told(
    mock_clock: trio.testing.MockClock,
) -> None:
    mock_clock.rate = 1  # time passes, and jumps where the test says so
    async with target_daemon() as daemon:
        await served(daemon)
        told = 0

        async def read(at: int) -> None:
            nonlocal told
            with pytest.raises(TimedOutError, match=r"no answer within 240 s, and the abort none"):
                await disk.read(at, MIB)
            told += 1

        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            daemon.signal(signal.SIGSTOP)
            async with flat_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(read, number * MIB)
                for seconds in (HANG_S, ABORT_TIMEOUT_S):
                    await trio.testing.wait_all_tasks_blocked()
                    mock_clock.jump(seconds)
            assert told == 4
            assert disk.lost
            with pytest.raises(TimedOutError, match="READ"):
                await disk.read(0, 1)


async def test_a_disk_that_is_deleted_under_a_session() -> None:
    async with target_daemon() as daemon:
        first, data = make_disk(daemon, "first")
        second, _ = make_disk(daemon, "second")
        await daemon.add_target()
        await daemon.add_disk(first, lun=1)
        await daemon.add_disk(second, lun=2)
        async with (
            open_disk(daemon.portal, TARGET, 1, settings()) as kept,
            open_disk(daemon.portal, TARGET, 2, settings()) as gone,
        ):
            await daemon.admin("logicalunit", "delete", "--tid=1", "--lun=2")
            with pytest.raises(LunGoneError, match="no such logical unit"):
                await gone.read(0, 4096)
            assert await kept.read(0, 4096) == data[:4096]


async def test_a_medium_error_names_the_block_and_the_session_goes_on() -> None:
    async with target_daemon() as daemon:
        data = await served(daemon)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            os.truncate(daemon.root / "disk", MIB)
            with pytest.raises(MediumError, match="unrecovered read error") as caught:
                await disk.read(2 * MIB, 4096)
            assert caught.value.lba >= 0
            assert await disk.read(0, MIB) == data[:MIB]


async def test_past_the_end_as_the_target_sees_it() -> None:
    """A disk that shrank under the session: the target refuses blocks that we believe are there."""
    async with target_daemon() as daemon:
        await served(daemon)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            shorter = daemon.root / "shorter"
            shorter.write_bytes(bytes(MIB))
            await daemon.admin("logicalunit", "delete", "--tid=1", "--lun=1")
            await daemon.add_disk(shorter)
            with pytest.raises(ScsiError, match="beyond the end of the disk"):
                await disk.read(4 * MIB - 512, 512)


async def test_a_cancelled_read_leaves_the_memory_alone_and_the_session_usable() -> None:
    async with target_daemon() as daemon:
        data = await served(daemon, 32 * MIB)
        async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
            buffer = bytearray(len(data))
            with trio.CancelScope() as scope:
                daemon.signal(signal.SIGSTOP)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(disk.read_into, 0, memoryview(buffer))
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
            buffer[:] = bytes(len(buffer))
            daemon.signal(signal.SIGCONT)
            # Its answers come before this one's: they were thrown away.
            assert await disk.read(12345, 20 * MIB) == data[12345 : 12345 + 20 * MIB]
            assert buffer == bytes(len(buffer))


async def test_cancelling_everything_logs_out() -> None:
    async with target_daemon() as daemon:
        await served(daemon)
        with trio.CancelScope() as scope:
            async with open_disk(daemon.portal, TARGET, 1, settings()) as disk:
                await disk.read(0, 512)
                assert "Session" in await daemon.admin("conn", "show", "--tid=1")
                scope.cancel()
                await trio.sleep_forever()
        assert "Session" not in await daemon.admin("conn", "show", "--tid=1")


async def test_an_error_in_the_body_comes_out_as_it_is() -> None:
    async with target_daemon() as daemon:
        await served(daemon)
        with pytest.raises(KeyError):
            async with open_disk(daemon.portal, TARGET, 1, settings()):
                raise KeyError("x")
        assert "Session" not in await daemon.admin("conn", "show", "--tid=1")


async def test_a_reader_goes_on_after_its_target_was_killed() -> None:
    async with target_daemon() as daemon:
        data = await served(daemon)
        path = daemon.root / "disk"
        async with open_reader(daemon.portal, TARGET, 1, settings(), pause_s=0.01) as reader:
            assert await reader.read(0, MIB) == data[:MIB]
            await daemon.stop()
            await daemon.start()
            await daemon.add_target()
            await daemon.add_disk(path)
            assert await reader.read(5, 3 * MIB) == data[5 : 5 + 3 * MIB]
            assert reader.logins == 2
            assert [extent async for extent in reader.allocated()] == [Extent(0, 4 * MIB)]


async def test_a_reader_gives_up_when_nobody_comes_back() -> None:
    async with target_daemon() as daemon:
        await served(daemon)
        async with open_reader(
            daemon.portal, TARGET, 1, settings(), attempts=3, pause_s=0.001
        ) as reader:
            await daemon.stop()
            with pytest.raises(PortalUnreachableError):
                await reader.read(0, 512)


async def test_a_reader_refuses_another_disk_in_the_place_of_its_own() -> None:
    async with target_daemon() as daemon:
        await served(daemon)
        async with open_reader(daemon.portal, TARGET, 1, settings(), pause_s=0.001) as reader:
            await daemon.stop()
            await daemon.start()
            await daemon.add_target()
            await daemon.add_disk(make_disk(daemon, "larger", 8 * MIB)[0])
            with pytest.raises(DiskChangedError, match="size is 8388608, not 4194304"):
                await reader.read(0, 512)
