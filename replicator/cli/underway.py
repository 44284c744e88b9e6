# SPDX-License-Identifier: AGPL-3.0-or-later
"""How far the push is that is under way, in words, and as lines in the log of `run`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from replicator.cli.text import one_line, size
from replicator.push.progress import UnderWay

_logger = logging.getLogger(__name__)

#: Between two lines about a push there are at least so many seconds, and at least this part of it.
TELL_S = 60.0
TELL_RATIO = 0.1


def how_far(push: dict[str, Any]) -> str:
    """A PushProgress of docs/json.md in words, without the point and the time of its beginning."""
    if push["received"] is not None:
        return f"{size(push['received'])} received"
    done, total = push["done"], push["total"]
    percent = done * 100 // total if total else 100
    told = f"{percent} % of {size(total)} looked at, {size(push['sent'])} sent"
    eta_s = push["eta_s"]
    return told if eta_s is None else f"{told}, about {_about(eta_s)} left"


def sentence(push: dict[str, Any]) -> str:
    """A PushProgress of docs/json.md for status."""
    doing = "pushing" if push["received"] is None else "receiving"
    kind = one_line(str(push["kind"]))
    return f"{doing} point {push['point']} ({kind}): {how_far(push)}, since {push['since']}"


async def watch(under_way: Callable[[], UnderWay | None]) -> None:
    """Log how far a push is, now and then; until cancelled. One that takes less than TELL_S is not spoken of."""
    told: tuple[int, float] | None = None
    while True:
        await trio.sleep(TELL_S)
        if (push := under_way()) is None:
            told = None
            continue
        if told is None or told[0] != push.point:
            told = (push.point, 0.0)
        if abs(push.ratio - told[1]) < TELL_RATIO:
            continue
        told = (push.point, push.ratio)
        _logger.info("%s to point %d: %s", push.kind, push.point, how_far(push.info()))


def _about(seconds: float) -> str:
    """A length of time that is reckoned: in one unit, of which there are at least two."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{round(seconds / length)} {unit}"
    return f"{max(1, round(seconds))} s"


__all__ = ["TELL_RATIO", "TELL_S", "how_far", "sentence", "watch"]
