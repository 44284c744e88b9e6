# SPDX-License-Identifier: AGPL-3.0-or-later
"""Giving memory back: a process that waits for the next push needs less than it needed for the last one."""

from __future__ import annotations

import ctypes
import gc
from typing import Final

import trio

#: Seconds between two looks; each takes some milliseconds.
EVERY_S: Final = 10.0


async def give_back() -> None:
    """Now and then, until cancelled: collect garbage, and hand freed memory to the system where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while True:
        gc.collect()
        if trim is not None:
            trim(0)
        await trio.sleep(EVERY_S)


__all__ = ["EVERY_S", "give_back"]
