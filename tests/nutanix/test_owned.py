# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl owned` over a Prism in memory and a real log."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
import trio

from replicator.cli import owning
from replicator.domain.model import Point, PushKind
from replicator.log import open_log
from replicator.prism.settings import PrismSettings
from replicator.prism.types import Capability, Kind
from replicator.push import journal
from replicator.push.plan import Start
from replicator.sources.base import SnapshotName
from replicator.sources.nutanix import NutanixSource, open_site
from replicator.sources.nutanix.ledger import OBJECTS, Entry, read_entries
from replicator.sources.nutanix.names import ObjectName
from tests.cli.conftest import Done, Replctl, replctl, source_values, write_config
from tests.cli.test_json_contract import keeps_promise
from tests.domain.samples import point
from tests.nutanix.fake import VM, FakePrism
from tests.sources.nutanix_lab import fake_settings, fake_world

__all__ = ["replctl"]


class Host:
    """A source's host with a log, and the command on it."""

    def __init__(self, folder: Path, replctl: Replctl) -> None:
        self.world = fake_world(1)
        self.spoken = Capability.V3
        self.state = folder / "state"
        self._work = folder / "work"
        self._work.mkdir()
        passfile = folder / "pass"
        passfile.write_text("password = hidden\n")
        passfile.chmod(0o600)
        self._replctl = replctl
        self._config = write_config(
            folder / "c.conf",
            {
                "prism_central": "pc1.example.test",
                "user": "svc",
                "passfile": passfile,
                "state_dir": self.state,
            },
        )

    def owned(self, *words: str, json: bool = True) -> Done:
        before = ["--config", self._config, *(["--json"] if json else [])]
        return self._replctl(*before, "owned", *words)

    def seeded(self) -> None:
        """A point and nothing else."""
        self.state.mkdir()
        trio.run(self._seeded)

    async def _seeded(self) -> None:
        async with (
            open_log(self.state / "events") as log,
            open_site(FakePrism(self.world), log, fake_settings(self._work)) as site,
        ):
            source = NutanixSource(site, VM, "app01")
            await log.register(UUID(VM), "app01", "source")
            done: Point = msgspec.structs.replace(point(1, PushKind.SEED), push_id="p1")
            await (await source.take(SnapshotName("p1", None))).aclose()
            async with log.change(UUID(VM)) as vm:
                vm.commit(done)
            await source.confirm(SnapshotName("p1", None))

    def entries(self) -> list[Entry]:
        return trio.run(self._entries)

    async def _entries(self) -> list[Entry]:
        async with open_log(self.state / "events", readonly=True) as log:
            return read_entries(await log.journal_items(OBJECTS))

    def live(self) -> None:
        """A point, a push under way, a snapshot of a push that nobody knows any more, and another installation."""
        self.state.mkdir()
        trio.run(self._live)

    async def _live(self) -> None:
        async with (
            open_log(self.state / "events") as log,
            open_site(
                FakePrism(self.world),
                log,
                fake_settings(self._work),
                clock=lambda: self.world.now_us,
            ) as site,
        ):
            source = NutanixSource(site, VM, "app01")
            await log.register(UUID(VM), "app01", "source")
            done: Point = msgspec.structs.replace(point(1, PushKind.SEED), push_id="p1")
            await (await source.take(SnapshotName("p1", None))).aclose()
            async with log.change(UUID(VM)) as vm:
                vm.commit(done)
            await source.confirm(SnapshotName("p1", None))
            start = Start(PushKind.CYCLE, 2, 1, None, "")
            entry = journal.PushEntry.begin(start, "p1", 1, 0)
            await journal.store(log, VM, msgspec.structs.replace(entry, push_id="p2"))
            await (await source.take(SnapshotName("p2", "p1"))).aclose()
            left = str(ObjectName(site.ledger.installation, "p3", Kind.VOLUME_GROUP, 0, 0))
            self.world.groups["7"] = (left, b"")
            await site.ledger.write(
                Entry(
                    kind=Kind.VOLUME_GROUP,
                    name=left,
                    request_id=str(UUID(int=7)),
                    vm=VM,
                    cluster="cA",
                    push_id="p3",
                    intended_at_us=self.world.now_us,
                    uuid="7",
                )
            )
        theirs = str(ObjectName("ffffffff", "p9", Kind.IMAGE, 0))
        self.world.images["9"] = (theirs, b"")


