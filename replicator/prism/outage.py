# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the log is told while one host does not answer, or says that it is asked too much: not nothing, and not every try."""

from __future__ import annotations

import logging
from typing import Final

from replicator.prism.errors import PrismError
from replicator.prism.retry import Passing

_logger = logging.getLogger(__name__)

#: Between two lines about the same trouble, seconds.
TELL_S: Final = 60.0


class Outage:
    """The trouble with one host, on a clock of seconds. ``where`` names the host, as errors about it begin."""

    def __init__(self, where: str) -> None:
        self._where = where
        #: When each trouble that lasts was last told.
        self._told: dict[Passing, float] = {}
        self._busy_told: float | None = None

    def trying_again(self, kind: Passing, error: PrismError, wait_s: float, now: float) -> None:
        """A try failed so, and another comes in ``wait_s``: a warning at first and once a minute, debug otherwise."""
        told = self._told.get(kind)
        if kind is Passing.BUSY and told is None:
            # Under the cap some are served and some not: each change is no news of its own.
            told = self._busy_told
        if kind not in {Passing.AWAY, Passing.BUSY} or (told is not None and now < told + TELL_S):
            _logger.debug("%s; again in %.1f s", error, wait_s)
            return
        self._told[kind] = now
        reason = str(error).removeprefix(f"{self._where}: ")
        if kind is Passing.BUSY:
            self._busy_told = now
            _logger.warning("%s takes no more requests now: trying again (%s)", self._where, reason)
        else:
            _logger.warning("cannot reach %s: trying again (%s)", self._where, reason)

    def answered(self) -> None:
        """It gave an answer that is its own: the end of what was told, if anything was."""
        if Passing.AWAY in self._told:
            _logger.info("%s answers again", self._where)
        elif self._told:
            _logger.info("%s takes requests again", self._where)
        self._told.clear()
