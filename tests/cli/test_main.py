# SPDX-License-Identifier: AGPL-3.0-or-later
"""The command as a whole: words in, exit code and lines out, whatever goes wrong inside."""

from __future__ import annotations

import errno
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import trio
from eventsourcing.persistence import OperationalError

from replicator import __version__
from replicator.cli import main as main_module
from replicator.cli.context import CliContext
from replicator.cli.failures import Failure, explain
from replicator.cli.main import COMPLETE, DEFAULT_CONFIG
from replicator.cli.text import duration, one_line, size
from replicator.config import DEFAULT_PATH
from replicator.errors import DamageError, RefusedError, ReplicatorError, UsageError
from tests.cli.conftest import Done, Replctl, write_config


def test_version(replctl: Replctl) -> None:
    assert replctl("--version") == Done(0, f"replctl {__version__}\n", "")


def test_help_lists_every_command(replctl: Replctl) -> None:
    done = replctl("--help")
    assert (done.code, done.err) == (0, "")
    listed = set(re.findall(r"^  ([a-z][a-z-]*)  ", done.out, re.MULTILINE))
    assert listed == {
        "backups", "completion", "estimate", "export", "failover", "health-check", "history", "log", "owned", "points",
        "projections", "push", "receiver", "restore-images", "resync", "run", "seed", "simulate", "status", "throttle",
        "usage", "verify",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "Missing command"),
        (["sede"], "No such command 'sede'"),
        (["--colour", "status"], "No such option"),
        (["points"], "Missing argument 'VM'"),
        (["points", "a", "b"], "unexpected extra argument"),
        (["verify", "web", "--point", "0"], "--point"),
        (["history", "web", "--limit", "0"], "--limit"),
        (["export", "web", "--disk", "0"], "--to"),
        (["failover"], "Missing command"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    replctl: Replctl, words: list[str], expected: str
) -> None:
    done = replctl(*words)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"replctl: [^\n]+ \(see replctl[a-z ]* --help\)\n", done.err), done.err
    assert expected in done.err


def test_json_puts_the_error_on_stdout_as_well(replctl: Replctl, tmp_path: Path) -> None:
    done = replctl("--json", "--config", tmp_path / "none", "status")
    assert done.code == 2
    text = f"configuration {tmp_path}/none: No such file or directory"
    assert done.json == {"error": text, "exit_code": 2}
    assert done.err == f"replctl: {text}\n"


def test_the_default_configuration_is_the_products() -> None:
    assert DEFAULT_CONFIG == DEFAULT_PATH


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ReplicatorError("no\nsuch\tthing"), Failure("no such thing", 1)),
        (UsageError("x"), Failure("x", 2)),
        (RefusedError("x"), Failure("x", 3)),
        (KeyboardInterrupt(), Failure(None, 130)),
        (click.ClickException("cannot"), Failure("cannot", 1)),
        (OSError(errno.ENOSPC, "No space left on device"), Failure("No space left on device", 1)),
        (OSError(errno.EACCES, "Permission denied", "/x"), Failure("/x: Permission denied", 1)),
        (OperationalError("event store /x: full"), Failure("event store /x: full", 1)),
        (
            ZeroDivisionError("division by zero"),
            Failure(
                "internal error: ZeroDivisionError: division by zero (verbose = 3 shows where)", 1
            ),
        ),
        (
            BaseExceptionGroup(
                "", [ValueError("x"), ExceptionGroup("", [OSError("y"), DamageError("z")])]
            ),
            Failure("z", 1),
        ),
        (BaseExceptionGroup("", [UsageError("x"), KeyboardInterrupt()]), Failure(None, 130)),
        (
            ReplicatorError("name \x1b[2J of a peer"),
            Failure("name \N{REPLACEMENT CHARACTER}[2J of a peer", 1),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_is_a_line_and_a_code(error: BaseException, failure: Failure) -> None:
    assert explain(error) == failure


def plugin(monkeypatch: pytest.MonkeyPatch, load: Callable[[], object]) -> None:
    """Put a command `extra` in place, as an installed distribution would."""

    class Entry:
        name = "extra"

        def load(self) -> object:
            return load()

    def entry_points(*, group: str, name: str | None = None) -> list[Entry]:
        assert group == "replctl.commands"
        return [Entry()] if name in (None, "extra") else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def raises(error: BaseException) -> object:
    raise error


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (
            lambda: raises(ImportError("No module named 'nowhere'")),
            "ImportError: No module named 'nowhere'",
        ),
        (lambda: raises(RuntimeError("two\nlines")), "RuntimeError: two lines"),
        (object, "it is no command"),
    ],
)
def test_a_broken_plugin_says_so_and_takes_nothing_else_down(
    replctl: Replctl, monkeypatch: pytest.MonkeyPatch, load: Callable[[], object], reason: str
) -> None:
    plugin(monkeypatch, load)
    expected = f"replctl: command extra cannot be loaded: {reason}\n"
    assert replctl("extra", "--some", "words") == Done(1, "", expected)
    done = replctl("--help")
    assert done.code == 0
    assert "cannot be loaded" in done.out