@pytest.fixture
def host(tmp_path: Path, replctl: Replctl, monkeypatch: pytest.MonkeyPatch) -> Host:
    found = Host(tmp_path, replctl)

    @asynccontextmanager
    async def open_prism(settings: PrismSettings) -> AsyncGenerator[FakePrism, None]:
        assert settings.host == "pc1.example.test"
        await trio.lowlevel.checkpoint()
        yield FakePrism(found.world, capability=found.spoken)

    monkeypatch.setattr(owning, "open_prism", open_prism)
    return found


def _whys(done: Done) -> dict[str, str]:
    assert done.code == 0, done.err
    return {each["name"].split("-")[2]: each["why"] for each in done.json}


def test_why_everything_is_there(host: Host) -> None:
    host.live()
    done = host.owned()
    assert _whys(done) == {"p1": "reference", "p2": "push under way", "p3": "left behind"}
    assert {each["vm"] for each in done.json} == {VM}
    keeps_promise("Owned", done.json[0])
    assert _whys(host.owned("--all")) == _whys(done) | {"p9": "another installation's"}
    table = host.owned(json=False)
    assert table.code == 0
    assert [line.split()[0] for line in table.out.splitlines()[1:]] == [
        "volume",
        "snapshot",
        "snapshot",
    ]


def test_what_is_not_needed_is_removed(host: Host) -> None:
    host.live()
    refused = host.owned("--remove")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert len(host.world.objects()) == 4
    done = host.owned("--remove", "--yes", "--all")
    assert {each["name"].split("-")[2]: each["removed"] for each in done.json} == {
        "p1": False,
        "p2": False,
        "p3": True,
        "p9": False,
    }
    assert not host.world.groups
    assert len(host.world.snapshots) == 2
    assert len(host.world.images) == 1
    assert host.owned("--remove", "--yes", json=False).out == "nothing to remove\n"


def test_before_the_first_push_nothing_is_ours(host: Host) -> None:
    host.world.images["9"] = (str(ObjectName("ffffffff", "p9", Kind.IMAGE, 0)), b"")
    assert host.owned().json == []
    assert _whys(host.owned("--all")) == {"p9": "another installation's"}


def test_other_sources_make_nothing_on_a_cluster(tmp_path: Path, replctl: Replctl) -> None:
    config = write_config(tmp_path / "c.conf", source_values(tmp_path))
    done = replctl("--config", config, "owned")
    assert done.code == 2
    assert "source = image makes nothing on a cluster" in done.err


def test_the_reference_of_a_deleted_vm(host: Host) -> None:
    host.seeded()
    assert _whys(host.owned()) == {"p1": "reference"}
    assert host.owned("--remove", "--yes").json[0]["removed"] is False
    host.world.deleted = True
    assert _whys(host.owned()) == {"p1": "reference of a VM that is not there any more"}
    assert len(host.world.snapshots) == 1, "nothing is removed without being asked"
    assert host.owned("--remove", "--yes").json[0]["removed"] is True
    assert not host.world.snapshots
    assert host.entries() == []
    assert host.owned().json == []


def test_another_prism_does_not_know_whether_a_vm_was_deleted(host: Host) -> None:
    """Its clusters are others: the reference, and what is known of it, stay."""
    host.world.cluster = "cluster-of-another-prism"
    host.seeded()
    host.world.deleted = True
    assert _whys(host.owned()) == {"p1": "reference"}
    assert host.owned("--remove", "--yes").json[0]["removed"] is False
    assert len(host.entries()) == 1


def test_the_push_under_way_of_a_deleted_vm_stays(host: Host) -> None:
    host.live()
    host.world.deleted = True
    whys = _whys(host.owned())
    assert whys["p1"] == "reference of a VM that is not there any more"
    assert whys["p2"] == "push under way"
    host.owned("--remove", "--yes")
    assert [entry.push_id for entry in host.entries()] == ["p2"]


def test_what_the_other_interface_made_is_told_and_stays(host: Host) -> None:
    host.seeded()
    host.spoken = Capability.V4
    done = host.owned()
    assert _whys(done) == {"p1": "made through v3, and Prism is spoken to by v4 now"}
    keeps_promise("Owned", done.json[0])
    assert host.owned("--remove", "--yes").json[0]["removed"] is False
    assert len(host.world.snapshots) == len(host.entries()) == 1
    host.spoken = Capability.V3
    assert _whys(host.owned()) == {"p1": "reference"}
