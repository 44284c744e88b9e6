# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl backups`: what Bacula's jobs on this host have of each VM, and what the next one goes on from."""

from __future__ import annotations

import time
from typing import Any

import click

from replicator.cli.context import CliContext
from replicator.domain.backup import LEVELS, BackupPart
from replicator.domain.views import instant
from replicator.errors import RefusedError
from replicator.log.chains import Chain, read_chains


@click.command()
@click.argument("vm", required=False)
@click.pass_obj
def backups(context: CliContext, vm: str | None) -> None:
    """Show what Bacula has of each VM.

    One row for each VM and Bacula job that backs it up from this host. VM is a name or UUID; without it, all of them.
    """
    config = context.config()
    chains = read_chains(config.state_dir)
    if vm is not None:
        found = [chain for chain in chains if vm in (chain.name, chain.vm.vm)]
        if not found:
            have = ", ".join(dict.fromkeys(chain.name for chain in chains)) or "none"
            raise RefusedError(f"no Bacula job has backed up VM {vm!r} from here (known: {have})")
        chains = found
    now_us = time.time_ns() // 1000
    rows = [backup_info(chain, now_us) for chain in chains]
    if context.json:
        context.print_json(rows)
        return
    from replicator.cli.render import show_backups  # noqa: PLC0415 - only for a person

    show_backups(rows)


def backup_info(chain: Chain, now_us: int) -> dict[str, Any]:
    """BackupInfo of docs/json.md at ``now_us``, microseconds since the epoch."""
    known = chain.backups
    failure = known.failure
    return {
        "vm": chain.name,
        "uuid": chain.vm.vm,
        "job": chain.job,
        "last": None if known.last is None else _part(known.last, now_us),
        "full": None if known.full is None else _part(known.full, now_us),
        "parts": len(known.line),
        "reference": None if known.last is None else known.last.push_id,
        "snapshot": chain.snapshot,
        "expires": instant(chain.expires_at_us) if chain.expires_at_us else None,
        "failed": known.failed,
        "failure": None
        if failure is None
        else {
            "job": failure.job,
            "job_id": failure.job_id,
            "level": LEVELS.get(failure.level, failure.level),
            "at": instant(failure.at_us),
            "reason": failure.reason,
        },
    }


def _part(part: BackupPart, now_us: int) -> dict[str, Any]:
    """BackupPart of docs/json.md."""
    return {
        "job": part.job,
        "job_id": part.job_id,
        "level": LEVELS.get(part.level, part.level),
        "kind": part.kind,
        "part": part.number,
        "id": part.part,
        "parent": part.parent or None,
        "point": part.point or None,
        "bytes": part.bytes_stored,
        "disks": len(part.disks),
        "taken_at": instant(part.taken_at_us),
        "committed_at": instant(part.committed_at_us),
        "duration_s": part.duration_us / 1_000_000,
        "age_s": max(0, now_us - part.taken_at_us) / 1_000_000,
        "root": part.root.hex(),
    }


__all__ = ["backup_info", "backups"]
