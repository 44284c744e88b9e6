# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backend that does what a test has written down: steps from `script.json` in the folder of its environment's SCRIPTED,
what it was told and the signals that it got to a file there. A program of its own: it is copied beside the plugin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = Path(os.environ["SCRIPTED"])


class Backend:
    """One process of the plugin's."""

    def __init__(self) -> None:
        # No file object: a signal's note may come in the middle of another.
        self.told = os.open(FOLDER / f"told-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.scripts: dict[str, list[list[Any]]] = json.loads((FOLDER / "script.json").read_text())
        self.plugin_string = ""
        self.signalled = False
        signal.signal(signal.SIGUSR1, self.on_signal)

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.signalled = True
        self.note("signal", "SIGUSR1")

    def note(self, status: str, *rest: Any) -> None:
        os.write(self.told, json.dumps([status, *rest]).encode() + b"\n")

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = os.read(0, count - len(data))
            if not piece:
                self.note("eof")
                sys.exit(0)
            data += piece
        return data

    def receive(self) -> tuple[str, str]:
        header = self.take(8)
        status, payload = chr(header[0]), self.take(int(header[1:7]))
        if status == "B":
            at = int.from_bytes(payload[:8], "big")
            with (FOLDER / f"data-{os.getpid()}").open("ab") as file:
                file.write(payload[8:])
            self.note("B", at, len(payload) - 8)
            return status, ""
        text = payload.decode().removesuffix("\n")
        self.note(status, text)
        if text.startswith("PluginString="):
            self.plugin_string = text.removeprefix("PluginString=")
        return status, text

    def send(self, status: str, payload: bytes = b"") -> None:
        self.raw(f"{status}{len(payload):06}\n".encode() + payload)

    def raw(self, data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]

    def until(self, status: str, prefix: str = "") -> str:
        while True:
            got, text = self.receive()
            if got == status and text.startswith(prefix):
                return text
            if text.startswith("RESULT "):
                # The job ended before it came to that.
                self.conclude()
                sys.exit(0)

    def run(self, steps: list[list[Any]]) -> None:
        for name, *arguments in steps:
            getattr(self, f"do_{name}")(*arguments)

    def do_send(self, status: str, text: str = "") -> None:
        self.send(status, f"{text}\n".encode() if text else b"")

    def do_raw(self, text: str) -> None:
        self.raw(text.encode("latin-1"))

    def do_until(self, status: str, prefix: str = "") -> None:
        self.until(status, prefix)

    def do_data(self, offset: int | None, length: int, packet: int = 300_000) -> None:
        """Addressed data at ``offset``, or plain data; each byte depends on where it is."""
        for at in range(0, length, packet):
            piece = bytes((at + i) % 251 for i in range(min(packet, length - at)))
            if offset is None:
                self.send("D", piece)
            else:
                self.send("B", (offset + at).to_bytes(8, "big") + piece)

    def do_handshake(self, *extra: str) -> None:
        self.until("C", "Hello replicator 3 ext=1")
        self.do_send("C", "Hello Bacula ext=1")
        for _block in ("Job", "Params"):
            self.until("F")
            self.do_send("F")
        self.receive()
        for text in extra:
            self.do_send("C", text)
        self.do_send("F")

    def do_choose(self) -> None:
        """Go on as the script of this plugin string does."""
        self.run(self.scripts[self.plugin_string.split()[0]])

    def do_hang(self) -> None:
        """Nothing more until the signal of a cancellation."""
        while not self.signalled:
            signal.sigtimedwait([], 0.02)

    def do_alive(self, seconds: float) -> None:
        """A sign of life, then nothing for a while."""
        self.do_send("K")
        signal.sigtimedwait([], seconds)

    def do_deaf(self) -> None:
        """Nothing more, whatever happens."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()

    def do_exit(self, code: int) -> None:
        sys.exit(code)

    def do_kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def do_close(self) -> None:
        os.close(1)

    def do_stderr(self, text: str) -> None:
        os.write(2, text.encode("latin-1"))

    def do_descriptors(self) -> None:
        """What of the daemon's descriptors has come along."""
        self.note(
            "descriptors",
            sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 3),
        )

    def do_restore(self, answers: dict[str, str]) -> None:
        """Objects and files until FINISH, which is not answered yet; or until the verdict, which is."""
        while True:
            status, text = self.receive()
            if text == "FINISH":
                return
            if text.startswith("RESULT "):
                self.conclude()
                sys.exit(0)
            if text.startswith("RESTOREOBJ:"):
                self.until("F")
                self.do_send("C", "OK")
            elif text.startswith("FNAME:"):
                answer = answers.get(text.removeprefix("FNAME:"), "OK")
                self.until("F")
                self.do_send("E" if answer == "E" else "C", answer)
            elif text == "DATA":
                status, text = self.receive()
                while status == "B":
                    status, text = self.receive()
                if status == "C":
                    self.conclude()
                    sys.exit(0)
                self.do_send("C", answers.get("data", "OK"))

    def do_verdict(self) -> None:
        self.until("C", "RESULT ")
        self.conclude()

    def conclude(self) -> None:
        self.do_send("C", "RESULT OK")
        self.do_end()

    def do_end(self) -> None:
        self.until("C", "END")
        self.do_send("F")
        self.until("T")


if __name__ == "__main__":
    backend = Backend()
    backend.run(backend.scripts["start"])
