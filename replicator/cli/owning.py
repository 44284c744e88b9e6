# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl owned`: everything of this product on the Nutanix clusters, why it is there, and its removal where it is not needed."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import trio

from replicator.cli.context import CliContext
from replicator.cli.text import one_line
from replicator.config import Config
from replicator.domain.views import instant
from replicator.errors import ReplicatorError, StateError, UsageError
from replicator.log import EventLog, open_log
from replicator.prism.api import Prism
from replicator.prism.discovery import open_prism
from replicator.prism.settings import PrismSettings
from replicator.prism.types import Kind
from replicator.prism_access import prism_settings
from replicator.push import journal
from replicator.sources.nutanix import names
from replicator.sources.nutanix.ledger import INSTALLATION, OBJECTS, Entry, Ledger, read_entries
from replicator.sources.nutanix.site import now_us
from replicator.sources.nutanix.sweep import Owned, Why, gone_vms, judge, sweep_clusters
from replicator.state_dir import open_state_dir

_logger = logging.getLogger(__name__)

#: Below the state directory: what Bacula's jobs keep.
_JOBS = "bacula"
_WORDS: Mapping[Kind, str] = {
    Kind.SNAPSHOT: "snapshot",
    Kind.VOLUME_GROUP: "volume group",
    Kind.IMAGE: "image",
    Kind.VM: "VM",
}


