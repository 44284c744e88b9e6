# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl health-check` as a whole: a process, a configuration, sockets, TLS; and what docs/json.md promises of its answer."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import trio

from tests.iscsi.lab import INITIATOR, free_portal, target_daemon
from tests.limits import HANG_S
from tests.prism.lab import PC, PE, Script, ca_file, server_tls
from tests.prism_v3.fake import Fake

DOCUMENT = (Path(__file__).parents[2] / "docs" / "json.md").read_text("utf-8")


@dataclass(frozen=True)
class Served:
    """Where the scripted Prism and its Element listen."""

    central: int
    element: int


@asynccontextmanager
async def served(fake: Fake) -> AsyncGenerator[Served, None]:
    tls = server_tls("127.0.0.1")

    async with trio.open_nursery() as nursery:
        script = Script(nursery, fake)

        async def serve(plain: trio.SocketStream, host: str) -> None:
            stream = trio.SSLStream(plain, tls, server_side=True, https_compatible=True)
            try:
                await script._serve(stream, host)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # the client has gone
            finally:
                await trio.aclose_forcefully(stream)

        ports = []
        for host in (PC, PE):
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            ports.append(listener.socket.getsockname()[1])
            nursery.start_soon(trio.serve_listeners, partial(serve, host=host), [listener])
        yield Served(*ports)
        nursery.cancel_scope.cancel()


def configured(folder: Path, at: Served, **changes: object) -> Path:
    secret = folder / "pass"
    secret.write_text("password = the-secret-word\n", "utf-8")
    secret.chmod(0o600)
    values = {
        "prism_central": f"127.0.0.1:{at.central}",
        "prism_element": f"cluster-a=127.0.0.1:{at.element}",
        "user": "svc-dr",
        "passfile": secret,
        "prism_ca_cert": ca_file(folder),
        "iscsi_initiator": INITIATOR,
        "state_dir": folder / "state",
        **changes,
    }
    path = folder / "replicator.conf"
    lines = [f"{key} = {value}\n" for key, value in values.items() if value is not None]
    path.write_text("".join(lines), "utf-8")
    path.chmod(0o600)
    return path


async def run(*words: str | Path, program: str = "replicator.cli.main") -> CompletedProcess[bytes]:
    code = f"import sys; from {program} import main; sys.exit(main())"
    with trio.fail_after(HANG_S):
        return await trio.run_process(
            [sys.executable, "-c", code, *map(str, words)],
            check=False,
            capture_stdout=True,
            capture_stderr=True,
            env={**os.environ, "COLUMNS": "200"},
        )


def promised(name: str) -> set[str]:
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return set(re.findall(r"^\| `(\w+)` \|", found[1], re.MULTILINE))


def keeps_promise(report: dict[str, Any]) -> None:
    assert report.keys() == promised("HealthReport")
    for probe in report["probes"]:
        assert probe.keys() == promised("HealthProbe")
        assert probe["findings"]
        for finding in probe["findings"]:
            assert finding.keys() == promised("HealthFinding")
            assert (finding["remedy"] is not None) == (finding["state"] in {"warning", "failed"})


async def test_ready(tmp_path: Path) -> None:
    async with target_daemon() as daemon, served(Fake()) as at:
        await daemon.add_target()
        config = configured(tmp_path, at, dsip=daemon.portal)
        as_json = await run("--config", config, "--json", "health-check")
        table = await run("--config", config, "health-check")
    assert as_json.returncode == 0, as_json.stderr
    report = json.loads(as_json.stdout)
    keeps_promise(report)
    assert (report["ready"], report["api"]) == (True, "v3")
    assert [probe["state"] for probe in report["probes"]] == ["ok"] * 5
    assert table.returncode == 0
    shown = table.stdout.decode()
    first = next(line for line in shown.splitlines() if " ok " in line)
    assert first.startswith("reach Prism ")
    assert f"127.0.0.1:{at.central} (v3): ready for a job" in shown
    assert not (tmp_path / "state").exists()  # it changes nothing
    assert b"the-secret-word" not in as_json.stdout + as_json.stderr + table.stdout + table.stderr


async def test_not_ready_is_exit_code_1_and_the_whole_report(tmp_path: Path) -> None:
    async with served(Fake(user="svc-dr", roles={"Prism Viewer": ("View_Cluster",)})) as at:
        config = configured(tmp_path, at, dsip=free_portal())
        done = await run("--config", config, "--json", "health-check")
        table = await run("--config", config, "health-check")
    assert (done.returncode, table.returncode) == (1, 1)
    report = json.loads(done.stdout)  # one document
    keeps_promise(report)
    assert [probe["state"] for probe in report["probes"]] == ["ok", "ok", "ok", "failed", "failed"]
    assert b"is not ready for a job" in done.stderr
    assert b"rights: give the account a role that holds Create_Volume_Group" in table.stdout


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"prism_central": None}, b"prism_central"),
        ({"user": None}, b"user"),
        ({"source": "image"}, b"source"),
        ({"prism_ca_cert": "/nowhere/ca.pem"}, b"prism_ca_cert"),
    ],
)
async def test_a_wrong_configuration_is_exit_code_2(
    tmp_path: Path, changes: dict[str, object], key: bytes
) -> None:
    config = configured(tmp_path, Served(1, 2), **changes)
    done = await run("--config", config, "health-check")
    assert done.returncode == 2
    assert key in done.stderr
    assert done.stdout == b""


async def test_the_backend_has_it_too(tmp_path: Path) -> None:
    config = configured(tmp_path, Served(1, 2), source="image")
    done = await run(
        "--standalone", "--config", config, "health-check", program="bacula_adapter.backend_command"
    )
    assert done.returncode == 2
    assert b"health-check looks at Prism" in done.stderr
