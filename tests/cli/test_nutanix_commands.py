# SPDX-License-Identifier: AGPL-3.0-or-later
"""The commands of a Nutanix source host over a Prism in memory, with the real source, log and receiver."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator.cli import prism_vms
from replicator.prism.meters import Meters
from replicator.prism.settings import PrismSettings
from tests.cli.conftest import Done, Replctl
from tests.cli.test_json_contract import keeps_promise
from tests.cli.test_pushing import two_sites
from tests.nutanix.fake import VM, FakePrism, FakeWorld
from tests.sites import GRAIN
from tests.sources.nutanix_lab import INITIATOR, fake_world

PASSWORD = "s3cret-of-svc-dr"


@asynccontextmanager
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """A cluster, and the configurations of a host that protects its VM and of a receiver that runs."""
    world = fake_world(2)
    world.now_us = time.time_ns() // 1000

    @asynccontextmanager
    async def open_prism(settings: PrismSettings, _: Meters) -> AsyncIterator[FakePrism]:
        assert settings.account.password == PASSWORD
        await trio.lowlevel.checkpoint()
        yield FakePrism(world)

    monkeypatch.setattr(prism_vms, "open_prism", open_prism)
    passfile = tmp_path / "pass"
    passfile.write_text(f"password = {PASSWORD}\n")
    passfile.chmod(0o600)
    values: dict[str, Any] = {
        "source": "nutanix",
        "image_disks": None,
        "vm": "app*",
        "prism_central": "pc.example",
        "user": "svc-dr",
        "passfile": passfile,
        "iscsi_initiator": INITIATOR,
        "data_path": "rest",
        "application_consistent": "false",
    }
    async with two_sites(tmp_path, **values) as (source, receiver):
        yield world, source, receiver


def write(world: FakeWorld, disk: int, offset: int, data: bytes) -> None:
    world.disks[disk].data[offset : offset + len(data)] = data


async def test_seed_estimate_push_and_restore(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, monkeypatch) as (world, source, receiver):

        async def told(*words: str, at: Path = source) -> Done:
            done = await trio.to_thread.run_sync(lambda: replctl("--config", at, *words))
            assert PASSWORD not in done.out + done.err
            return done

        write(world, 0, 0, os.urandom(3 * GRAIN))
        write(world, 1, 100 * GRAIN, os.urandom(GRAIN))
        done = await told("--json", "estimate")
        (found,) = done.json
        assert "): not needed any more" in done.err
        assert "given up" not in done.err
        keeps_promise("Estimate", found)
        assert (found["uuid"], found["full_bytes"], found["incremental_bytes"]) == (
            VM,
            4 * GRAIN,
            None,
        )
        assert world.objects() == []

        done = await told("--json", "seed")
        assert done.code == 0, done.err
        (seeded,) = done.json
        assert (seeded["vm"], seeded["uuid"], seeded["point"]) == ("app01", VM, 1)
        assert "Selected 1 VM(s) for backup" in done.err
        (reference,) = world.objects()

        write(world, 0, 50 * GRAIN, b"changed")
        write(world, 0, GRAIN, bytes(GRAIN))
        done = await told("--json", "estimate", "app01")
        assert done.code == 0, done.err
        assert [disk["incremental_bytes"] for disk in done.json["disks"]] == [GRAIN, 0]
        assert done.json["reference_point"] == 1
        assert world.objects() == [reference]

        (pushed,) = (await told("--json", "push")).json
        assert (pushed["point"], pushed["kind"]) == (2, "cycle")
        assert pushed["bytes_pushed"] < 2 * GRAIN
        (newer,) = world.objects()
        assert newer != reference
        (status,) = (await told("--json", "status")).json
        assert (status["vm"], status["warnings"]) == ("app01", [])

        assert (await told("--json", "verify", "app01", at=receiver)).json["good"]
        for number, disk in enumerate(world.disks):
            file = tmp_path / f"disk-{number}"
            words = ("export", "app01", "--disk", str(number), "--to", str(file))
            assert (await told(*words, at=receiver)).code == 0
            assert file.read_bytes() == disk.data


async def test_a_reference_that_is_gone_is_told_and_compared(
    tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, monkeypatch) as (world, source, receiver):

        async def told(*words: str, at: Path = source) -> Done:
            return await trio.to_thread.run_sync(lambda: replctl("--config", at, *words))

        write(world, 0, 0, os.urandom(3 * GRAIN))
        assert (await told("seed")).code == 0
        world.snapshots.clear()
        write(world, 0, GRAIN, b"changed")
        done = await told("--json", "estimate", "app01")
        assert done.code == 0, done.err
        assert done.json["incremental_bytes"] is None
        assert "reference_snapshot not found" in done.json["disks"][0]["reason"]
        done = await told("push")
        assert done.code == 0, done.err
        assert "reference_snapshot not found" in done.err
        assert (await told("--json", "verify", "app01", at=receiver)).json["good"]
