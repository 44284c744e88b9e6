# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import subprocess
import sys

import pytest

from bacula_adapter import backend_command
from replicator import __version__


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
