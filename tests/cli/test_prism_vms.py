# SPDX-License-Identifier: AGPL-3.0-or-later
"""The VMs behind one Prism: connecting to it, asking it anew, a source for each VM that stays the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from replicator.cli import prism_vms
from replicator.cli.prism_vms import PrismSet, PrismSources
from replicator.cli.source import find_sources
from replicator.config import Config, check
from replicator.errors import SourceError, UsageError
from replicator.log import open_log
from replicator.prism.errors import PrismAuthError, PrismError, PrismTlsError, PrismUnreachableError
from replicator.prism.meters import Meters
from replicator.prism.settings import PrismSettings
from replicator.prism.types import VmSummary
from replicator.sources.nutanix import NutanixSource
from tests.cli.several import CLUSTER, FakePrism


def config_of(folder: Path, **values: str) -> Config:
    given = {
        "prism_central": "pc.example",
        "user": "svc-dr",
        "password": "s3cret",
        "iscsi_initiator": "iqn.2026-01.org.example:dr-service-01",
        "state_dir": str(folder),
    }
    return check(given | values)


def vm(number: int, name: str) -> VmSummary:
    return VmSummary(str(UUID(int=number)), name, CLUSTER, "ON")


class FakeOpening:
    """``open_prism`` that fails as often as it is told to, and counts what is open."""

    def __init__(self, prism: FakePrism, *failures: PrismError) -> None:
        self.prism = prism
        self.failures = list(failures)
        self.tries = 0
        self.open = 0

    @asynccontextmanager
    async def __call__(self, settings: PrismSettings, meters: Meters) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        assert (settings.host, settings.account.user) == ("pc.example", "svc-dr")
        self.tries += 1
        if self.failures:
            raise self.failures.pop(0)
        meters.count_error("config/clusters")
        self.open += 1
        try:
            yield self.prism
        finally:
            self.open -= 1


async def test_run_tries_until_prism_is_there_and_commands_do_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    away = PrismUnreachableError("pc.example:9440: no answer")
    opening = FakeOpening(FakePrism([vm(1, "db"), vm(2, "web")]), away, away, away)
    monkeypatch.setattr(prism_vms, "open_prism", opening)
    sources = find_sources(config_of(tmp_path))
    assert isinstance(sources, PrismSources)
    assert not sources.one
    async with open_log(tmp_path / "events") as log:
        with pytest.raises(PrismUnreachableError):
            async with sources.open(log):
                raise AssertionError("it is away")
        began = trio.current_time()
        async with sources.open(log, 300) as opened:
            assert trio.current_time() - began >= 600
            chosen = await opened.select()
            assert opening.open == 1
        assert opening.open == 0
    assert [(each.label, each.uuid) for each in chosen] == [
        ("db", UUID(int=1)),
        ("web", UUID(int=2)),
    ]
    assert all(isinstance(each.source, NutanixSource) for each in chosen)
    assert opening.tries == 4
    assert caplog.text.count("pc.example:9440: no answer; trying again in 300 s") == 2
    assert sources.api_errors() == {"config/clusters": 1}
    assert sources.attach_failures() == 0


@pytest.mark.parametrize("error", [PrismAuthError("401"), PrismTlsError("not trusted")])
async def test_what_only_an_operator_can_mend_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: PrismError
) -> None:
    """An account that is refused again and again is locked in the end."""
    opening = FakeOpening(FakePrism(), error)
    monkeypatch.setattr(prism_vms, "open_prism", opening)
    async with open_log(tmp_path / "events") as log:
        with pytest.raises(type(error)):
            async with find_sources(config_of(tmp_path)).open(log, 300):
                raise AssertionError("it was refused")
    assert opening.tries == 1


async def test_each_vm_keeps_its_source_and_has_a_directory_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prism = FakePrism([vm(1, "db"), vm(2, "web-1"), vm(3, "web-2")])
    made: list[str] = []

    def make(which: VmSummary) -> Any:
        made.append(which.name)
        return object()

    config = config_of(tmp_path, vm="web-*,gone", cluster="cluster-a")
    asked: Any = prism
    vms = PrismSet(config, asked, make)
    first = await vms.select()
    assert [each.config.work_path for each in first] == [
        config.work_path / str(UUID(int=2)),
        config.work_path / str(UUID(int=3)),
    ]
    # A VM that has another name now is the same VM.
    prism.listed[1] = vm(2, "web-3")
    again = await vms.select()
    assert {each.uuid: each.source for each in first} == {each.uuid: each.source for each in again}
    assert [each.label for each in again] == ["web-2", "web-3"]
    assert made == ["web-1", "web-2"]
    del prism.listed[1]
    await vms.select()
    prism.listed.append(vm(2, "web-3"))
    await vms.select()
    assert made == ["web-1", "web-2", "web-3"]
    assert caplog.text.count("vm: Prism lists no VM gone") == 1


async def test_a_list_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    prism: Any = FakePrism([VmSummary("not-a-uuid", "db", CLUSTER, "ON")])
    with pytest.raises(SourceError, match="Prism lists VM 'db' under 'not-a-uuid': no UUID"):
        await PrismSet(config_of(tmp_path), prism, lambda _: prism).select()


def test_a_vm_key_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^vm: names no VM; \* takes every one$"):
        find_sources(config_of(tmp_path, vm=" , "))
