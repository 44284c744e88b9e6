# SPDX-License-Identifier: AGPL-3.0-or-later
"""A wide-area line for tests: what runs "at the source" and "at the receiver" meets only over it (``forwarder.py``)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from tests.limits import HANG_S
from tests.wan.forwarder import ADDRESSES, RECEIVER, SOURCE

ROOT: Final = Path(__file__).parents[2]


class NoLabError(Exception):
    """This machine cannot have the line, and why."""


@dataclass(frozen=True, slots=True)
class Line:
    """What the line is: rate, delay one way, share of packets lost, the queue before the link, and TCP's congestion control."""

    mbit: float = 100.0
    delay_ms: float = 20.0
    loss: float = 0.001
    queue_kib: float = 512.0
    congestion: str = "cubic"
    seed: int = 1

    def arguments(self) -> list[str]:
        """For the forwarder."""
        return [
            f"--mbit={self.mbit}",
            f"--delay-ms={self.delay_ms}",
            f"--loss={self.loss}",
            f"--queue-kib={self.queue_kib}",
            f"--congestion={self.congestion}",
            f"--seed={self.seed}",
        ]


@dataclass(frozen=True, slots=True)
class State:
    """What the line has done. Pairs: from the source, from the receiver. Bytes are those of whole IP packets that arrived.

    ``pauses``: seconds from the end of each cut to the first packet of data at the receiver.
    """

    cut: bool
    cuts: int
    pauses: list[float]
    carried: list[int]
    packets: list[int]
    lost: list[int]
    overflowed: list[int]


class Wan:
    """The line; see ``wan``. One task at a time."""

    source_address = ADDRESSES[SOURCE]
    receiver_address = ADDRESSES[RECEIVER]

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""
        self._asked = itertools.count(1)
        self._pid = 0
        self._namespaces: list[int] = []

    async def start(self) -> None:
        """Wait until the line is there. Raises NoLabError."""
        first = await self._answer()
        if "error" in first:
            raise NoLabError(
                f"no WAN can be made here: {first['error']} (it needs root, or CAP_NET_ADMIN and CAP_SYS_ADMIN,"
                " /dev/net/tun and the program ip)"
            )
        self._pid, self._namespaces = first["pid"], first["namespaces"]

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with trio.fail_after(HANG_S):
            while b"\n" not in self._said:
                data = await self._process.stdout.receive_some()
                if not data:
                    raise RuntimeError("the line's process has ended; see its errors")
                self._said += data
        line, self._said = self._said.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def _ask(self, **command: Any) -> State:
        assert self._process.stdin is not None
        number = next(self._asked)
        await self._process.stdin.send_all(
            json.dumps(command | {"number": number}).encode() + b"\n"
        )
        # Others are of questions whose asker was cancelled.
        while (answer := await self._answer())["number"] != number:
            pass
        del answer["number"]
        return State(**answer)

    async def state(self) -> State:
        """What it has done so far."""
        return await self._ask(do="state")

    async def cut(
        self, *, reset: bool = False, after: int | None = None, heal_after: int | None = None
    ) -> State:
        """Let nothing pass, now or once ``after`` more bytes came from the source; what is under way is lost.

        ``reset``: packets are answered by TCP resets instead of by nothing. ``heal_after``: until the source has tried so many
        times (has sent again what was lost, or begun a connection), else until ``heal``.
        """
        return await self._ask(do="cut", reset=reset, after=after, heal_after=heal_after)

    async def heal(self) -> State:
        """Let packets pass again."""
        return await self._ask(do="heal")

    def at(self, side: int, *command: str) -> list[str]:
        """The command, to be run in the source's or the receiver's namespace."""
        return ["nsenter", f"--net=/proc/{self._pid}/fd/{self._namespaces[side]}", "--", *command]

    def at_source(self, *command: str) -> list[str]:
        """The command, to be run at the source."""
        return self.at(SOURCE, *command)

    def at_receiver(self, *command: str) -> list[str]:
        """The command, to be run at the receiver."""
        return self.at(RECEIVER, *command)


@asynccontextmanager
async def wan(line: Line | None = None) -> AsyncIterator[Wan]:
    """A line with two ends; at the end everything that still runs at either end is killed.

    Raises NoLabError where namespaces or TUN devices cannot be had.
    """
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.wan.forwarder", *(line or Line()).arguments()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        lab = Wan(process)
        await lab.start()
        yield lab
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            with trio.move_on_after(HANG_S):
                await process.wait()
            process.kill()
            await process.wait()
            await process.stdout.aclose()


__all__ = ["Line", "NoLabError", "State", "Wan", "wan"]
