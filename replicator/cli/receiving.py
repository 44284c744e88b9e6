# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl verify`, `export` and `failover`: what the receiver does on request, by its control socket."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.control import ControlClient, vm_path
from replicator.cli.copying import check_target, copy_disk
from replicator.cli.progress import Report, progress
from replicator.cli.text import duration, one_line, size
from replicator.errors import DamageError, UsageError, WireError

_logger = logging.getLogger(__name__)

_point = click.option(
    "--point", type=click.IntRange(min=1), help="Recovery point; the newest unless given."
)


@click.command()
@click.argument("vm")
@_point
@click.pass_obj
def verify(context: CliContext, vm: str, point: int | None) -> None:
    """Check a recovery point in full.

    Every byte is read and its root recomputed.
    """
    client = ControlClient(context.receiver_config("verify").control_path)
    with progress() as report:

        def tell(item: dict[str, Any]) -> None:
            at = item.get("progress", {})
            report("verify", int(at.get("done", 0)), int(at.get("total", 0)))

        result = trio.run(_ask, client, vm_path(vm, "verify"), {"point": point}, tell)
    damages, faults = result["damages"], result["map_faults"]
    if context.json:
        context.print_json(result)
    else:
        for damage in damages:
            where = f"{damage['disk']}, {damage['length']} bytes at {damage['offset']}"
            click.echo(
                one_line(
                    f"damaged: point {damage['point']}: {where}: {damage['reason']} ({damage['file']})"
                )
            )
        for fault in faults:
            click.echo(one_line(f"map: {fault}"))
    if not result["good"]:
        count = len(damages) + len(faults)
        findings = "1 finding" if count == 1 else f"{count} findings"
        raise DamageError(f"recovery point {result['point']} of {vm} is damaged ({findings})")
    if not context.json:
        click.echo(
            f"recovery point {result['point']} of {one_line(vm)} is good: {size(result['bytes_read'])} read"
        )


@click.command()
@click.argument("vm")
@_point
@click.option("--disk", required=True, help="Which disk: disk-0, or just 0.")
@click.option(
    "--to", "target", required=True, type=click.Path(path_type=Path), help="The raw image to make."
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.pass_obj
def export(
    context: CliContext, *, vm: str, point: int | None, disk: str, target: Path, force: bool
) -> None:
    """Write a disk of a recovery point to a raw image.

    The image is sparse, and there only when it is whole and durable.
    """
    client = ControlClient(context.receiver_config("export").control_path)
    name = disk_name(disk)
    target = target.absolute()
    check_target(target, force=force)
    with progress() as report:
        work = partial(_export, force=force, report=report)
        result = trio.run(work, client, vm, {"point": point, "disk": name}, target)
    if context.json:
        context.print_json(result)
        return
    click.echo(
        f"{one_line(vm)} {name} at recovery point {result['point']}: {result['size']} bytes"
        f" ({size(result['bytes_read'])} of data) in {target}, root {result['root']}"
    )


@click.group(no_args_is_help=False)
def failover() -> None:
    """Boot a VM from its recovery points."""


@failover.command("test")
@click.argument("vm")
@_point
@click.pass_obj
def failover_test(context: CliContext, vm: str, point: int | None) -> None:
    """Boot a clone of a recovery point on an isolated network; source and receiver stay as they are."""
    client = ControlClient(context.receiver_config("failover test").control_path)
    result = trio.run(_ask, client, vm_path(vm, "failover", "test"), {"point": point}, _tell_step)
    if context.json:
        context.print_json(result)
        return
    for disk in result["disks"]:
        click.echo(
            one_line(
                f"{disk['disk']}: {size(disk['size'])}, NBD at {disk['nbd']}, writes in {disk['overlay']}"
            )
        )
    click.echo(
        one_line(
            f"clone {result['clone']} of {result['vm']} at recovery point {result['point']}: {_boot(result)}"
        )
    )


@failover.command()
@click.argument("vm")
@click.pass_obj
def undo(context: CliContext, vm: str) -> None:
    """Remove the test clone of a VM and release its space."""
    client = ControlClient(context.receiver_config("failover undo").control_path)
    result = trio.run(_ask, client, vm_path(vm, "failover", "undo"), {}, _tell_step)
    if context.json:
        context.print_json(result)
    else:
        click.echo(one_line(f"clone {result['clone']} of {result['vm']} is removed"))


def disk_name(text: str) -> str:
    """``0`` and ``disk-0`` alike to ``disk-0``. Raises UsageError."""
    match = re.fullmatch(r"(?:disk-)?([0-9]{1,4})", text)
    if match is None:
        raise UsageError(f"--disk {text}: expected disk-<N> or a number")
    return f"disk-{int(match[1])}"


def _boot(result: dict[str, Any]) -> str:
    if not result["booted"]:
        how = "running, but" if result.get("running") else "not booted:"
        return f"{how} {result['reason'] or 'no reason given'}"
    if result["console"] is None:
        return "booted"
    return f"booted, first console line after {duration(result['console_s'])}: {result['console']}"


def _tell_step(item: dict[str, Any]) -> None:
    if "step" in item:
        _logger.info("%s", item["step"])


async def _ask(
    client: ControlClient, target: str, body: dict[str, Any], tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The result of a request that takes a while; ``tell`` gets every line before it."""
    async with client.stream(target, body) as items:
        async for item in items:
            if isinstance(result := item.get("result"), dict):
                return result
            tell(item)
    raise WireError("the receiver's answer ended without a result")


async def _export(
    client: ControlClient,
    vm: str,
    body: dict[str, Any],
    target: Path,
    *,
    force: bool,
    report: Report,
) -> dict[str, Any]:
    async with client.stream(vm_path(vm, "export"), body) as items:
        async for item in items:
            if isinstance(export := item.get("export"), dict):
                break
        else:
            raise WireError("the receiver's answer ended without an export")
        total = int(export["size"])
        name = str(export["name"])
        # The export is there for as long as this request is: the copy runs inside it.
        read = await copy_disk(
            Path(export["socket"]),
            name,
            total,
            target,
            force=force,
            report=lambda done: report(name, done, total),
        )
    return {
        "vm": vm,
        "point": export["point"],
        "disk": body["disk"],
        "file": str(target),
        "size": total,
        "bytes_read": read,
        "root": export["root"],
    }


__all__ = ["disk_name", "export", "failover", "verify"]
