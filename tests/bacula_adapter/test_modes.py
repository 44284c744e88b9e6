# SPDX-License-Identifier: AGPL-3.0-or-later
"""Jobs that run a command: its answer is the job's file, its log the job's messages, its failure the job's."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from bacula_adapter.backend import command, modes
from bacula_adapter.backend.command import run_command
from bacula_adapter.backend.interface import Answer, JobInfo, JobKind, RestoredFile
from bacula_adapter.backend.modes import config_text, name_of, words_of
from replicator.config import Config, check, parse_lines
from replicator.errors import RefusedError, ReplicatorError, UsageError
from replicator.state_dir import open_state_dir
from tests.bacula_adapter.plugin import JOB, BackendFailedError, SavedFile, started_backend
from tests.cli.conftest import KEY, write_config
from tests.limits import HANG_S

INFO = JobInfo(name=JOB, job_id=1, kind=JobKind.BACKUP)


@dataclass
class Site:
    """A source of one image, and a receiver that nobody answers for."""

    folder: Path
    values: dict[str, object] = field(default_factory=dict)

    def config(self, **more: object) -> Path:
        return write_config(self.folder / "source.conf", {**self.values, **more})


@pytest.fixture
def site(tmp_path: Path) -> Site:
    image = tmp_path / "a.raw"
    image.write_bytes(b"x" * 70_000)
    return Site(
        tmp_path,
        {
            "source": "image", "vm": "web", "image_disks": f"disk-0={image}", "dr_host": "127.0.0.1", "dr_port": 1,
            "dr_auth_token": KEY, "state_dir": tmp_path / "state", "debug_log": tmp_path / "backend.log",
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "seed", "vm": "web-*"}, ["seed"]),
        ({"mode": "bitmap-push"}, ["push"]),
        ({"mode": "receiver"}, ["receiver"]),
        ({"mode": "estimate"}, ["estimate"]),
        ({"mode": "failover-test", "vm": "web"}, ["failover", "test", "web"]),
        (
            {"mode": "failover-test", "vm": "web", "point": "3"},
            ["failover", "test", "--point", "3", "web"],
        ),
        ({"mode": "failover-undo", "vm": "web"}, ["failover", "undo", "web"]),
        ({"mode": "failover-planned", "vm": "web"}, ["failover", "planned", "web"]),
        ({"mode": "failover-unplanned", "vm": "web"}, ["failover", "unplanned", "web"]),
        ({"mode": "failover-perm", "vm": "web"}, ["failover", "perm", "web"]),
    ],
)
def test_the_command_of_a_mode(values: dict[str, str], words: list[str]) -> None:
    assert words_of(check(values)) == words


@pytest.mark.parametrize("vm", ["*", "web-?", "a,b", "--help", ""])
def test_a_failover_takes_one_vm(vm: str) -> None:
    with pytest.raises(UsageError, match="vm: mode = failover-test takes one VM"):
        words_of(check({"mode": "failover-test", "vm": vm}))


def test_a_mode_that_takes_no_point() -> None:
    with pytest.raises(UsageError, match="point: mode = failover-undo takes no recovery point"):
        words_of(check({"mode": "failover-undo", "vm": "web", "point": "1"}))


def test_the_configuration_that_is_handed_over() -> None:
    values = {
        "vm": "a b",
        "dr_auth_token": KEY,
        "exclude": "x=y",
        "dr_host": "h",
        "power_on": "yes",
    }
    assert parse_lines(config_text(check({**values, "mode": "seed"}))) == values
    for value in ("a #b", 'a"', "a\nb", '"a"'):
        with pytest.raises(UsageError, match="restore_vm_name: its value cannot be handed"):
            config_text(check({"restore_vm_name": value}))


async def test_a_job_that_estimates(site: Site) -> None:
    """The real command, in the real process, with keys of the string on top of the file's."""
    async with started_backend(config=site.config(vm="other")) as plugin:
        saved = await plugin.backup_job("mode=estimate vm=web", level="F")
    (file,) = saved.files.values()
    assert file.name == f"@replicator/estimate/{JOB}.json"
    assert json.loads(file.content())["vm"] == "web"
    assert plugin.exit_code == 0
    assert [text for _, text in plugin.messages if "backend up" in text] == [plugin.messages[0][1]]


