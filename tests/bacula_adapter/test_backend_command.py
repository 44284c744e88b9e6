# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bacula_adapter import backend_command
from replicator import __version__
from tests.bacula_adapter.plugin import (
    BackendEndedError,
    BackendFailedError,
    started_backend,
)
from tests.limits import HANG_S


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert backend_command.main(["--version"]) == 0
    assert capsys.readouterr() == (f"replicator-backend {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--protocol", "1"], ["status", "--standalone"], ["-h"]])
def test_arguments_are_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert backend_command.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "backend protocol" in err
    assert "--standalone" in err


def test_standalone_is_replctl() -> None:
    """The installed command, as a process: same words and same exit code as `replctl`."""

    def run(module: str, *arguments: str) -> tuple[int, str]:
        code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    backend = run("bacula_adapter.backend_command", "--standalone", "--version")
    assert backend == run("replicator.cli.main", "--version")
    assert backend[0] == 0
    assert __version__ in backend[1]


def test_a_terminal_is_no_plugin() -> None:
    main_end, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bacula_adapter.backend_command"],
            stdin=terminal,
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_S,
        )
    finally:
        os.close(main_end)
        os.close(terminal)
    assert (done.returncode, done.stdout) == (2, "")
    assert "started by Bacula's plugin replicator-fd.so" in done.stderr


async def test_a_wrong_plugin_string_fails_the_job_before_anything_is_touched(
    tmp_path: Path,
) -> None:
    async with started_backend() as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params(f"vn=web state_dir={tmp_path}/state")
        with pytest.raises(BackendFailedError, match=r"^unknown key vn") as caught:
            await plugin.backup()
        assert caught.value.status == "A"
        await plugin.result("f")
        await plugin.end()
    assert plugin.exit_code == 0
    assert os.listdir(tmp_path) == []


async def test_a_cancelled_job() -> None:
    """By the signal, of the real process."""
    async with started_backend() as plugin:
        await plugin.hello()
        await plugin.job()
        plugin.cancel()
        with pytest.raises(BackendFailedError, match=r"^the job was cancelled$"):
            await plugin.receive()
        await plugin.result("A")
        await plugin.end()
    assert plugin.exit_code == 0


async def test_sigterm_ends_it() -> None:
    async with started_backend() as plugin:
        await plugin.hello()
        plugin.cancel(signal.SIGTERM)
        with pytest.raises(BackendFailedError, match=r"^the job was cancelled$"):
            await plugin.receive()
        with pytest.raises(BackendEndedError):
            await plugin.receive()


async def test_the_end_of_the_input_ends_it() -> None:
    async with started_backend() as plugin:
        await plugin.hello()
        plugin.close_input()
        with pytest.raises(BackendEndedError):
            await plugin.receive()
    assert plugin.exit_code == 1


LOUD = """
import os, sys
from bacula_adapter import backend_command
from bacula_adapter.backend import dispatch
class Loud(dispatch.Product):
    def prepare(self, *words, **more):
        print("loud", flush=True); os.write(1, b"louder\\n"); os.system("echo loudest; cat")
        return super().prepare(*words, **more)
dispatch.Product = Loud
sys.exit(backend_command.main([]))
"""


async def test_what_a_library_prints_does_not_get_into_the_dialogue() -> None:
    async with started_backend(code=LOUD, stderr="loud\nlouder\nloudest\n") as plugin:
        await plugin.hello()
        await plugin.job()
        await plugin.params("vn=web")
        with pytest.raises(BackendFailedError, match=r"^unknown key vn"):
            await plugin.backup()
        await plugin.end()
    assert plugin.exit_code == 0
