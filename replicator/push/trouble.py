# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a source writes down of attempts that failed, so that its status does not look well while nothing gets across.

It lies in the journal under ``run/<vm uuid>`` until the next recovery point, and outlives the process.
"""

from __future__ import annotations

from typing import Any

import msgspec

from replicator.log import EventLog

_REASON_MAX = 1000


class Trouble(msgspec.Struct, frozen=True):
    """Attempts in a row that made no recovery point: the first one's time, the last one's time and reason.

    ``back_us``: when the receiver was reached again after the last of them, and the push went on; None where it was not.
    """

    since_us: int
    at_us: int
    reason: str
    failures: int
    back_us: int | None = None


async def load(log: EventLog, vm: str) -> Trouble | None:
    """What failed since the newest recovery point of a VM; None if nothing did."""
    found: Any = await log.journal_get(_key(vm))
    return None if found is None else msgspec.convert(found, Trouble)


async def note(
    log: EventLog, vm: str, error: BaseException, now_us: int, attempts: int = 1
) -> None:
    """So many more attempts failed, the last of them with ``error``; durable on return."""
    before = await load(log, vm)
    trouble = Trouble(
        since_us=before.since_us if before is not None else now_us,
        at_us=now_us,
        reason=(" ".join(str(error).split()) or type(error).__name__)[:_REASON_MAX],
        failures=attempts + (before.failures if before is not None else 0),
    )
    await log.journal_put(_key(vm), msgspec.to_builtins(trouble))


async def went_on(log: EventLog, vm: str, now_us: int) -> None:
    """The receiver is reached again, and the push goes on; durable on return."""
    before = await load(log, vm)
    if before is not None:
        trouble = msgspec.structs.replace(before, back_us=now_us)
        await log.journal_put(_key(vm), msgspec.to_builtins(trouble))


async def clear(log: EventLog, vm: str) -> None:
    """An attempt succeeded."""
    if await log.journal_get(_key(vm)) is not None:
        await log.journal_delete(_key(vm))


def _key(vm: str) -> str:
    return f"run/{vm}"


__all__ = ["Trouble", "clear", "load", "note", "went_on"]
