# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl`: the group of commands, and the one place where an error becomes a line and an exit code.

Commands load when they are called, so that the command starts fast and a wrong call fails at once. The receiver's
command stands above this package in the import order: it is found by its entry point.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replicator import __version__
from replicator.cli.context import CliContext
from replicator.cli.failures import Failure, explain
from replicator.cli.text import one_line
from replicator.errors import ReplicatorError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

PROGRAM = "replctl"
PLUGINS = "replctl.commands"
COMPLETE = "_REPLCTL_COMPLETE"
#: As ``replicator.config.DEFAULT_PATH``, which loads half the product.
DEFAULT_CONFIG = Path("/etc/replicator/replicator.conf")

_COMMANDS = {
    "backups": "replicator.cli.backups:backups",
    "completion": "replicator.cli.completion:completion",
    "estimate": "replicator.cli.estimating:estimate",
    "export": "replicator.cli.receiving:export",
    "failover": "replicator.cli.receiving:failover",
    "health-check": "replicator.cli.health_checking:health_check",
    "history": "replicator.cli.showing:history",
    "log": "replicator.cli.logbook:log",
    "owned": "replicator.cli.owning:owned",
    "points": "replicator.cli.showing:points",
    "projections": "replicator.cli.projecting:projections",
    "push": "replicator.cli.pushing:push",
    "resync": "replicator.cli.resyncing:resync",
    "run": "replicator.cli.pushing:run",
    "seed": "replicator.cli.pushing:seed",
    "simulate": "replicator.cli.simulating:simulate",
    "status": "replicator.cli.showing:status",
    "throttle": "replicator.cli.throttling:throttle",
    "usage": "replicator.cli.accounting:usage",
    "verify": "replicator.cli.receiving:verify",
}


class Commands(click.Group):
    """Finds a command when it is called: our own by name, others by entry point."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command there is, in the order of names."""
        del ctx
        plugins = {entry.name for entry in _plugins()}
        return sorted(plugins | _COMMANDS.keys())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; one that cannot be loaded says so when it is called."""
        del ctx
        where = _COMMANDS.get(cmd_name)
        if where is not None:
            module, _, name = where.partition(":")
            command: click.Command = getattr(importlib.import_module(module), name)
            return command
        for entry in _plugins():
            if entry.name == cmd_name:
                return _load(entry)
        return None


def _plugins() -> EntryPoints:
    """The commands of other packages. Loads what reads their metadata, which costs more than a command of our own."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - as it says

    return entry_points(group=PLUGINS)


def _load(entry: EntryPoint) -> click.Command:
    try:
        loaded = entry.load()
    except Exception as error:  # noqa: BLE001 - a plugin may fail in any way, and must take nothing else down
        return _broken(entry.name, f"{type(error).__name__}: {error}")
    return loaded if isinstance(loaded, click.Command) else _broken(entry.name, "it is no command")


def _broken(name: str, reason: str) -> click.Command:
    text = one_line(f"command {name} cannot be loaded: {reason}")

    def fail() -> None:
        raise ReplicatorError(text)

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(name, anything, fail, short_help=f"({text})", add_help_option=False)


@click.group(PROGRAM, cls=Commands, no_args_is_help=False)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    envvar="REPLCTL_CONFIG",
    default=DEFAULT_CONFIG,
    show_default=True,
    help="Configuration file; REPLCTL_CONFIG names it as well.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Answer in JSON (docs/json.md), and in nothing else."
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def replctl(ctx: click.Context, config_path: Path, as_json: bool) -> None:
    """Disaster recovery of virtual machine disks.

    At the source: seed, push, resync, run, throttle, estimate; with Nutanix health-check and owned too. On the receiver: receiver,
    verify, export, failover. On both: status, points, history, usage, backups, log, projections.
    """
    ctx.obj = CliContext(config_path, as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; ``arguments`` are those of the process unless given.

    Returns 0 done, 1 failed, 2 usage or configuration, 3 refused by state, 130 interrupted. Never raises: an error is
    one line on stderr (and with --json one object on stdout).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get(COMPLETE):
        return _complete(os.environ[COMPLETE])
    context: CliContext | None = None
    try:
        with replctl.make_context(PROGRAM, list(given)) as ctx:
            try:
                replctl.invoke(ctx)
            finally:
                context = ctx.obj if isinstance(ctx.obj, CliContext) else None
            sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:  # noqa: BLE001 - the last line of defence: nothing may end in a traceback
        if context is not None and context.verbose >= 3:
            traceback.print_exception(error)
        return _report(explain(error), as_json="--json" in given, context=context)
    return 0


def _report(failure: Failure, *, as_json: bool, context: CliContext | None) -> int:
    if failure.text is not None:
        click.echo(f"{PROGRAM}: {failure.text}", err=True)
        if as_json and (context is None or not context.answered):
            click.echo(json.dumps({"error": failure.text, "exit_code": failure.exit_code}))
    return failure.exit_code


def _complete(instruction: str) -> int:
    """Answer the shell's question for completions."""
    from click.shell_completion import shell_complete  # noqa: PLC0415 - only for the shell

    return shell_complete(replctl, {}, PROGRAM, COMPLETE, instruction)


__all__ = ["main", "replctl"]
