# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m tests.wan.plain take PORT | give ADDRESS PORT BYTES`: one TCP connection full of bytes, and how long it took.

What the line lets pass with no protocol on it. The taker prints a line when it listens, and the seconds from the first
byte to the last at the end.
"""

from __future__ import annotations

import socket
import sys
import time

_PIECE = 1 << 20


def take(port: int) -> None:
    """Take one connection to its end."""
    with socket.create_server(("", port)) as server:
        print("listening", flush=True)  # noqa: T201  whoever started this reads it
        connection, _ = server.accept()
    with connection:
        started, room = 0.0, bytearray(_PIECE)
        while connection.recv_into(room):
            started = started or time.monotonic()
        print(time.monotonic() - started, flush=True)  # noqa: T201


def give(address: str, port: int, size: int) -> None:
    """Send so many bytes."""
    piece = memoryview(bytes(_PIECE))
    with socket.create_connection((address, port)) as connection:
        for at in range(0, size, _PIECE):
            connection.sendall(piece[: size - at])


if __name__ == "__main__":
    if sys.argv[1] == "take":
        take(int(sys.argv[2]))
    else:
        give(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