@click.command()
@click.option("--all", "others", is_flag=True, help="Other installations' objects as well.")
@click.option("--remove", is_flag=True, help="Remove what no point and no push needs.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.pass_obj
def owned(context: CliContext, others: bool, remove: bool, yes: bool) -> None:
    """Show what is ours on the Nutanix clusters, and why.

    Snapshots, volume groups, images and VMs that bear this installation's name. Other installations' are never removed.
    """
    config = context.config()
    if config.source != "nutanix":
        raise UsageError(
            f"owned: source = {config.source} makes nothing on a cluster (source = nutanix does)"
        )
    settings = prism_settings(config)
    if not remove:
        if yes:
            raise UsageError("--yes: belongs to --remove")
        found = trio.run(_list, config, settings, others)
        _show(context, found)
        return
    if not yes and (context.json or not sys.stdin.isatty()):
        raise UsageError("--remove: nobody can be asked here; add --yes")
    with open_state_dir(config.state_dir):
        found, removed = trio.run(_remove, config, settings, others, yes)
    if context.json:
        context.print_json([_info(each) | {"removed": each.name in removed} for each in found])
        return
    for name in removed:
        click.echo(f"removed {name}")
    if not removed:
        click.echo("nothing to remove")


def _show(context: CliContext, found: list[Owned]) -> None:
    if context.json:
        context.print_json([_info(each) for each in found])
        return
    from replicator.cli.render import show_owned  # noqa: PLC0415 - only for a person

    show_owned([_info(each) for each in found])


def _info(each: Owned) -> dict[str, Any]:
    """Owned of docs/json.md."""
    return {
        "kind": _WORDS[each.kind],
        "name": each.name,
        "id": each.uuid,
        "cluster": each.cluster,
        "vm": each.vm,
        "made": instant(each.made_at_us),
        "age_s": max(0, now_us() - each.made_at_us) // 1_000_000,
        "why": str(each.why),
    }


async def _list(config: Config, settings: PrismSettings, others: bool) -> list[Owned]:
    has_log = await trio.Path(config.state_dir / "events").is_dir()
    jobs = await trio.to_thread.run_sync(_job_logs, config.state_dir)
    if not has_log and not jobs:
        _logger.warning(
            "no log in %s yet: nothing of the clusters is this installation's", config.state_dir
        )
        if not others:
            return []
    async with open_prism(settings) as prism:
        if has_log:
            async with open_log(config.state_dir / "events", readonly=True) as log:
                found = (await _look(log, prism, others or bool(jobs)))[0]
        else:
            found = await _others(prism)
        of_jobs = [each for log_of in jobs for each in await _of_job(log_of, found)]
    named = {each.name for each in of_jobs}
    return [
        each for each in found if each.name not in named and (others or each.why is not Why.OTHERS)
    ] + of_jobs


def _job_logs(state_dir: Path) -> list[Path]:
    """The logs of Bacula jobs on this host: each has an installation's id of its own."""
    return sorted(path for path in (state_dir / _JOBS).rglob("events") if path.is_dir())


async def _of_job(folder: Path, found: Iterable[Owned]) -> list[Owned]:
    """What among ``found`` is of one Bacula job's chain, or of its restores. Only the job itself removes any of it."""
    try:
        async with open_log(folder, readonly=True) as log:
            installation = await log.journal_get(INSTALLATION)
            entries = read_entries(await log.journal_items(OBJECTS))
    except StateError as error:
        _logger.warning("%s", error)
        return []
    if not names.is_installation(installation):
        return []
    known = {(entry.kind, entry.name): entry for entry in entries}
    ours = []
    for each in found:
        if not each.name.startswith(names.prefix(installation)):
            continue
        entry = known.get((each.kind, each.name))
        told = dataclasses.replace(each, why=_why(each, entry), entry=entry)
        if entry is not None:
            told = dataclasses.replace(told, vm=entry.vm, cluster=each.cluster or entry.cluster)
        ours.append(told)
    return ours


def _why(each: Owned, entry: Entry | None) -> Why:
    if each.kind is Kind.VM:
        return Why.VM
    if entry is None or entry.dropped:
        return Why.LEFT
    return Why.REFERENCE if entry.reference else Why.JOB


async def _look(log: EventLog, prism: Prism, others: bool) -> tuple[list[Owned], set[str]]:
    """What there is, and which VMs with a reference are gone."""
    installation = await log.journal_get(INSTALLATION)
    if not names.is_installation(installation):
        return await _others(prism) if others else [], set()
    # The clusters first: what is found there was written down before.
    found = await prism.find(names.COMMON if others else names.prefix(installation))
    entries = read_entries(await log.journal_items(OBJECTS))
    gone = await gone_vms(prism, entries)
    live = await _live(log, gone)
    judged = judge(found, entries, installation, live, now_us(), spoken=prism.capability, gone=gone)
    return judged, gone


async def _others(prism: Prism) -> list[Owned]:
    return judge(await prism.find(names.COMMON), [], "", {}, now_us(), spoken=prism.capability)


async def _remove(
    config: Config, settings: PrismSettings, others: bool, yes: bool
) -> tuple[list[Owned], list[str]]:
    async with (
        open_prism(settings) as prism,
        open_log(config.state_dir / "events") as log,
    ):
        found, gone = await _look(log, prism, others)
        ours = [each for each in found if each.is_removed]
        if ours and not yes:
            for each in ours:
                click.echo(f"{_WORDS[each.kind]} {one_line(each.name)} ({each.why})")
            answer = await trio.to_thread.run_sync(
                lambda: click.confirm(f"Remove these {len(ours)} from the clusters?")
            )
            if not answer:
                raise ReplicatorError("nothing was removed")
        ledger = await Ledger.open(log)
        live = await _live(log, gone)
        return found, await sweep_clusters(prism, ledger, live, now_us(), gone)


async def _live(log: EventLog, gone: Collection[str]) -> dict[str, set[str]]:
    """By VM: the pushes whose objects are wanted.

    Of one in ``gone`` no reference is: nothing will be compared with it. A push under way stays: what it holds may be nowhere
    else.
    """
    live: dict[str, set[str]] = {}
    for vm in log.vms:
        wanted = live.setdefault(vm.vm, set())
        if vm.newest is not None and vm.vm not in gone:
            wanted.add(vm.newest.push_id)
        entry = await journal.load(log, vm.vm)
        if entry is not None:
            wanted.add(entry.push_id)
            if entry.reference is not None and vm.vm not in gone:
                wanted.add(entry.reference)
    return live


__all__ = ["owned"]
