# SPDX-License-Identifier: AGPL-3.0-or-later
"""Memory for large payloads that is used again: to touch fresh pages costs several times what copying into old ones does."""

from __future__ import annotations

from typing import Final

#: Buffers that a pool keeps for later; more are let go of.
_KEPT_MAX: Final = 12


class _Buffer(bytearray):
    """Memory that a pool has lent; knows whether it is lent, so that it cannot come back twice."""

    __slots__ = ("lent",)
    lent: bool


class Buffers:
    """A pool of buffers of one size, in bytes. For one thread at a time, except ``give`` and ``take``, which are atomic enough
    for any (each is one operation on a list).

    A buffer that never comes back is collected like any other object: giving back is a saving, not a duty. Whoever gives a
    view back promises that nobody reads it, or a slice of it, any more.
    """

    def __init__(self, size: int) -> None:
        self.size: Final = size
        self._free: list[_Buffer] = []

    def take(self) -> memoryview:
        """A whole buffer, holding anything."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = _Buffer(self.size)
        buffer.lent = True
        return memoryview(buffer)

    def give(self, view: memoryview | bytes | bytearray) -> None:
        """Take back the buffer that ``view`` is a part of; what is no lent buffer of this pool's size is passed over."""
        buffer = view.obj if isinstance(view, memoryview) else view
        if not isinstance(buffer, _Buffer) or not buffer.lent or len(buffer) != self.size:
            return
        buffer.lent = False
        if len(self._free) < _KEPT_MAX:
            self._free.append(buffer)


__all__ = ["Buffers"]
