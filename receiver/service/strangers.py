# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is logged of connections that got no session: each address once a minute, with how many there were."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

import trio

#: An address is told of at most this often, seconds.
EVERY_S: Final = 60.0
#: Addresses that are kept apart; from then on they are counted together.
_ADDRESSES_MAX: Final = 256
_OTHERS: Final = "other addresses"


@dataclass(slots=True)
class _Told:
    at: float
    untold: int = 0


class Strangers:
    """Bounds the lines of the log: whoever connects without a key must not be able to fill a disk with them."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told: dict[str, _Told] = {}

    def say(self, level: int, host: str, reason: str) -> None:
        """Log why a connection from ``host`` got no session, unless that was done less than a minute ago."""
        now = trio.current_time()
        if host not in self._told and len(self._told) >= _ADDRESSES_MAX:
            self._told = {h: t for h, t in self._told.items() if now - t.at < EVERY_S}
            if len(self._told) >= _ADDRESSES_MAX:
                host = _OTHERS
        told = self._told.get(host)
        if told is not None and now - told.at < EVERY_S:
            told.untold += 1
            return
        more = f" (and {told.untold} more in the last minutes)" if told and told.untold else ""
        self._told[host] = _Told(now)
        self._logger.log(level, "%s: %s%s", host, reason, more)


__all__ = ["EVERY_S", "Strangers"]
