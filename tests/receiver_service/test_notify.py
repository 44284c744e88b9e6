# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from receiver.status.notify import Notifier
from tests.limits import HANG_S


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What stands in NOTIFY_SOCKET, and the socket that systemd would read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if request.param == "path":
            name = str(tmp_path / "notify")
            sock.bind(name)
        else:
            name = f"@replctl-test-{os.getpid()}"
            sock.bind("\0" + name[1:])
        sock.setblocking(False)
        yield name, sock


def waiting(sock: socket.socket) -> list[bytes]:
    """The datagrams that nobody has read yet."""
    found = []
    with suppress(BlockingIOError):
        while True:
            found.append(sock.recv(4096))
    return found


def test_every_call_is_one_datagram(systemd: tuple[str, socket.socket]) -> None:
    name, sock = systemd
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.send("READY=1", "STATUS=listening on port 9848")
    notifier.send("STOPPING=1")
    assert sock.recv(4096) == b"READY=1\nSTATUS=listening on port 9848"
    assert sock.recv(4096) == b"STOPPING=1"


async def test_the_watchdog_is_told_twice_in_its_interval(
    systemd: tuple[str, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    assert autojump_clock.rate == 0
    name, sock = systemd
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "6000000"})
    assert notifier.watchdog_s == 3
    with trio.move_on_after(10):
        await notifier.watch()
    assert waiting(sock) == [b"WATCHDOG=1"] * 4  # at 0, 3, 6 and 9 s


async def test_without_systemd_nothing_is_done() -> None:
    notifier = Notifier({})
    notifier.send("READY=1")
    with trio.fail_after(HANG_S):
        await notifier.watch()


@pytest.mark.parametrize("text", ["", "0", "soon", "-5"])
def test_no_watchdog(text: str) -> None:
    assert Notifier({"WATCHDOG_USEC": text}).watchdog_s is None


def test_a_socket_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).send("READY=1")


def test_it_never_waits_for_systemd(systemd: tuple[str, socket.socket]) -> None:
    name, sock = systemd
    notifier = Notifier({"NOTIFY_SOCKET": name})
    queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(queue + 100):
        notifier.send("STATUS=on")
    assert 0 < len(waiting(sock)) < queue + 100
