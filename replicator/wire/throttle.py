# SPDX-License-Identifier: AGPL-3.0-or-later
"""The throttle: one token bucket for all streams of a process, and a stream around each that draws on it.

It stands below encryption and frames, so that what it counts is what TCP carries. It knows rates, and neither where they come
from nor what the bytes mean.
"""

from __future__ import annotations

import math
from typing import Final

import trio

from replicator.wire.transport import receive_into

#: How much may go out at once after a pause, seconds at the rate that holds.
BURST_S: Final = 0.05
#: ... and at least so much, bytes: a timer that is late by some milliseconds must cost a slow line nothing.
BURST_BYTES_MIN: Final = 16 << 10
#: Streams take turns piece by piece, and a piece goes out whole: how long one may take, and its bounds in bytes.
PIECE_S: Final = 0.01
PIECE_BYTES_MIN: Final = 4 << 10
PIECE_BYTES_MAX: Final = 256 << 10
_BYTES_S_PER_MBPS: Final = 1_000_000 // 8


class Throttle:
    """A token bucket, shared by the streams that ``wrap`` makes. ``mbps``: 10^6 bits of TCP payload a second, 0 for no cap."""

    def __init__(self, mbps: int = 0) -> None:
        self._mbps = mbps
        self._changed = trio.Event()
        self._turn = trio.StrictFIFOLock()
        # When the bucket was empty, as if it had filled at this rate ever since; full until something was taken.
        self._empty_at = -math.inf

    @property
    def mbps(self) -> int:
        """The rate, Mbit/s; 0 for no cap."""
        return self._mbps

    def set_rate(self, mbps: int) -> None:
        """Another rate, from this moment on, also for who waits. The bucket keeps what is in it; without a cap nothing is."""
        if mbps == self._mbps:
            return
        now = trio.current_time()
        saved = min((now - self._empty_at) * self._rate, self._burst_bytes) if self._mbps else 0.0
        self._mbps = mbps
        if mbps:
            self._empty_at = now - saved / self._rate
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    @property
    def _rate(self) -> int:
        """Bytes a second."""
        return self._mbps * _BYTES_S_PER_MBPS

    @property
    def _burst_bytes(self) -> float:
        return max(self._rate * BURST_S, BURST_BYTES_MIN)

    @property
    def _piece_bytes(self) -> int:
        return min(max(int(self._rate * PIECE_S), PIECE_BYTES_MIN), PIECE_BYTES_MAX)

    def wrap(self, stream: trio.abc.Stream) -> ThrottledStream:
        """The stream to use in place of ``stream``, which it owns."""
        return ThrottledStream(stream, self)

    async def take(self, wanted: int) -> int:
        """Wait for this task's turn and for tokens; returns how many of ``wanted`` bytes (at least 1) may go out now.

        Turns are in the order in which they were asked for. Without a cap it is all of them, at once. Cancelled, it has taken
        nothing.
        """
        async with self._turn:
            while self._mbps:
                piece = min(wanted, self._piece_bytes)
                now = trio.current_time()
                full_at = now - self._burst_bytes / self._rate
                due = max(self._empty_at, full_at) + piece / self._rate
                if due <= now:
                    self._empty_at = due
                    return piece
                with trio.move_on_at(due):
                    await self._changed.wait()
        return wanted


class ThrottledStream(trio.abc.Stream):
    """A stream that sends no faster than its throttle lets it; receiving is passed through."""

    def __init__(self, stream: trio.abc.Stream, throttle: Throttle) -> None:
        self._stream = stream
        self._throttle = throttle
        self._sending: trio.CancelScope | None = None
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As the stream's own. Cancelled while it waits, nothing of the piece that it waits for is sent."""
        self._check_free()
        if not self._throttle.mbps or self._closed or not data:
            await self._stream.send_all(data)  # straight through
            return
        with trio.CancelScope() as scope:
            self._sending = scope
            try:
                await self._send_pieces(data)
            finally:
                self._sending = None
            return
        raise trio.ClosedResourceError("this stream was closed while it waited for its turn")

    async def _send_pieces(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data) as whole:
            at = 0
            while at < len(whole):
                count = await self._throttle.take(len(whole) - at)
                with whole[at : at + count] as piece:
                    await self._stream.send_all(piece)
                at += count

    def _check_free(self) -> None:
        if self._sending is not None:
            raise trio.BusyResourceError("another task is sending on this stream")

    async def wait_send_all_might_not_block(self) -> None:
        """As the stream's own: for tokens it is ``send_all`` that waits."""
        self._check_free()
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """As the stream's own."""
        return await self._stream.receive_some(max_bytes)

    async def receive_into(self, room: memoryview) -> int:
        """As ``replicator.wire.transport.receive_into`` of the stream itself."""
        return await receive_into(self._stream, room)

    async def aclose(self) -> None:
        """Close the stream; who waits to send gets ClosedResourceError."""
        self._closed = True
        if self._sending is not None:
            self._sending.cancel()
        await self._stream.aclose()


__all__ = ["Throttle", "ThrottledStream"]
