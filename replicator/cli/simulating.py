# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl simulate`: a Prism Central with its clusters, running until it is told to stop."""

from __future__ import annotations

import json
import logging
import shlex
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.logs import configure
from replicator.cli.text import one_line
from replicator.errors import UsageError
from replicator.nursery import flat_nursery

if TYPE_CHECKING:
    from replicator.simulator.faults import Fault
    from replicator.simulator.running import Simulator
    from replicator.simulator.scenario import Scenario

_logger = logging.getLogger(__name__)
_PASSWORDS_MAX = 64 << 10


@click.command()
@click.option(
    "--dir",
    "directory",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where its state is kept; a directory that holds one goes on with it.",
)
@click.option("--base", help="Network of its addresses, 127.x.y.0; unless given, a free one.")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=9440, show_default=True, help="Of all hosts."
)
@click.option(
    "--iscsi-port",
    type=click.IntRange(1, 65535),
    default=3260,
    show_default=True,
    help="Of all portals.",
)
@click.option(
    "--vms",
    type=click.IntRange(0, 5000),
    default=0,
    help="So many small VMs more, for tests of scale.",
)
@click.option(
    "--scenario",
    "scenario_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What it begins with, in JSON (docs/simulator.md).",
)
@click.option(
    "--passwords",
    "passwords_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A private file of lines: account, space, password. Those left out are made up.",
)
@click.option(
    "--fault",
    "fault_texts",
    multiple=True,
    metavar="TEXT",
    help="What goes wrong, such as 'rate-limit where=POST count=3 value=2' (docs/simulator.md).",
)
@click.pass_obj
def simulate(
    context: CliContext,
    *,
    directory: Path,
    base: str | None,
    port: int,
    iscsi_port: int,
    vms: int,
    scenario_path: Path | None,
    passwords_path: Path | None,
    fault_texts: tuple[str, ...],
) -> None:
    """Run a simulated Nutanix: Prism Central, two clusters, iSCSI.

    Says where it listens, then runs until SIGTERM or SIGINT. Nothing of it can be reached from other hosts.
    """
    configure(0)
    scenario = _scenario(scenario_path, vms)
    scenario.faults += [parse_fault_text(text) for text in fault_texts]
    passwords = _passwords(passwords_path) if passwords_path is not None else {}
    options = {"base": base, "port": port, "iscsi_port": iscsi_port, "passwords": passwords}
    trio.run(_run, context, directory, scenario, options)


async def _run(
    context: CliContext, directory: Path, scenario: Scenario, options: dict[str, Any]
) -> None:
    from replicator.simulator.running import running_simulator  # noqa: PLC0415 - see _scenario

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with flat_nursery() as nursery:
            nursery.start_soon(_stop, signals, nursery.cancel_scope)
            async with running_simulator(directory, scenario, **options) as simulator:
                _say(context, simulator)
                await trio.sleep_forever()


async def _stop(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        _logger.info("stopping on %s", signal.Signals(number).name)
        scope.cancel()


def _scenario(path: Path | None, vms: int) -> Scenario:
    # Loads what only this command needs: `replctl --version` and completion stay fast.
    from replicator.simulator.scenario import Scenario, many_vms, read_scenario  # noqa: PLC0415

    scenario = read_scenario(path) if path is not None else Scenario()
    scenario.vms += many_vms(vms, [cluster.name for cluster in scenario.clusters])
    return scenario


def parse_fault_text(text: str) -> Fault:
    """A fault of the command line: its kind, then NAME=VALUE of where, count (or forever), every, value. Raises UsageError."""
    from replicator.simulator.controls import parse_fault  # noqa: PLC0415 - see _scenario
    from replicator.simulator.web import HttpError  # noqa: PLC0415 - the same

    try:
        kind, *rest = shlex.split(text)
        given: dict[str, Any] = {"kind": kind}
        for each in rest:
            name, equals, value = each.partition("=")
            if not equals:
                raise ValueError(f"{each!r} is not NAME=VALUE")
            if name == "where":
                given[name] = value
            elif name == "value":
                given[name] = float(value)
            else:
                given[name] = None if value == "forever" else int(value)
        return parse_fault(given)
    except (ValueError, HttpError) as error:
        raise UsageError(f"--fault {text!r}: {error}") from None


def _passwords(path: Path) -> dict[str, str]:
    from replicator.private_files import read_file  # noqa: PLC0415 - see _scenario

    data = read_file(path, _PASSWORDS_MAX, private=True)
    passwords: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        name, _, password = line.strip().partition(" ")
        if not password:
            raise UsageError(f"{path}: line {number} is not: account, space, password")
        passwords[name] = password
    return passwords


def _say(context: CliContext, simulator: Simulator) -> None:
    """Where it listens, in full, and a configuration that works with it."""
    credentials = simulator.directory / "credentials"
    clusters = list(simulator.world.clusters.values())
    if context.json:
        facts = {
            "address": simulator.address,
            "port": simulator.port,
            "ca": str(simulator.ca_path),
            "credentials": str(credentials),
            "clusters": [
                {
                    "name": each.name,
                    "uuid": each.uuid,
                    "element": each.address,
                    "data_services": each.data_services,
                }
                for each in clusters
            ],
            "vms": len(simulator.world.vms),
        }
        click.echo(json.dumps(facts))
        return
    click.echo(f"Prism Central  https://{simulator.address}:{simulator.port}")
    for each in clusters:
        services = each.data_services or "none"
        click.echo(
            one_line(
                f"{each.name}  Element {each.address}:{simulator.port}  data services {services}"
            )
        )
    click.echo(f"authority      {simulator.ca_path}")
    click.echo(f"accounts       {credentials}")
    click.echo(f"VMs            {len(simulator.world.vms)}")
    click.echo("\nA configuration for a source (add the keys of the receiver):\n")
    lines = {
        "source": "nutanix",
        "prism_central": simulator.address,
        "prism_port": simulator.port,
        "user": "backup",
        "passfile": simulator.directory.absolute() / "passfiles" / "backup",
        "prism_ca_cert": simulator.ca_path.absolute(),
        "vm": "app01",
    }
    for key, value in lines.items():
        click.echo(f"  {key} = {value}")
    click.echo("\nReady; ends on SIGTERM or SIGINT.")


__all__ = ["parse_fault_text", "simulate"]
