# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl receiver`: found by the command line through the entry point group `replctl.commands`."""

from __future__ import annotations

import click
import trio

from receiver.daemon import run_receiver
from replicator.cli.context import CliContext
from replicator.control.listening import check_listen
from replicator.credentials import ReceiverCredentials
from replicator.errors import UsageError
from replicator.state_dir import open_state_dir


@click.command()
@click.pass_obj
def receiver(context: CliContext) -> None:
    """Take pushes, keep recovery points and answer `replctl` on this host, until stopped."""
    config = context.config()
    if config.is_source:
        raise UsageError("dr_host: a receiver's configuration names no receiver; remove the key")
    ReceiverCredentials(config)  # what cannot be read is said before anything is touched
    key = "dr_listen" if config.dr_listen else "dr_port"
    # A receiver that has this state directory may be the one that listens; its lock says so better.
    check_listen(config.dr_listen, config.dr_port, key, busy_is_fine=config.state_dir.exists())
    context.check_metrics()
    context.warn_of_idle_keys()
    with open_state_dir(config.state_dir):
        trio.run(run_receiver, config)