async def test_a_command_that_fails_fails_the_job(site: Site) -> None:
    async with started_backend(config=site.config()) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("mode=failover-test vm=web")
        with pytest.raises(BackendFailedError, match="run it on the receiver's host") as caught:
            await plugin.backup()
        assert caught.value.status == "A"
        await plugin.result("f")
        await plugin.end()


async def test_a_command_that_this_version_does_not_have_says_so(site: Site) -> None:
    async with started_backend(config=site.config(dr_host="")) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("mode=failover-perm vm=web")
        with pytest.raises(BackendFailedError, match=r"No such command 'perm'"):
            await plugin.backup()
        await plugin.end()


async def test_a_receiver_runs_until_the_job_is_cancelled(site: Site) -> None:
    config = write_config(
        site.folder / "receiver.conf",
        {"dr_listen": "127.0.0.1", "dr_port": _free_port(), "dr_auth_token": KEY,
         "state_dir": site.folder / "receiver", "debug_log": site.folder / "log"},
    )  # fmt: skip
    async with started_backend(config=config) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("mode=receiver")
        await plugin.start("BackupStart")
        with trio.fail_after(HANG_S):
            while "listening" not in plugin.text:
                packet = await plugin.packet()
                plugin.messages.append((packet.status, packet.text()))
        plugin.cancel()
        await plugin.result("A")
        await plugin.end()
    assert plugin.exit_code == 0
    assert not (site.folder / "receiver/control.sock").exists()


def _free_port() -> int:
    import socket  # noqa: PLC0415 - the one test that needs it

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def run_code(
    monkeypatch: pytest.MonkeyPatch, code: str, config: Config | None = None
) -> bytes:
    """As ``run_command``, of another program."""
    monkeypatch.setattr(command, "_CODE", code)
    return await run_command(["seed"], config_text(config or check({})))


async def test_what_the_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, os, stat, sys; f = open(sys.argv[2]); print(json.dumps([sys.argv[1:], f.read(), \
        stat.S_IMODE(os.fstat(f.fileno()).st_mode), sys.stdin.read()]))"
    )
    config = check({"dr_auth_token": KEY, "vm": "web"})
    words, text, mode, stdin = json.loads(await run_code(monkeypatch, code, config))
    assert words[0] == "--config"
    assert words[2:] == ["--json", "seed"]
    assert KEY not in " ".join(words)
    assert parse_lines(text) == {"dr_auth_token": KEY, "vm": "web"}
    assert (mode, stdin) == (0o600, "")


async def test_its_log_is_the_jobs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    code = """import sys
print("2026-11-25T10:00:00.000Z INFO    replicator backend up (v0) phase=x", file=sys.stderr)
print("2026-11-25T10:00:00.000Z WARNING the line\\n2026-11-25T10:00:00.000Z ERROR   bad", file=sys.stderr)
print("x" * 40000, file=sys.stderr)
print("replctl: no such VM", end="", file=sys.stderr)
sys.exit(3)"""
    with pytest.raises(ReplicatorError, match=r"^no such VM$"):
        await run_code(monkeypatch, code)
    records = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == command.__name__]
    assert records == [("WARNING", "the line"), ("ERROR", "bad")]


async def test_one_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReplicatorError, match=r"^seed failed \(-9\)$"):
        await run_code(monkeypatch, "import os; os.kill(os.getpid(), 9)")


async def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_ANSWER_MAX", 1 << 20)
    code = "import os\nwhile True: os.write(1, bytes(65536))"
    with pytest.raises(ReplicatorError, match="answered more than 1048576 bytes"):
        await run_code(monkeypatch, code)


