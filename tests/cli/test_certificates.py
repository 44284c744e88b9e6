# SPDX-License-Identifier: AGPL-3.0-or-later
"""Certificates as an operator has them: made by the lines of the documents, in configurations, in status, in processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from receiver.daemon import run_receiver
from replicator.config import check, parse_lines
from tests.cli.conftest import KEY, Done, Replctl, source_values, write_config
from tests.limits import HANG_S
from tests.wire.tls_lab import authorities, issue, write

ROOT = Path(__file__).parents[2]
RUN = "import sys; from replicator.cli.main import main; sys.exit(main(sys.argv[1:]))"
NOW = datetime.now(UTC)


@asynccontextmanager
async def receiver(folder: Path, values: dict[str, Any]) -> AsyncIterator[tuple[Path, int]]:
    """A receiver in this process: its configuration, for ``replctl``, and its port."""
    (folder / "dr").mkdir()
    whole = {"state_dir": folder / "dr", **values}
    path = write_config(folder / "receiver.conf", whole)
    config = check({key: str(value) for key, value in whole.items()})
    async with trio.open_nursery() as nursery:
        port = await nursery.start(run_receiver, msgspec.structs.replace(config, dr_port=0))
        yield path, port
        nursery.cancel_scope.cancel()


def blocks() -> list[str]:
    """The blocks of "Certificates and keys" in docs/operating.md."""
    text = (ROOT / "docs/operating.md").read_text("utf-8")
    section = text.split("## Certificates and keys\n")[1].split("\n## ")[0]
    return re.findall(r"```\n(.*?)```", section, re.DOTALL)


async def test_the_lines_of_the_documents_make_certificates_that_work(
    tmp_path: Path, replctl: Replctl
) -> None:
    lines, at_receiver, at_source = blocks()
    assert lines.count("192.0.2.7") == 1
    here = tmp_path / "certificates"
    here.mkdir()
    await trio.run_process(
        ["bash", "-euc", lines.replace("192.0.2.7", "127.0.0.1")],
        cwd=here,
        capture_stderr=True,
        stdin=subprocess.DEVNULL,
    )
    assert {path.suffix for path in here.iterdir() if path.stat().st_mode & 0o077} == set()
    theirs, ours = (
        parse_lines(text.replace("/etc/replicator", str(here))) for text in (at_receiver, at_source)
    )
    async with receiver(tmp_path, theirs) as (dr, port):

        async def seed(vm: str) -> Done:
            (tmp_path / vm).mkdir()
            values = source_values(tmp_path / vm, dr_auth_token=None, dr_port=port, vm=vm, **ours)
            config = write_config(tmp_path / vm / "source.conf", values)
            return await trio.to_thread.run_sync(partial(replctl, "--config", config, "seed"))

        assert (await seed("web-1")).code == 0
        done = await seed("mail")
        assert done.code == 3
        assert "the certificate site-a.example may not push VM mail" in done.err
        done = await trio.to_thread.run_sync(partial(replctl, "--json", "--config", dr, "status"))
        assert [(vm["vm"], vm["warnings"]) for vm in done.json] == [("web-1", [])]


def files(folder: Path, name: str, *names: str, days: float = 300) -> dict[str, Any]:
    certificate = issue(
        *names, not_before=NOW - timedelta(days=40), not_after=NOW + timedelta(days=days)
    )
    cert, key = write(folder, certificate, name)
    (folder / "ca.pem").write_text(authorities())
    return {"dr_auth_cert": cert, "dr_auth_key": key, "dr_ca_cert": folder / "ca.pem"}


async def test_status_of_both_sides_warns_before_a_certificate_ends(
    tmp_path: Path, replctl: Replctl
) -> None:
    theirs = files(tmp_path, "receiver", "127.0.0.1", days=12.5)
    async with receiver(tmp_path, theirs) as (dr, port):

        async def told(config: Path, *words: str) -> Done:
            return await trio.to_thread.run_sync(
                partial(replctl, "--json", "--config", config, *words)
            )

        ours = files(tmp_path, "source", "web", days=3.5)
        source = write_config(
            tmp_path / "source.conf",
            source_values(tmp_path, dr_auth_token=None, dr_port=port, **ours),
        )
        done = await told(source, "seed")
        assert done.code == 0
        assert f"certificate {tmp_path}/source.pem expires in 3 days (" in done.err
        (at_source,) = (await told(source, "status")).json
        (at_receiver,) = (await told(dr, "status")).json
        (line,) = at_source["warnings"]
        assert line.startswith(f"certificate {tmp_path}/source.pem expires in 3 days (")
        (line,) = at_receiver["warnings"]
        assert line.startswith(f"certificate {tmp_path}/receiver.pem expires in 12 days (")

        # Renewed: the source's own status reads the file, the receiver's when somebody connects.
        files(tmp_path, "source", "web")
        files(tmp_path, "receiver", "127.0.0.1")
        assert (await told(source, "push")).code == 0
        for config in (source, dr):
            (status,) = (await told(config, "status")).json
            assert status["warnings"] == []
        # What a receiver cannot read again is a warning there, and the source goes on.
        (tmp_path / "receiver.pem").write_text("nothing")
        assert (await told(source, "push")).code == 0
        (status,) = (await told(dr, "status")).json
        (line,) = status["warnings"]
        assert line == (
            f"credentials were not read again: dr_auth_cert: {tmp_path}/receiver.pem holds no"
            " certificate in PEM form"
        )
        # An expired one: the source says so itself, and status too.
        files(tmp_path, "source", "web", days=-2.5)
        done = await told(source, "push")
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert line.startswith("replctl: dr_auth_cert: certificate ")
        assert "source.pem expired 2 days ago (" in line
        assert line.endswith("): renew it")
        (status,) = (await told(source, "status")).json
        assert any("source.pem expired 2 days ago" in line for line in status["warnings"])


@pytest.mark.parametrize("command", ["seed", "push", "resync"])
@pytest.mark.parametrize(
    ("days", "expected"), [(-2.5, "expired 2 days ago"), (300, "is not valid before")]
)
def test_an_own_certificate_that_does_not_hold_is_refused_before_anything_is_touched(
    tmp_path: Path, replctl: Replctl, command: str, days: float, expected: str
) -> None:
    begins = NOW + (timedelta(days=9) if days > 0 else timedelta(days=-40))
    values = files(tmp_path, "source", "web")
    write(
        tmp_path,
        issue("web", not_before=begins, not_after=NOW + timedelta(days=days)),
        "source",
    )
    config = write_config(
        tmp_path / "source.conf", source_values(tmp_path, dr_auth_token=None, **values)
    )
    done = replctl("--config", config, command)
    assert (done.code, done.out) == (2, "")
    said = f"replctl: dr_auth_cert: certificate {tmp_path}/source.pem {expected} "
    assert re.fullmatch(re.escape(said) + r"[^\n]* renew it\n", done.err), done.err
    assert not (tmp_path / "state").exists()


async def test_run_lives_on_with_an_expired_certificate_and_takes_the_renewed_one(
    tmp_path: Path,
) -> None:
    async with receiver(tmp_path, files(tmp_path, "receiver", "127.0.0.1")) as (_, port):
        ours = files(tmp_path, "source", "web", days=-2.5)
        config = write_config(
            tmp_path / "source.conf",
            source_values(tmp_path, dr_auth_token=None, dr_port=port, push_interval=1, **ours),
        )
        words = [sys.executable, "-c", RUN, "--config", str(config), "run"]
        start = partial(trio.run_process, words, stderr=subprocess.PIPE, check=False)
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(start)
            assert process.stderr is not None
            said = b""
            refused = f"this cycle failed: dr_auth_cert: certificate {tmp_path}/source.pem expired"
            with trio.fail_after(HANG_S):
                while said.count(refused.encode()) < 2:
                    said += await piece_of(process, said)
                files(tmp_path, "source", "web")
                while b"DR cycle complete: vm=web cycle=1 " not in said:
                    said += await piece_of(process, said)
                process.terminate()
                assert await process.wait() == 0


async def piece_of(process: trio.Process, said: bytes) -> bytes:
    """What it says next; it must not have ended."""
    assert process.stderr is not None
    piece = await process.stderr.receive_some()
    assert piece, said
    return bytes(piece)


@pytest.mark.parametrize("command", ["seed", "push", "run", "receiver"])
def test_bad_certificates_are_refused_before_anything_is_touched(
    tmp_path: Path, replctl: Replctl, command: str
) -> None:
    values = files(tmp_path, "side", "web")
    if command == "receiver":
        values |= {"state_dir": tmp_path / "state"}
    else:
        values = source_values(tmp_path, dr_auth_token=None, **values)
    config = write_config(tmp_path / "side.conf", values)
    (tmp_path / "side.key.pem").chmod(0o644)
    done = replctl("--config", config, command)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"replctl: dr_auth_key: {tmp_path}/side.key.pem holds a secret and is open to others"
        f" (mode 0644): chmod 600 {tmp_path}/side.key.pem\n"
    )
    assert not (tmp_path / "state").exists()


def key_file(folder: Path) -> Path:
    key = folder / "dr.key"
    key.touch(mode=0o600)
    key.write_text(KEY)
    return key


async def test_run_reads_its_credentials_again_at_sighup_and_goes_on(tmp_path: Path) -> None:
    """A process of its own: signals are the point."""
    key = key_file(tmp_path)
    config = write_config(tmp_path / "side.conf", source_values(tmp_path, dr_auth_token=key))
    words = [sys.executable, "-c", RUN, "--config", str(config), "run"]
    start = partial(trio.run_process, words, stderr=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(start)
        said = b""

        async def until(text: bytes) -> None:
            nonlocal said
            assert process.stderr is not None
            while text not in said:
                piece = await process.stderr.receive_some()
                assert piece, said
                said += piece

        with trio.fail_after(HANG_S):
            await until(b"trying again")
            process.send_signal(signal.SIGHUP)
            await until(b"credentials in use: key dr.key (fingerprint ")
            key.write_text("nothing")
            process.send_signal(signal.SIGHUP)
            await until(b"those read before stay in use: dr_auth_token: ")
            process.send_signal(signal.SIGTERM)
            await until(b"stopping on SIGTERM\n")
            assert await process.wait() == 0, said
    assert KEY.encode() not in said


async def test_a_receiver_reads_its_credentials_again_at_sighup_and_goes_on(
    tmp_path: Path, replctl: Replctl, caplog: pytest.LogCaptureFixture
) -> None:
    key = key_file(tmp_path)
    async with receiver(tmp_path, {"dr_auth_token": key}) as (_, port):
        key.write_text("cd" * 32)
        with caplog.at_level(logging.INFO, "replicator.credentials"):
            os.kill(os.getpid(), signal.SIGHUP)
            with trio.fail_after(HANG_S):
                while "credentials in use: key dr.key" not in caplog.text:
                    await trio.testing.wait_all_tasks_blocked(0.001)
        values = source_values(tmp_path, dr_auth_token="cd" * 32, dr_port=port)
        config = write_config(tmp_path / "source.conf", values)
        done = await trio.to_thread.run_sync(partial(replctl, "--config", config, "seed"))
        assert done.code == 0, done.err