def test_a_plugin_is_handed_the_context(
    replctl: Replctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[CliContext] = []

    @click.command()
    @click.pass_obj
    def extra(context: CliContext) -> None:
        seen.append(context)

    plugin(monkeypatch, lambda: extra)
    config = write_config(tmp_path / "c.conf", {"vm": "web"})
    assert replctl("--json", "--config", config, "extra") == Done(0, "", "")
    assert (seen[0].config_path, seen[0].json) == (config, True)
    assert seen[0].config().vm == "web"
    assert seen[0].config() is seen[0].config()


@pytest.mark.parametrize(("verbose", "traced"), [(2, False), (3, True)])
def test_a_traceback_shows_at_verbose_3_only(
    replctl: Replctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verbose: int, traced: bool
) -> None:
    @click.command()
    @click.pass_obj
    def extra(context: CliContext) -> None:
        context.config()

        async def fail() -> None:
            async with trio.open_nursery():
                raise ZeroDivisionError("x")

        trio.run(fail)

    plugin(monkeypatch, lambda: extra)
    done = replctl("--config", write_config(tmp_path / "c.conf", {"verbose": verbose}), "extra")
    assert done.code == 1
    assert ("Traceback" in done.err) is traced
    assert done.err.splitlines()[-1].startswith("replctl: internal error: ZeroDivisionError: x")
    assert traced or done.err.count("\n") == 1


def test_an_interrupt_is_quiet(replctl: Replctl, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(
        monkeypatch, lambda: click.Command("extra", callback=lambda: raises(KeyboardInterrupt()))
    )
    assert replctl("--json", "extra") == Done(130, "", "")


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    """`replctl … | head -0`: as processes, because it is the interpreter's end that used to complain."""
    code = (
        "import sys; from replicator.cli.main import main; sys.exit(main(['completion', 'fish'] ))"
    )
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)\n{code}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        _, err = process.communicate()
    assert (process.returncode, err) == (1, "")


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_completion_scripts(replctl: Replctl, shell: str) -> None:
    done = replctl("completion", shell)
    assert (done.code, done.err) == (0, "")
    assert f"{COMPLETE}={shell}_complete" in done.out


def test_the_shell_is_told_the_words(replctl: Replctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPLETE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "replctl po")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert replctl() == Done(0, "plain,points\n", "")


def test_starting_loads_neither_the_wire_nor_the_store() -> None:
    """What makes the command start fast; trio, cryptography and the event store take most of a second together."""
    code = (
        "import sys; from replicator.cli.main import main; main(['--version'])\n"
        "print([name for name in ('trio', 'cryptography', 'eventsourcing', 'rich', 'msgspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_figures_for_people() -> None:
    assert [size(count) for count in (0, 1023, 1024, 1 << 20, 3 << 39, 1 << 60)] == [
        "0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.5 TiB", "1024.0 PiB",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.044, 1.26, 61, 3661, 90000)] == [
        "44 ms", "1.3 s", "1 min 1 s", "1 h 1 min", "1 d 1 h",
    ]  # fmt: skip
    assert one_line(" a\r\n\x07b\u202e ") == "a \N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    assert main_module.PROGRAM == "replctl"
