# SPDX-License-Identifier: AGPL-3.0-or-later
"""What samples of grains that change tracking called unchanged say of all of them. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

#: How far back samples count, days.
WINDOW_DAYS = 7
#: How sure the bound is.
CONFIDENCE = 0.95


def missed_percent_max(clean: int) -> float | None:
    """The percentage of what tracking calls unchanged that it can have missed at most, with CONFIDENCE, when ``clean`` grains
    drawn at random from it were all unchanged; None without samples.

    With a share p missed, all n are clean with probability (1 - p)^n; the bound is the p at which that is 1 - CONFIDENCE
    (for large n about 3 / n, the rule of three).
    """
    if clean <= 0:
        return None
    return -100 * math.expm1(math.log(1 - CONFIDENCE) / clean)


def first_day(now_us: int) -> str:
    """The first day (UTC) of the window that ends now, as the usage projection writes it. So no sample is older than
    WINDOW_DAYS.
    """
    now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_us)
    return (now - timedelta(days=WINDOW_DAYS - 1)).strftime("%Y-%m-%d")


def sentence(clean: int, missed: int) -> str | None:
    """What samples of the window say, for people; None without samples.

    Where changes were missed there is no bound: what is known is in the warnings, and the disks are compared.
    """
    bound = missed_percent_max(clean)
    if missed:
        times = {1: "once", 2: "twice"}.get(missed, f"{missed} times")
        return f"change tracking missed changes {times} in the last {WINDOW_DAYS} days ({clean} samples were right)"
    if bound is None:
        return None
    return (
        f"{CONFIDENCE * 100:.0f} % sure that change tracking missed under {_percent(bound)} % of what it called unchanged"
        f" in the last {WINDOW_DAYS} days ({clean} samples, all right)"
    )


def _percent(bound: float) -> str:
    """Rounded up, to two digits: what is said must hold."""
    digits = 0
    while bound * 10**digits < 10 and digits < 12:
        digits += 1
    scaled = -(-(bound * 10**digits) // 1)
    return f"{scaled / 10**digits:.{digits}f}"


__all__ = ["CONFIDENCE", "WINDOW_DAYS", "first_day", "missed_percent_max", "sentence"]
