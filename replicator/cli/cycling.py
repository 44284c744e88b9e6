# SPDX-License-Identifier: AGPL-3.0-or-later
"""The loop of `replctl run`: a push, then the next at its time, whatever became of the last."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import trio
from eventsourcing.persistence import PersistenceError

from replicator.cli.failures import explain
from replicator.cli.logs import WORKING_FOR
from replicator.cli.text import one_line
from replicator.domain.model import PushKind
from replicator.errors import FencedError, PeerRefusedError, ReplicatorError
from replicator.push.plan import Want
from replicator.push.pusher import Outcome
from replicator.push.schedule import Pace, next_start

_logger = logging.getLogger(__name__)


async def cycles(push_one: Callable[[Want], Awaitable[Outcome | None]], interval_s: float) -> None:
    """Push for ever, each cycle planned from the start of the last; one that took longer than that is followed at once.

    A cycle that fails is logged, and the next one tried at its time. Raises RefusedError when the source is fenced:
    then nothing of it may reach the receiver any more, and going on would only hide that.
    """
    pace = Pace(interval_s)
    while True:
        started = trio.current_time()
        try:
            outcome = await push_one(Want.RUN)
        except (ReplicatorError, PersistenceError, OSError) as error:
            if is_fenced(error):
                raise
            _logger.error("%sthis cycle failed: %s", whose(), explain(error).text)
        else:
            # A seed takes what it takes: it is not what push_interval is about.
            if outcome is None or outcome.point.kind is PushKind.CYCLE:
                ended = trio.current_time()
                if (told := pace.finished(ended - started, ended)) is not None:
                    _logger.log(logging.WARNING if told.behind else logging.INFO, "%s", told.text)
        due = next_start(started, trio.current_time(), interval_s, random.random())
        await trio.sleep_until(due)


def whose() -> str:
    """The VM that this task works for, to begin a line with: an error may name it without saying that it is the one."""
    vm = WORKING_FOR.get()
    return f"{one_line(vm)}: " if vm else ""


def is_fenced(error: Exception) -> bool:
    """Whether a push was refused because the VM failed over: no later cycle can succeed."""
    if isinstance(error, PeerRefusedError):
        return error.code == "stale-epoch"
    return isinstance(error, FencedError)


__all__ = ["cycles", "is_fenced", "whose"]