@pytest.mark.parametrize("ignored", [0, 1, 2])
async def test_a_cancelled_command_is_interrupted_then_terminated_then_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ignored: int
) -> None:
    monkeypatch.setattr(command, "_INTERRUPT_S", 0.1 if ignored else HANG_S)
    monkeypatch.setattr(command, "_TERMINATE_S", 0.1 if ignored > 1 else HANG_S)
    deaf = [signal.SIGINT, signal.SIGTERM][:ignored]
    seen = tmp_path / "seen"
    code = f"""import os, signal, sys
def note(number, frame):
    open({str(seen)!r}, "a").write(f"{{number}} ")
    if number not in {[int(number) for number in deaf]}: sys.exit(130)
for number in (2, 15): signal.signal(number, note)
print("2026-11-25T10:00:00.000Z INFO    ready", file=sys.stderr, flush=True)
while True: signal.pause()"""
    async with trio.open_nursery() as nursery:
        ready = trio.Event()
        monkeypatch.setattr(command._logger, "log", lambda *_: ready.set())
        nursery.start_soon(run_code, monkeypatch, code)
        with trio.fail_after(HANG_S):
            await ready.wait()
            nursery.cancel_scope.cancel()
    assert seen.read_text().split() == ["2", "15"][: ignored + 1]


async def test_nothing_of_it_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    assert await run_code(monkeypatch, "print(1)") == b"1\n"
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_it_does_not_outlive_the_backend(site: Site) -> None:
    """The backend is killed: the kernel interrupts what it runs."""
    config = write_config(
        site.folder / "receiver.conf",
        {"dr_listen": "127.0.0.1", "dr_port": _free_port(), "dr_auth_token": KEY,
         "state_dir": site.folder / "receiver", "debug_log": site.folder / "log"},
    )  # fmt: skip
    async with started_backend(config=config) as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("mode=receiver")
        await plugin.start("BackupStart")
        with trio.fail_after(HANG_S):
            while "listening" not in plugin.text:
                packet = await plugin.packet()
                plugin.messages.append((packet.status, packet.text()))
            plugin.cancel(signal.SIGKILL)
            # As long as it runs, it holds the lock of its state directory.
            while True:
                try:
                    with open_state_dir(site.folder / "receiver"):
                        break
                except RefusedError:
                    await trio.sleep(0.01)


async def test_the_estimate_of_such_a_job(site: Site) -> None:
    async with started_backend(config=site.config()) as plugin:
        await plugin.hello()
        await plugin.job(kind="E")
        await plugin.params("mode=seed")
        (entry,) = await plugin.entries()
        assert entry.name == name_of(INFO, "seed")
        await plugin.end()


async def test_a_query_of_such_a_job() -> None:
    async with modes.open_command_listing(INFO, check({"mode": "seed"})) as listing:
        assert [pair async for pair in listing.query("name")] == [("name", name_of(INFO, "seed"))]
        assert [entry.name async for entry in listing.listing("/")] == [name_of(INFO, "seed")]
        with pytest.raises(UsageError, match="query: vm cannot be asked"):
            [pair async for pair in listing.query("vm")]


async def test_such_a_file_is_restored_by_bacula(site: Site) -> None:
    file = SavedFile("x", 2, "F 2 0 0 100600 1", "1 2 3", pieces=[(0, b"{}")])
    async with started_backend(config=site.config()) as plugin:
        answers = await plugin.restore_job("mode=seed", {name_of(INFO, "seed"): file}, where="/r")
    assert answers == ["CORE"]


async def test_handlers_do_what_they_have_to() -> None:
    async with modes.open_report_restore(INFO, check({})) as restore:
        assert await restore.create(RestoredFile(name="x", size=1, mtime_s=0)) is Answer.CORE
        await restore.restore_object("x", 25, 1, b"")
        with pytest.raises(AssertionError):
            await restore.data(0, b"x")
        with pytest.raises(AssertionError):
            await restore.close(whole=True)
    async with modes.open_command(INFO, check({"mode": "seed"})) as backup:
        assert not await backup.exists("x")
        assert list(backup.claims) == []
