# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backend that goes wrong in one way: it speaks docs/backend-protocol.md, and the word ``fault=`` of the plugin string says how.

A program of its own, with nothing of the product in it, so that what a real file daemon makes of each fault is seen alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time

SIZE = 3 << 20
#: More than a packet, less than the disk.
PIECE = 1 << 18


class OverError(Exception):
    """The plugin has hung up."""


def read_exactly(count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece:
            raise OverError
        data += piece
    return data


def receive() -> tuple[str, bytes]:
    header = read_exactly(8)
    return chr(header[0]), read_exactly(int(header[1:7]))


def expect(status: str) -> bytes:
    got, data = receive()
    if got != status:
        raise OverError
    return data


def send(status: str, data: bytes | str = b"") -> None:
    raw = data.encode() if isinstance(data, str) else data
    packet = f"{status}{len(raw):06}\n".encode() + raw
    while packet:
        packet = packet[os.write(1, packet) :]


def block() -> list[str]:
    lines: list[str] = []
    while True:
        status, data = receive()
        if status == "F":
            return lines
        lines.append(data.decode().strip())


class Backend:
    """One job. ``fault``: how it goes wrong; "" not at all."""

    def __init__(self) -> None:
        self.fault = ""
        self.kind = ""
        self.content = bytes(range(256)) * (SIZE // 256)

    def go_wrong(self, where: str) -> None:
        """Do what the fault says, if this is the place."""
        kind, _, at = self.fault.partition("@")
        if at != where:
            return
        if kind == "error":
            send("E", f"the fake fails at {where}\n")
        elif kind == "abort":
            send("A", f"the fake gives up at {where}\n")
        elif kind == "exit":
            sys.exit(0)
        elif kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "nonsense":
            os.write(1, b"this is no packet of any protocol\n")
        elif kind == "hang":
            time.sleep(3600)
        elif kind == "stderr":
            os.write(2, b"the fake complains\n")
            return
        else:
            raise AssertionError(self.fault)
        raise OverError

    def run(self) -> None:
        """The dialogue."""
        expect("C")
        send("C", "Hello Bacula ext=1\n")
        expect("C")
        job = dict(line.partition("=")[::2] for line in block())
        self.kind = job["Type"]
        send("F")
        expect("C")
        params = dict(line.partition("=")[::2] for line in block())
        for word in params["PluginString"].split():
            if word.startswith("fault="):
                self.fault = word.removeprefix("fault=")
        if "restores" in params["PluginString"].split() and self.kind != "R":
            self.fault = ""
        self.go_wrong("params")
        send("F")
        start = expect("C").decode().strip()
        self.go_wrong("start")
        send("C", "TIMEOUT:5\n")
        send("F")
        if start == "BackupStart":
            self.backup()
        elif start == "RestoreStart":
            self.restore()
        self.rest()

    def backup(self) -> None:
        """One disk of three MiB."""
        self.go_wrong("first_file")
        send("C", "FNAME:@image/fake/disks/disk-0.raw\n")
        send("C", f"STAT:F {SIZE} 0 0 100600 1\n")
        send("C", "TSTAMP:1700000000 1700000000 1700000000\n")
        if self.fault != "plain":
            send("C", "OFFSETS\n")
        send("F")
        self.go_wrong("open")
        send("C", "DATA\n")
        for offset in range(0, SIZE, PIECE):
            if offset == SIZE // 2:
                self.go_wrong("data")
            if self.fault == "short" and offset > SIZE // 2:
                break
            piece = self.content[offset : offset + PIECE]
            if self.fault == "plain":
                send("D", piece)
            else:
                send("B", offset.to_bytes(8, "big") + piece)
        self.go_wrong("end_of_data")
        send("F")
        self.go_wrong("end_of_files")
        send("F")

    def restore(self) -> None:
        """Whatever comes is taken."""
        while True:
            status, data = receive()
            text = data.decode(errors="replace").strip()
            if status == "C" and text.startswith("RESTOREOBJ:"):
                block()
                self.go_wrong("object")
                send("C", "OK\n")
            elif status == "C" and text.startswith("FNAME:"):
                block()
                self.go_wrong("create")
                send("C", "OK\n")
                self.take()
            elif status == "C" and text == "FINISH":
                self.go_wrong("finish")
                send("F")
                return
            else:
                self.result(text)
                return

    def take(self) -> None:
        expect("C")
        taken = 0
        while True:
            status, data = receive()
            if status not in {"B", "D"}:
                break
            taken += len(data)
            if taken > SIZE // 2:
                self.go_wrong("write")
        self.go_wrong("close")
        send("C", "OK\n")

    def rest(self) -> None:
        """What comes after the work, in any order."""
        while True:
            status, data = receive()
            if status == "T":
                return
            text = data.decode(errors="replace").strip()
            if text.startswith("CHECKFILE:"):
                send("C", "SEEN\n")
            elif text == "END":
                send("F")
            else:
                self.result(text)

    def result(self, text: str) -> None:
        if text.startswith("RESULT"):
            self.go_wrong("result")
            send("C", "RESULT OK\n")


def main() -> None:
    backend = Backend()
    try:
        backend.run()
    except OverError:
        # An error was said: the verdict may still come, and then the end.
        try:
            backend.fault = ""
            backend.rest()
        except OverError:
            return


if __name__ == "__main__":
    main()
