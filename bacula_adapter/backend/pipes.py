# SPDX-License-Identifier: AGPL-3.0-or-later
"""The two pipes to the plugin, without blocking: packets in, bytes out. Knows no dialogue."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress

import trio

from bacula_adapter.backend.packets import Packet, PacketReader, ProtocolError

#: More in a pipe: fewer changes of process for each MiB.
_PIPE_BYTES = 1 << 20
#: Of a long payload so much is asked for at once: a pipe seldom holds more, and what is asked for is allocated first.
_READ_MAX = 256 << 10
_VECTOR_MAX = 512

Bytes = bytes | bytearray | memoryview


def make_ready(fd: int) -> None:
    """Set a pipe's end up for this module: non-blocking, and large where the system lets us."""
    os.set_blocking(fd, False)
    with suppress(OSError):  # no pipe, or the user's allowance is used up: only slower
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


class PipeReader:
    """Packets from a pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reader = PacketReader()
        make_ready(fd)

    async def receive(self) -> Packet | None:
        """The next packet, None at the pipe's end. Raises ProtocolError, also where the pipe ends within a packet. Cancelled, it
        loses nothing.
        """
        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                # Never more than a header or a payload, so that a packet is all that it can complete.
                data = os.read(self._fd, min(self._reader.wanted, _READ_MAX))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
                continue
            if not data:
                if not self._reader.between:
                    raise ProtocolError("the plugin's packets ended within one")
                return None
            for packet in self._reader.feed(data):
                return packet


class PipeWriter:
    """Bytes to a pipe. One task at a time may write."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left: list[memoryview] = []
        make_ready(fd)

    async def write(self, parts: Sequence[Bytes]) -> None:
        """Write all parts; when this returns, or is cancelled, their memory is the caller's again.

        What a cancelled call did not write goes before the next call's: the other side never sees half a packet. Raises
        BrokenPipeError when nobody reads any more.
        """
        self._left += [memoryview(part) for part in parts if len(part)]
        try:
            await self._flush()
        except trio.Cancelled:
            self._left = [memoryview(bytes(part)) for part in self._left]
            raise
        except OSError:
            self._left = []
            raise

    async def _flush(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._left:
            try:
                written = os.writev(self._fd, self._left[:_VECTOR_MAX])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._fd)
                continue
            done = 0
            while done < len(self._left) and written >= len(self._left[done]):
                written -= len(self._left[done])
                done += 1
            del self._left[:done]
            if written:
                self._left[0] = self._left[0][written:]


__all__ = ["Bytes", "PipeReader", "PipeWriter", "make_ready"]
