# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which zstd level a push uses: a fixed one, none, or the one at which the line and the processors together carry most.

``auto`` watches two things: how fast the line takes bytes while it is what the push waits for, and how fast and how well
each level packs this data on these processors (it packs a chunk at another level now and then to know). Of each level it
expects ``min(processors' speed, line's rate / what is left of the data)`` and takes the best. No clock of its own, no
input or output: whoever sends tells it what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: Levels that ``auto`` chooses from, the cheapest first. None: not compressed.
LADDER: Final[tuple[int | None, ...]] = (None, -5, 1, 3)
_TRIED_FIRST: Final = (1, -5, 3)
#: What is watched before a decision, seconds.
WINDOW_S: Final = 0.25
#: The line is what the push waits for if it waits for so much of the time.
_WAITING: Final = 0.4
#: Another level must promise so much more to be worth a change.
_WORTH: Final = 1.1
#: A level that carries less than so much of what the one before it did, though it promised more, is given up again.
_GAIN: Final = 1.03
#: A line that takes so many bytes a second for each processor is faster than any of them packs: nothing is tried there.
_FAST: Final = 500e6
#: One chunk in so many is packed at another level than the present one, to know it.
_PROBE_EVERY: Final = 48
#: Windows for which a level that did not keep its promise is left alone.
_LOCKED: Final = 120
#: Windows without waiting for the line after which it is tried without packing.
_IDLE: Final = 40
#: Windows after a change before it is judged.
_SETTLE: Final = 3
_WEIGHT: Final = 0.2


@dataclass(slots=True)
class _Known:
    """What is known of a level: plain bytes a second of one processor, and what is left of a byte."""

    speed: float
    left: float
    measured: bool = False
    asked: bool = False

    def learn(self, speed: float, left: float) -> None:
        weight = _WEIGHT if self.measured else 1.0
        self.speed += weight * (speed - self.speed)
        self.left += weight * (left - self.left)
        self.measured = True


class Compression:
    """The level of the next chunk. ``clock`` gives seconds; ``workers`` is how many processors are there for packing."""

    def __init__(
        self,
        wanted: int | None,
        *,
        auto: bool,
        workers: int,
        clock: Callable[[], float],
        line: float | None = None,
    ) -> None:
        self._auto = auto
        self._level = None if auto else wanted
        self._workers = workers
        self._clock = clock
        self._known = {level: _Known(0.0, 1.0) for level in LADDER if level is not None}
        self._chunks = 0
        self._probe = 0
        self._line = line
        self._begin_window()
        self._before: tuple[int | None, float] | None = None  # level and plain rate before a change
        self._rate: float | None = None  # plain bytes a second in the last window
        self._since_change = 0
        self._idle = 0  # windows in a row in which nobody waited for the line
        self._locked: dict[int | None, int] = {}

    @classmethod
    def of(
        cls,
        setting: str,
        *,
        workers: int,
        clock: Callable[[], float],
        line: float | None = None,
    ) -> Compression:
        """From ``dr_compression``: auto, off, or a level; checked by the configuration. ``line``: what it can take at most,
        where that is known beforehand.
        """
        if setting in ("auto", "off"):
            return cls(None, auto=setting == "auto", workers=workers, clock=clock, line=line)
        return cls(int(setting), auto=False, workers=workers, clock=clock)

    @property
    def level(self) -> int | None:
        """The present level; None is none."""
        return self._level

    @property
    def line_rate(self) -> float | None:
        """Bytes a second that the line was seen to take when it was what the push waited for; None if it never was."""
        return self._line

    def next_level(self) -> int | None:
        """For one chunk. Now and then another level than the present one, to know it."""
        if not self._auto:
            return self._level
        self._chunks += 1
        # Nothing is tried until the line turns out to be slow: then packing may pay, and each level is tried at once.
        if self._line is None or self._is_fast(self._line):
            return self._level
        for level in _TRIED_FIRST:
            if not self._known[level].asked:
                self._known[level].asked = True
                return level
        if self._chunks % _PROBE_EVERY:
            return self._level
        self._probe += 1
        return _TRIED_FIRST[self._probe % len(_TRIED_FIRST)]

    def packed(self, level: int | None, plain: int, payload: int, seconds: float) -> None:
        """A chunk was packed: ``plain`` bytes to ``payload`` bytes, in ``seconds`` of one processor."""
        self._plain += plain
        if level in self._known and plain and seconds > 0:
            first = not self._known[level].measured
            self._known[level].learn(plain / seconds, payload / plain)
            if first and self._line is not None and self._level is None:
                self._take_best(self._line)  # not a window later: a push may be over by then

    def sent(self, count: int, waited: float) -> None:
        """``count`` bytes went out, after waiting ``waited`` seconds for the line or the receiver."""
        self._bytes += count
        self._waited += waited
        elapsed = self._clock() - self._started
        if self._auto and elapsed >= WINDOW_S:
            self._judge(elapsed)
            self._begin_window()

    def _begin_window(self) -> None:
        self._started = self._clock()
        self._bytes = self._plain = 0
        self._waited = 0.0

    def _judge(self, elapsed: float) -> None:
        plain = self._rate = self._plain / elapsed
        self._locked = {level: left - 1 for level, left in self._locked.items() if left > 1}
        self._since_change += 1
        if self._before is not None:
            if self._since_change < _SETTLE:
                return
            (old, rate), self._before = self._before, None
            if plain < rate * _GAIN:
                # The receiver, or something else, is what limits: packing only costs.
                self._locked[self._level] = _LOCKED
                self._change(old)
                return
        rate = self._bytes / elapsed
        if self._waited / elapsed >= _WAITING:
            self._line, self._idle = rate, 0
        elif self._line is not None:
            self._line, self._idle = max(self._line, rate), self._idle + 1
        if self._line is None:
            return
        best = self._best(self._line)
        if self._idle >= _IDLE and self._level is not None and None not in self._locked:
            best = None  # it is packing that is waited for: how fast is the line by now?
        if best != self._level:
            self._before = (self._level, plain)
            self._change(best)

    def _take_best(self, line: float) -> None:
        best = self._best(line)
        if best != self._level:
            self._before = None if self._rate is None else (self._level, self._rate)
            self._change(best)

    def _change(self, level: int | None) -> None:
        self._level = level
        self._since_change = self._idle = 0

    def _is_fast(self, line: float) -> bool:
        return self._level is None and line > _FAST * self._workers

    def _best(self, line: float) -> int | None:
        if self._is_fast(line):
            return None
        best, promise = self._level, self._promise(self._level, line) * _WORTH
        for level in LADDER:
            if level not in self._locked and self._promise(level, line) > promise:
                best, promise = level, self._promise(level, line)
        return best

    def _promise(self, level: int | None, line: float) -> float:
        """Plain bytes a second that a level would carry; what is not known yet promises nothing."""
        if level is None:
            return line
        known = self._known[level]
        return min(known.speed * self._workers, line / known.left) if known.measured else 0.0


__all__ = ["LADDER", "WINDOW_S", "Compression"]
