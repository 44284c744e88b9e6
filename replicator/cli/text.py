# SPDX-License-Identifier: AGPL-3.0-or-later
"""Words and figures for people. Pure."""

from __future__ import annotations

_STEPS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def one_line(text: str) -> str:
    """The text in one line that a terminal can show: names may come from a peer, and must not steer the terminal."""
    joined = " ".join(text.split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in joined)


def size(count: int) -> str:
    """Bytes in the largest unit that leaves at least one."""
    value, step = float(count), 0
    while value >= 1024 and step < len(_STEPS) - 1:
        value /= 1024
        step += 1
    return f"{count} B" if step == 0 else f"{value:.1f} {_STEPS[step]}"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds % 60)} s"


__all__ = ["duration", "one_line", "size"]
