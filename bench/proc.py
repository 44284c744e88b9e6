# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the kernel says of a process's memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import trio

_POLL_S = 0.005


@dataclass(slots=True)
class Memory:
    """Bytes. ``peak``: of everything resident, files mapped included, as the kernel keeps it. ``anonymous``: the most that
    was seen of what is no file, looked at every 5 ms; 0 if nobody looked.
    """

    peak: int = 0
    anonymous: int = 0


def read_status(pid: int | str) -> dict[str, int]:
    """The sizes in /proc/PID/status, bytes. Raises OSError, or has none of them, when the process is gone."""
    text = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
    return {
        name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)
    }


async def watch(pid: int, seen: Memory) -> None:
    """Keep ``seen`` up to date until the process is gone or this is cancelled."""
    while True:
        try:
            status = read_status(pid)
        except (FileNotFoundError, ProcessLookupError):
            return
        if "VmHWM" not in status:
            return
        seen.peak = max(seen.peak, status["VmHWM"])
        seen.anonymous = max(seen.anonymous, status["RssAnon"])
        await trio.sleep(_POLL_S)


__all__ = ["Memory", "read_status", "watch"]
