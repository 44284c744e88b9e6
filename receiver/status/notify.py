# SPDX-License-Identifier: AGPL-3.0-or-later
"""Telling systemd (sd_notify(3)): ready, what is going on, still alive, stopping. Without systemd it does nothing."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import trio


class Notifier:
    """Sends to the socket that systemd named in ``NOTIFY_SOCKET`` when it started this process."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        values = dict(os.environ) if environment is None else environment
        path = values.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        usec = values.get("WATCHDOG_USEC", "")
        #: Seconds between two signs of life, or None where no watchdog is set.
        self.watchdog_s = int(usec) / 2e6 if usec.isdigit() and int(usec) else None

    def send(self, *lines: str) -> None:
        """Send assignments such as ``READY=1``. Raises OSError if systemd named a socket that is not there.

        Never waits: where systemd is behind with reading, the lines are dropped. They are said again in time.
        """
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            with suppress(BlockingIOError):
                sock.connect(self._address)
                sock.send("\n".join(lines).encode())

    async def watch(self) -> None:
        """Tell the watchdog for as long as the event loop runs; returns at once where there is none."""
        while self.watchdog_s is not None:
            self.send("WATCHDOG=1")
            await trio.sleep(self.watchdog_s)
