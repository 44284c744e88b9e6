# SPDX-License-Identifier: AGPL-3.0-or-later
"""The metrics page as Prometheus reads it: each row against what the log was told, before and after a restart."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from replicator.config import check
from replicator.control.metrics import Live, Metrics, start_metrics
from replicator.control.server import NotFoundError, Page
from replicator.domain.model import Damage, PushKind
from replicator.errors import StateError
from replicator.log import EventLog, open_log
from replicator.log.states import VmStates
from tests.domain.samples import backup, point
from tests.limits import HANG_S

WEB = UUID("2cfe30b1-ed0a-5d2c-b362-ab269447546d")
DB = UUID("0f6f41a3-6f5c-5a3c-8f6e-111111111111")
#: What samples.point says: bytes that travelled, and when it was taken.
PUSHED = 123_456_789_012
Labels = frozenset[tuple[str, str]]


def parsed(page: Page) -> dict[str, dict[Labels, float]]:
    """Samples by name and labels; every family has a help text and a type."""
    assert page.content_type.startswith("text/plain; version=0.0.4")
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(page.body.decode()):
        assert family.documentation
        assert family.type in {"gauge", "counter"}
        for sample in family.samples:
            samples = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in samples, "a sample twice"
            samples[labels] = sample.value
    return found


def of(vm: str, **labels: str) -> Labels:
    return frozenset({"vm": vm, **labels}.items())


async def caught_up(log: EventLog) -> None:
    """Wait until what is kept beside the log has everything."""
    await log.projections.wait("usage", log.store.head())


async def fill(log: EventLog) -> None:
    """A receiver that much happened to."""
    await log.register(WEB, "web", "receiver")
    async with log.change(WEB) as vm:
        vm.commit(point(1, PushKind.SEED))
        vm.commit(point(2, PushKind.CYCLE, parent=1))
        vm.commit(point(3, PushKind.CYCLE, parent=2))
        vm.point_verified(1, 5)
        vm.release([1])
        vm.damaged(Damage(2, "disk-0", 0, 65536, "f", "r"))
        vm.abandon_push("p", 4, "the snapshot is gone")
        vm.breach_rpo(60, vm.points[3].taken_at_us + 61_000_000)
    await log.register(DB, "db", "receiver")


async def test_every_row_is_what_the_log_says(tmp_path: Path) -> None:
    taken_s = point(3, PushKind.CYCLE, parent=2).taken_at_us / 1e6
    async with open_log(tmp_path / "events") as log:
        await fill(log)
        await caught_up(log)
        live = Live(
            throttle_mbps=lambda: 50,
            reconnects=lambda: {"web": 3},
            expires=lambda: [("/c.pem", 1.9e9), ("/c.pem", 2e9), ("/ca.pem", 2.5e9)],
            pushing=lambda: {"web": (0.5, 77)},
            shows=lambda vm: vm.name != "wbe",
            prism_errors=lambda: {"vmm/ahv/config/vms": 2, "config/tasks": 1},
            attach_failures=lambda: 4,
        )
        await log.register(UUID(int=7), "wbe", "receiver")
        found = parsed(await Metrics(log, live, lambda: taken_s + 90).page())
        vm = log.get(WEB)
        assert vm is not None
        verified_s = vm.verified_at_us / 1e6
    states = found.pop("replicator_failover_state")
    assert {key for key, value in states.items() if value} == {
        of("web", state="protected"),
        of("db", state="unseeded"),
    }
    assert len(states) == 2 * 6
    web, db = of("web"), of("db")
    assert verified_s > 0
    assert found == {
        "replicator_rpo_age_seconds": {web: pytest.approx(90, abs=1e-3)},
        "replicator_rpo_breached": {web: 1, db: 0},
        "replicator_dr_cycle_bytes_pushed": {web: PUSHED},
        "replicator_recovery_points": {web: 2, db: 0},
        "replicator_last_verification_timestamp_seconds": {web: verified_s, db: 0},
        "replicator_push_bytes_total": {web: 3 * PUSHED, db: 0},
        "replicator_cycles_total": {
            of("web", kind="seed"): 1,
            of("web", kind="cycle"): 2,
            of("db", kind="seed"): 0,
            of("db", kind="cycle"): 0,
        },
        "replicator_pushes_abandoned_total": {web: 1, db: 0},
        "replicator_damages_total": {web: 1, db: 0},
        "replicator_dr_reconnect_total": {web: 3},
        "replicator_push_progress_ratio": {web: 0.5},
        "replicator_push_sent_bytes": {web: 77},
        "replicator_prism_api_errors_total": {
            frozenset({("endpoint", "vmm/ahv/config/vms")}): 2,
            frozenset({("endpoint", "config/tasks")}): 1,
        },
        "replicator_iscsi_attach_failures_total": {frozenset(): 4},
        "replicator_throttle_mbps": {frozenset(): 50},
        "replicator_certificate_expiry_timestamp_seconds": {
            frozenset({("file", "/c.pem")}): 1.9e9,
            frozenset({("file", "/ca.pem")}): 2.5e9,
        },
    }


async def test_every_metric_is_documented_with_its_labels(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "operating.md").read_text("utf-8")
    documented = re.findall(r"^\| `(replicator_\w+)(?:\{([a-z,]+)\})?` \|", text, re.MULTILINE)
    live = Live(
        throttle_mbps=lambda: 1,
        reconnects=lambda: {"web": 0},
        expires=lambda: [("/c.pem", 1)],
        pushing=lambda: {"web": (0.0, 0)},
        prism_errors=lambda: {"config/tasks": 1},
        attach_failures=lambda: 0,
    )
    chain = tmp_path / "bacula" / "jobs" / "Nightly" / str(WEB)
    chain.mkdir(parents=True)
    async with open_log(chain / "events") as log:
        await log.register(WEB, "web", "backup")
        async with log.change(WEB) as vm:
            vm.commit_backup(backup())
    async with open_log(tmp_path / "events") as log:
        await fill(log)
        found = parsed(await Metrics(log, live).page())
    shown = {name: {key for key, _ in next(iter(samples))} for name, samples in found.items()}
    assert {name: set(filter(None, labels.split(","))) for name, labels in documented} == shown


async def test_no_restart_and_no_closed_book_loses_a_counter(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        await fill(log)
        await log.close_period()
        await log.seal()
        await caught_up(log)
        before = parsed(await Metrics(log, Live(), lambda: 2e9).page())
    async with open_log(tmp_path / "events") as log:
        await caught_up(log)
        after = parsed(await Metrics(log, Live(), lambda: 2e9).page())
    assert after == before
    assert before["replicator_cycles_total"][of("web", kind="cycle")] == 2
    assert before["replicator_last_verification_timestamp_seconds"][of("web")] > 1.7e9


async def test_a_source_shows_nothing_that_only_a_receiver_knows(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        await log.register(WEB, "web", "source")
        async with log.change(WEB) as vm:
            vm.commit(point(1, PushKind.SEED))
        found = parsed(await Metrics(log, Live(throttle_mbps=lambda: 0)).page())
    assert found["replicator_dr_cycle_bytes_pushed"] == {of("web"): PUSHED}
    assert found["replicator_throttle_mbps"] == {frozenset(): 0}
    assert "replicator_recovery_points" not in found
    assert "replicator_last_verification_timestamp_seconds" not in found
    assert "replicator_certificate_expiry_timestamp_seconds" not in found
    # It has no Prism: a counter that can never count says nothing.
    assert "replicator_prism_api_errors_total" not in found
    assert "replicator_iscsi_attach_failures_total" not in found


async def test_a_clock_that_runs_behind_makes_no_negative_age(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        await fill(log)
        found = parsed(await Metrics(log, Live(), lambda: 1.0).page())
    assert found["replicator_rpo_age_seconds"] == {of("web"): 0}


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\nb", 'x"} 1\nevil_total 7', "größe", "{,}"])
async def test_no_name_can_be_anything_but_a_label(tmp_path: Path, name: str) -> None:
    async with open_log(tmp_path / "events") as log:
        await log.register(WEB, name, "receiver")
        found = parsed(await Metrics(log, Live(reconnects=lambda: {name: 1})).page())
    assert found["replicator_recovery_points"] == {of(name): 0}
    assert found["replicator_dr_reconnect_total"] == {of(name): 1}
    assert "evil_total" not in found


@pytest.mark.parametrize("kept", [(), (VmStates,)])
async def test_a_log_that_nothing_was_added_up_for_shows_zeros(
    tmp_path: Path, kept: tuple[type[VmStates], ...]
) -> None:
    async with open_log(tmp_path / "events", kept=kept) as log:
        await fill(log)
        found = parsed(await Metrics(log, Live()).page())
    assert found["replicator_push_bytes_total"] == {of("web"): 0, of("db"): 0}


async def test_two_vms_of_one_name_are_told_apart(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        for vm in (WEB, DB):
            await log.register(vm, "web", "receiver")
        found = parsed(await Metrics(log, Live()).page())
    assert found["replicator_recovery_points"] == {of(f"web ({vm})"): 0 for vm in (WEB, DB)}


async def fetch(port: int, request: str) -> tuple[int, Mapping[str, str], bytes]:
    with trio.fail_after(HANG_S):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(f"{request} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            data = b""
            while piece := await stream.receive_some():
                data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


async def test_the_page_on_tcp_and_nothing_else_there(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log, trio.open_nursery() as nursery:
        await log.register(WEB, "web", "receiver")
        port = await start_metrics(nursery, ("127.0.0.1", 0), Metrics(log, Live()))
        assert port is not None
        status, headers, body = await fetch(port, "GET /metrics")
        assert status == 200
        found = parsed(Page(headers["content-type"], body))
        assert found["replicator_recovery_points"] == {of("web"): 0}
        assert (await fetch(port, "GET /metrics?x=1"))[0] == 200
        for request in ("POST /metrics", "GET /", "GET /v1/status", "POST /v1/throttle"):
            assert (await fetch(port, request))[0] == 404, request
        with pytest.raises(StateError, match=f"metrics_listen: cannot listen on 127.0.0.1:{port}"):
            await start_metrics(nursery, ("127.0.0.1", port), Metrics(log, Live()))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9849", ("127.0.0.1", 9849)),
        ("mgmt.example:1", ("mgmt.example", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:9849", ("fe80::1%eth0", 9849)),
    ],
)
def test_where_it_listens(text: str, address: tuple[str, int]) -> None:
    assert check({"metrics_listen": text}).metrics_address == address


async def test_without_the_key_nothing_listens(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log, trio.open_nursery() as nursery:
        assert check({}).metrics_address is None
        assert await start_metrics(nursery, None, Metrics(log, Live())) is None
        assert not nursery.child_tasks


async def test_what_is_no_scrape_is_refused(tmp_path: Path) -> None:
    async with open_log(tmp_path / "events") as log:
        metrics = Metrics(log, Live())
        with pytest.raises(NotFoundError, match="only GET /metrics"):
            await metrics.handle("GET", "/metric", {})


def test_a_process_that_is_not_watched_does_not_load_the_library() -> None:
    code = (
        "import sys, receiver.daemon, replicator.cli.pushing;"
        "sys.exit(any(name.startswith('prometheus_client') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
