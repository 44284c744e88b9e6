# SPDX-License-Identifier: AGPL-3.0-or-later
"""Receiving into memory that is there already, from any trio stream; without a copy where the stream can."""

from __future__ import annotations

import trio


async def receive_into(stream: trio.abc.ReceiveStream, room: memoryview) -> int:
    """Receive at least one byte into ``room`` and return how many; 0 at the end of the stream.

    Raises and is cancelled as ``stream.receive_some``. A stream that wraps another one passes this on by a method
    ``receive_into`` of its own.
    """
    own = getattr(stream, "receive_into", None)
    if own is not None:
        count: int = await own(room)
        return count
    if isinstance(stream, trio.SocketStream):
        try:
            return await stream.socket.recv_into(room)
        except trio.ClosedResourceError:
            raise trio.ClosedResourceError("this socket was closed") from None
        except OSError as error:
            if stream.socket.fileno() == -1:
                raise trio.ClosedResourceError("this socket was closed") from None
            raise trio.BrokenResourceError(f"socket connection broken: {error}") from error
    data = await stream.receive_some(len(room))
    room[: len(data)] = data
    return len(data)


__all__ = ["receive_into"]
