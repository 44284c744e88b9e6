# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl completion`: the script that teaches a shell to complete its words."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "fish", "zsh")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL.

    bash: put  eval "$(replctl completion bash)"  into ~/.bashrc
    """
    root = ctx.find_root()
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(root.command, {}, "replctl", "_REPLCTL_COMPLETE").source())
