# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl projections`: what is kept beside the log, how far it is, and making it anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from eventsourcing.persistence import ProgrammingError

from eventstore.projections import (
    ProjectionState,
    RebuildUnderWayError,
    UnknownProjectionError,
    list_projections,
    request_rebuild,
    resume,
)
from replicator.cli.context import CliContext
from replicator.cli.logbook import open_store
from replicator.cli.text import one_line
from replicator.errors import RefusedError, UsageError
from replicator.log.archive import SegmentAwayError
from replicator.log.store import LogStore


@click.group(no_args_is_help=False)
def projections() -> None:
    """What is kept beside the event log, and can be made anew from it."""


@projections.command("list")
@click.pass_obj
def show(context: CliContext) -> None:
    """Show every projection, how far behind the log it is, and what has stopped one."""
    with open_store(context.config(), readonly=True) as store:
        states = sorted(list_projections(store.recorder), key=lambda state: state.name)
        found = [_shown(state) for state in states]
    if context.json:
        context.print_json(found)
        return
    from replicator.cli.render import show_projections  # noqa: PLC0415 - only for a person

    show_projections(found)


@projections.command()
@click.argument("name")
@click.pass_obj
def rebuild(context: CliContext, name: str) -> None:
    """Make a projection anew from the whole log, beside the one that is shown until then."""
    with open_store(context.config(), readonly=True) as store:
        _check_whole(store)
    _ask(context, name, request_rebuild)
    if context.json:
        context.print_json({"name": name, "requested": True})
    else:
        click.echo(
            f"{one_line(name)} is made anew by the process that runs here, or by the next that starts"
        )


@projections.command("resume")
@click.argument("name")
@click.pass_obj
def try_again(context: CliContext, name: str) -> None:
    """Let a parked projection try its event again, after the reason has gone."""
    _ask(context, name, resume)
    if context.json:
        context.print_json({"name": name, "resumed": True})
    else:
        click.echo(f"{one_line(name)} tries again")


def _ask(context: CliContext, name: str, request: Any) -> None:
    with open_store(context.config(), readonly=False) as store:
        try:
            request(store.environment, name)
        except (UnknownProjectionError, RebuildUnderWayError) as error:
            raise RefusedError(str(error)) from error
        except ProgrammingError as error:  # no name of a projection
            raise UsageError(str(error)) from error


def _check_whole(store: LogStore) -> None:
    """Raises RefusedError while a segment is away: what it says would be gone from the new rows."""
    for period in store.archive.sealed():
        try:
            with store.archive.open(period):
                pass
        except SegmentAwayError as error:
            raise RefusedError(str(error)) from error


def _shown(state: ProjectionState) -> dict[str, Any]:
    fields = dataclasses.asdict(state)
    fields.pop("rebuild_position")
    return fields | {"lag": state.lag, "rebuilt": state.rebuild_progress}


__all__ = ["projections"]
