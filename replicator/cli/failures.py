# SPDX-License-Identifier: AGPL-3.0-or-later
"""From any error to one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import click

from replicator.cli.text import one_line
from replicator.errors import ReplicatorError

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Failure:
    """What the operator is told. ``text`` is None for an interrupt, which was the operator's own."""

    text: str | None
    exit_code: int


def explain(error: BaseException) -> Failure:
    """The failure that an error is; of a group the one that says most about the cause."""
    cause = min(_leaves(error), key=_rank)
    match cause:
        case KeyboardInterrupt() | click.Abort():
            return Failure(None, INTERRUPTED)
        case ReplicatorError():
            return Failure(one_line(str(cause)), cause.exit_code)
        case click.UsageError():
            where = cause.ctx.command_path if cause.ctx is not None else "replctl"
            return Failure(
                one_line(f"{cause.format_message()} (see {where} --help)"), cause.exit_code
            )
        case click.ClickException():
            return Failure(one_line(cause.format_message()), cause.exit_code)
        case OSError():
            text = cause.strerror or str(cause) or type(cause).__name__
            return Failure(one_line(f"{cause.filename}: {text}" if cause.filename else text), 1)
    if _is_persistence(cause):
        return Failure(one_line(str(cause)), getattr(cause, "exit_code", 1))
    text = f"internal error: {type(cause).__name__}: {cause} (verbose = 3 shows where)"
    return Failure(one_line(text), 1)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _rank(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 0
    if isinstance(error, ReplicatorError | click.ClickException):
        return 1
    return 2 if isinstance(error, OSError) or _is_persistence(error) else 3


def _is_persistence(error: BaseException) -> bool:
    """The event store speaks in its library's errors; asked by name, so that saying so loads nothing."""
    return any(
        kind.__name__ == "PersistenceError" and kind.__module__ == "eventsourcing.persistence"
        for kind in type(error).__mro__
    )


__all__ = ["INTERRUPTED", "Failure", "explain"]
