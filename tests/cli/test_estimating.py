# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl estimate`: the sizes of the next Full and Incremental, and nothing left of having asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from replicator.cli.estimating import estimate_vm
from replicator.cli.source import ChosenVm
from replicator.domain.model import PushKind
from replicator.errors import RefusedError, SnapshotGoneError, SourceError
from replicator.push import journal
from replicator.push.plan import Start, Want
from replicator.sources.base import SnapshotName
from replicator.state_dir import open_state_dir
from tests.cli.conftest import Replctl, source_values, write_config
from tests.cli.several import Several
from tests.cli.test_json_contract import keeps_promise
from tests.push.tracked import Tracked, tracked
from tests.sites import GRAIN, SourceSite, receiver_site, source_site

SIZE = 64 * GRAIN


def sparse(path: Path, *grains: int) -> Path:
    """A disk of 64 grains, of which these hold data."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        for grain in grains:
            file.seek(grain * GRAIN)
            file.write(os.urandom(GRAIN))
    return path


def chosen(site: SourceSite) -> ChosenVm:
    return ChosenVm("web", "web", None, site.source, site.config)


async def left_behind(it: Tracked) -> list[str]:
    """Snapshots that are there, other than the reference."""
    return [held.push_id for held in await it.source.held() if held.push_id != it.source.reference]


async def test_full_and_incremental_of_each_disk(tmp_path: Path) -> None:
    disks = {
        "disk-0": sparse(tmp_path / "a.raw", 0, 3, 4, 40),
        "disk-1": sparse(tmp_path / "b.raw", 1),
    }
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as site,
    ):
        it = tracked(site)
        before = await estimate_vm(site.config, site.log, chosen(site))
        keeps_promise("Estimate", before)
        for disk in before["disks"]:
            keeps_promise("DiskEstimate", disk)
        assert (before["reference_point"], before["incremental_bytes"]) == (None, None)
        assert (before["size"], before["full_bytes"]) == (2 * SIZE, 5 * GRAIN)
        assert {disk["reason"] for disk in before["disks"]} == {"there is no recovery point yet"}

        await site.push(Want.SEED)
        it.write("disk-0", 10 * GRAIN, os.urandom(100))
        it.write("disk-0", 40 * GRAIN, os.urandom(GRAIN))
        found = await estimate_vm(site.config, site.log, chosen(site))
        assert found["reference_point"] == 1
        first, second = found["disks"]
        assert (first["disk"], first["incremental_bytes"], first["reason"]) == (
            "disk-0",
            GRAIN + 100,
            None,
        )
        assert (second["full_bytes"], second["incremental_bytes"]) == (GRAIN, 0)
        assert found["incremental_bytes"] == GRAIN + 100
        # Nothing was moved, nothing is left, and tracking goes on from the same reference.
        assert it.source.bytes_read == 5 * GRAIN
        assert await left_behind(it) == []
        assert [vm.newest.number for vm in site.log.vms if vm.newest] == [1]
        outcome = await site.push()
        assert outcome.point.bytes_pushed < 5 * GRAIN
        async with rx.store.hold(None) as point:
            disk = point.disk("disk-0")
            assert disk is not None
            async with rx.store.open_disk(point, disk) as view:
                assert await view.read(0, SIZE) == site.content("disk-0")


async def test_where_nobody_can_say_what_changed_it_says_why(tmp_path: Path) -> None:
    disks = {"disk-0": sparse(tmp_path / "a.raw", 0)}
    async with (
        receiver_site(tmp_path / "rx") as rx,
        source_site(tmp_path / "sx", rx.port, disks) as site,
    ):
        it = tracked(site)
        await site.push(Want.SEED)
        it.source.reference = None
        found = await estimate_vm(site.config, site.log, chosen(site))
        assert (found["full_bytes"], found["incremental_bytes"]) == (GRAIN, None)
        assert found["disks"][0]["reason"] == "the reference is gone"


async def test_while_a_push_is_unfinished_its_snapshot_is_left_alone(tmp_path: Path) -> None:
    disks = {"disk-0": sparse(tmp_path / "a.raw", 0)}
    async with source_site(tmp_path / "sx", 1, disks) as site:
        it = tracked(site)
        identity = await it.source.identify()
        start = Start(PushKind.SEED, 1, 0, None, "the test says so")
        entry = journal.PushEntry.begin(start, None, 1, 1)
        await journal.store(site.log, str(identity.uuid), entry)
        snapshot = await it.source.take(entry.snapshot)
        await snapshot.aclose()
        with pytest.raises(RefusedError, match="web: a push is unfinished, and holds its snap"):
            await estimate_vm(site.config, site.log, chosen(site))
        reopened = await it.source.reopen(entry.snapshot)
        await reopened.aclose()


async def test_a_snapshot_of_one_that_died_goes_with_the_next(tmp_path: Path) -> None:
    disks = {"disk-0": sparse(tmp_path / "a.raw", 0)}
    async with source_site(tmp_path / "sx", 1, disks) as site:
        it = tracked(site)
        left = SnapshotName("00" * 8, None)
        await (await it.source.take(left)).aclose()
        await estimate_vm(site.config, site.log, chosen(site))
        with pytest.raises(SnapshotGoneError):
            await it.source.reopen(left)


@pytest.mark.parametrize("how", ["fails", "cancelled"])
async def test_whatever_becomes_of_it_the_snapshot_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    disks = {"disk-0": sparse(tmp_path / "a.raw", 0)}
    async with source_site(tmp_path / "sx", 1, disks) as site:
        it = tracked(site)
        abandoned: list[str] = []
        inner = it.source.abandon

        async def abandon(name: SnapshotName) -> None:
            await inner(name)
            abandoned.append(name.push_id)

        scope = trio.CancelScope()

        async def ask(*_: object) -> int:
            if how == "fails":
                raise SourceError("Prism is away")
            scope.cancel()
            await trio.lowlevel.checkpoint()
            raise AssertionError("it went on")

        monkeypatch.setattr(it.source, "abandon", abandon)
        monkeypatch.setattr("replicator.cli.estimating.data_bytes", ask)
        with scope:
            if how == "fails":
                with pytest.raises(SourceError, match="Prism is away"):
                    await estimate_vm(site.config, site.log, chosen(site))
            else:
                await estimate_vm(site.config, site.log, chosen(site))
        assert len(abandoned) == 1
        with pytest.raises(SnapshotGoneError):
            await it.source.reopen(SnapshotName(abandoned[0], None))


async def test_a_removal_that_fails_is_told_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disks = {"disk-0": sparse(tmp_path / "a.raw", 0)}
    async with source_site(tmp_path / "sx", 1, disks) as site:
        it = tracked(site)

        async def abandon(_: SnapshotName) -> None:
            await trio.lowlevel.checkpoint()
            raise SourceError("Prism is away")

        monkeypatch.setattr(it.source, "abandon", abandon)
        assert (await estimate_vm(site.config, site.log, chosen(site)))["full_bytes"] == GRAIN
    expected = "web: the snapshot is left for the next run to remove: Prism is away"
    assert expected in caplog.text


def test_the_command_for_one_vm(tmp_path: Path, replctl: Replctl) -> None:
    config = write_config(tmp_path / "source.conf", source_values(tmp_path))
    sparse(tmp_path / "a.raw", 1, 2)
    done = replctl("--config", config, "estimate")
    assert done.code == 0, done.err
    head, row = done.out.splitlines()
    assert head.split() == ["vm", "disk", "size", "full", "incremental", "note"]
    assert row.split() == [
        *("web", "disk-0", "4.0", "MiB", "128.0", "KiB", "-"),
        *["there", "is", "no", "recovery", "point", "yet"],
    ]
    answer = replctl("--json", "--config", config, "estimate", "web").json
    keeps_promise("Estimate", answer)
    assert answer["full_bytes"] == 2 * GRAIN
    assert replctl("--json", "--config", config, "estimate", answer["uuid"]).json["vm"] == "web"
    done = replctl("--config", config, "estimate", "db")
    assert (done.code, done.out) == (2, "")
    assert "VM: this host has web, not db; nothing was touched" in done.err
    with open_state_dir(tmp_path / "state"):
        assert replctl("--config", config, "estimate").code == 3


def test_it_needs_no_receiver_but_disks(tmp_path: Path, replctl: Replctl) -> None:
    values = source_values(tmp_path, dr_host=None, dr_port=None, dr_auth_token=None)
    config = write_config(tmp_path / "source.conf", values)
    assert replctl("--config", config, "estimate").code == 0
    values = source_values(tmp_path, dr_host=None, source=None, image_disks=None)
    done = replctl("--config", write_config(tmp_path / "rx.conf", values), "estimate")
    assert done.code == 2
    assert "names no source of them" in done.err


async def test_of_several_one_that_fails_is_named(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = Several(tmp_path)
    several.use(monkeypatch)
    for name in ("app01", "app02", "db"):
        await several.add(name, b"x" * GRAIN)
    several.image("app02").unlink()
    values = source_values(tmp_path, source="nutanix", vm="*", image_disks=None)
    config = write_config(tmp_path / "source.conf", values)

    done = await trio.to_thread.run_sync(lambda: replctl("--json", "--config", config, "estimate"))
    assert done.code == 1
    first, failed, last = done.json
    keeps_promise("Estimate", first)
    keeps_promise("VmFailure", failed)
    assert [each["vm"] for each in done.json] == ["app01", "app02", "db"]
    assert "1 of 3 VM(s) failed: app02: cannot use image" in done.err
    assert last["full_bytes"] == GRAIN
    done = await trio.to_thread.run_sync(lambda: replctl("--config", config, "estimate"))
    assert [line.split()[0] for line in done.out.splitlines()] == ["vm", "app01", "db"]
