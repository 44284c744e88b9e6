# SPDX-License-Identifier: AGPL-3.0-or-later
"""A plugin in Python: plays `replicator-fd.so` (``ext``) or Bacula's own metaplugins (stock) against the backend.

Against the real process (``started_backend``) or a session in this process (``inner_backend``), over real pipes::

    async with started_backend() as plugin:
        saved = await plugin.backup_job('source=image vm=web …', level="F")
        assert saved.files["@image/web/disks/disk-0.raw"].content() == image
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
import trio.testing

from bacula_adapter.backend.dispatch import Handlers
from bacula_adapter.backend.packets import Packet, ProtocolError, encode
from bacula_adapter.backend.pipes import PipeReader, PipeWriter
from bacula_adapter.backend.session import Session
from tests.limits import HANG_S

#: What Bacula calls a job, unless told.
JOB = "Backup.2026-11-25_10.00.00_03"
#: How much data a restore sends in a packet.
PIECE = 65_528


class BackendFailedError(Exception):
    """The backend said E or A; the text is its."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class BackendEndedError(Exception):
    """The backend's output ended."""


@dataclass
class SavedFile:
    """A file as it was sent. ``pieces``: bytes by offset (plain: without gaps)."""

    name: str
    size: int
    stat: str = ""
    tstamp: str = ""
    addressed: bool = False
    pieces: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def sent(self) -> int:
        """Bytes that Bacula stores."""
        return sum(len(data) for _, data in self.pieces)

    def content(self) -> bytes:
        """What a restore makes of it."""
        if not self.addressed:
            return b"".join(data for _, data in self.pieces)
        whole = bytearray(self.size)
        for offset, data in self.pieces:
            whole[offset : offset + len(data)] = data
        return bytes(whole)


@dataclass
class Saved:
    """A whole backup, in the order in which it came."""

    files: dict[str, SavedFile] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    options: dict[str, bytes] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RestoreObject:
    """An object as the catalogue gives it back."""

    name: str
    data: bytes
    job_id: int = 1
    kind: int = 25


class Plugin:
    """One conversation. ``messages``: all that was said for the job's log, as status and text."""

    def __init__(
        self, in_fd: int, out_fd: int, *, ext: bool, cancel: Callable[[int], None]
    ) -> None:
        self._reader = PipeReader(in_fd)
        self._writer = PipeWriter(out_fd)
        self._fds = [in_fd, out_fd]
        self._signal = cancel
        self.ext = ext
        self.messages: list[tuple[str, str]] = []
        self.alive = 0
        self.timeout_s: int | None = None
        self.claims: list[str] = []
        #: Exit code of a real process, once it ended.
        self.exit_code: int | None = None
        self.ended = trio.Event()
        self.process: trio.Process | None = None

    # Packets

    async def send(self, status: str, payload: bytes = b"") -> None:
        """Any packet."""
        await self._writer.write([encode(status, payload)])

    async def raw(self, data: bytes) -> None:
        """Any bytes."""
        await self._writer.write([data])

    async def command(self, text: str) -> None:
        """A command."""
        await self.send("C", f"{text}\n".encode())

    async def packet(self) -> Packet:
        """The next packet, whatever it is."""
        try:
            packet = await self._reader.receive()
        except (ProtocolError, OSError) as error:
            raise BackendEndedError(str(error)) from None
        if packet is None:
            raise BackendEndedError("the backend says no more")
        return packet

    async def receive(self) -> Packet:
        """The next packet that is no message and no sign of life. Raises BackendFailedError for E and A."""
        while True:
            packet = await self.packet()
            if packet.status in "IWQ":
                self.messages.append((packet.status, packet.text()))
            elif packet.status == "K":
                self.alive += 1
            elif packet.status in "EA":
                raise BackendFailedError(packet.status, packet.text())
            else:
                return packet

    async def expect(self, status: str, text: str = "") -> None:
        """The next packet has to be this one."""
        packet = await self.receive()
        assert (packet.status, packet.text()) == (status, text)

    def close_input(self) -> None:
        """The plugin goes away: the backend sees the end of its input."""
        if self._fds[1] >= 0:
            os.close(self._fds[1])
            self._fds[1] = -1

    def close(self) -> None:
        """Close both pipes."""
        self.close_input()
        self.close_output()

    def close_output(self) -> None:
        """The plugin reads no more."""
        if self._fds[0] >= 0:
            os.close(self._fds[0])
            self._fds[0] = -1

    def cancel(self, number: int = signal.SIGUSR1) -> None:
        """The signal with which Bacula's cancellation is passed on."""
        self._signal(number)

    @property
    def text(self) -> str:
        """All messages so far, in lines with their status before them."""
        return "\n".join(f"{status} {text}" for status, text in self.messages)

    # The dialogue

    async def hello(self, name: str = "replicator") -> None:
        """Say hello."""
        await self.command(f"Hello {name} 3" + (" ext=1" if self.ext else ""))
        await self.expect("C", "Hello Bacula ext=1" if self.ext else "Hello Bacula")

    async def job(
        self,
        name: str = JOB,
        *,
        kind: str = "B",
        level: str = "F",
        job_id: int = 1,
        previous: str = "",
        more: Iterable[str] = (),
    ) -> None:
        """Describe the job; ``more`` lines such as ``Where=/x``."""
        lines = [f"Name={name}", f"JobID={job_id}", f"Type={kind}"]
        if kind != "R":
            lines.append(f"Level={level}")
        if previous:
            lines.append(f"PrevJobName={previous}")
        await self.lines("Job", [*lines, *more])

    async def params(self, string: str) -> None:
        """Give the plugin string: as a whole, or word by word where the plugin is a stock one."""
        await self.lines("Params", [f"PluginString={string}"] if self.ext else string.split())

    async def lines(self, command: str, lines: Iterable[str]) -> None:
        """A block of lines, and its answer."""
        await self.command(command)
        for line in lines:
            await self.command(line)
        await self.send("F")
        await self.expect("F")

    async def start(self, command: str) -> None:
        """Start; takes what comes before the answer."""
        await self.command(command)
        while (packet := await self.receive()).status == "C":
            key, _, value = packet.text().partition(":")
            if key == "TIMEOUT":
                self.timeout_s = int(value)
            else:
                assert key == "CLAIM", packet
                self.claims.append(value)
        assert packet.status == "F", packet

    async def backup(self) -> Saved:
        """Start a backup and take all of it. Raises BackendFailedError; what came before is in ``partial``."""
        await self.start("BackupStart")
        self.partial = saved = Saved()
        while (packet := await self.receive()).status != "F":
            key, _, name = packet.text().partition(":")
            saved.order.append(name)
            if key == "FNAME":
                await self._take_file(saved, name)
            elif key == "RESTOREOBJ":
                saved.objects[name] = await self._take_object("RESTOREOBJ_LEN:")
            else:
                assert key == "PLUGINCONF", packet
                saved.options[name] = await self._take_object("PLUGINCONF_LEN:")
        return saved

    async def _take_attributes(self, name: str) -> SavedFile:
        file = SavedFile(name, 0)
        while (packet := await self.receive()).status != "F":
            key, _, value = packet.text().partition(":")
            if key == "STAT":
                file.stat, file.size = value, int(value.split()[1])
            elif key == "TSTAMP":
                file.tstamp = value
            else:
                assert (key, self.ext) == ("OFFSETS", True), packet
                file.addressed = True
        return file

    async def _take_file(self, saved: Saved, name: str) -> None:
        assert name not in saved.files, name
        file = saved.files[name] = await self._take_attributes(name)
        packet = await self.receive()
        if packet.status == "F":
            return
        assert packet.text() == "DATA", packet
        end = 0
        while (packet := await self.receive()).status != "F":
            if file.addressed:
                assert packet.status == "B", packet.status
                offset, data = int.from_bytes(packet.payload[:8], "big"), packet.payload[8:]
                assert offset >= end
                assert offset + len(data) <= file.size
            else:
                assert packet.status == "D", packet.status
                offset, data = end, packet.payload
            assert data
            file.pieces.append((offset, data))
            end = offset + len(data)

    async def _take_object(self, length: str) -> bytes:
        text = (await self.receive()).text()
        assert text.startswith(length)
        data = b""
        while (packet := await self.receive()).status != "F":
            assert packet.status == "D"
            data += packet.payload
        assert len(data) == int(text.removeprefix(length))
        return data

    async def check_file(self, name: str) -> bool:
        """Whether a name of an earlier job still exists (accurate jobs)."""
        await self.command(f"CHECKFILE:{name}")
        text = (await self.receive()).text()
        assert text in ("SEEN", "GONE")
        return text == "SEEN"

    async def result(self, status: str = "T") -> None:
        """Bacula's verdict; takes whatever is on its way. Raises BackendFailedError if it is not accepted."""
        await self.command(f"RESULT {status}")
        while True:
            try:
                packet = await self.receive()
            except BackendFailedError as error:
                if error.status == "E":
                    raise
                self.messages.append((error.status, str(error)))
                continue
            if packet.status == "C" and packet.text() == "RESULT OK":
                return

    async def end(self) -> None:
        """The end."""
        await self.command("END")
        await self.expect("F")
        await self.send("T")

    async def entries(self, command: str = "EstimateStart") -> list[SavedFile]:
        """The entries of an estimate or a listing."""
        await self.start(command)
        found = []
        while (packet := await self.receive()).status != "F":
            found.append(await self._take_attributes(packet.text().removeprefix("FNAME:")))
        return found

    async def query(self) -> list[str]:
        """The answers of a query, ``key=value``."""
        await self.start("QueryStart")
        found = []
        while (packet := await self.receive()).status != "F":
            found.append(packet.text())
        return found

    async def restore_object(self, restored: RestoreObject) -> None:
        """Hand an object over."""
        await self.command(f"RESTOREOBJ:{restored.name}")
        if self.ext:
            await self.command(f"RESTOREOBJ_JOBID:{restored.job_id}")
            await self.command(f"RESTOREOBJ_TYPE:{restored.kind}")
        await self.command(f"RESTOREOBJ_LEN:{len(restored.data)}")
        for at in range(0, len(restored.data), PIECE):
            await self.send("D", restored.data[at : at + PIECE])
        await self.send("F")
        await self.expect("C", "OK")

    async def restore_file(
        self, name: str, file: SavedFile, *, index: int = 1, whole: bool = True
    ) -> str:
        """Hand a file over under a name; the backend's answer to it."""
        await self.command(f"FNAME:{name}")
        await self.command(f"STAT:{file.stat} {index}")
        await self.command(f"TSTAMP:{file.tstamp}")
        await self.send("F")
        answer = (await self.receive()).text()
        if answer != "OK" or not (self.ext or file.pieces):
            return answer
        await self.command("DATA")
        for offset, data in file.pieces:
            for at in range(0, len(data), PIECE):
                piece = data[at : at + PIECE]
                if file.addressed:
                    await self.send("B", (offset + at).to_bytes(8, "big") + piece)
                else:
                    await self.send("D", piece)
        await self.send("F" if whole else "E")
        await self.expect("C", "OK")
        return answer

    async def finish(self) -> None:
        """No more files."""
        await self.command("FINISH")
        await self.expect("F")

    # Whole jobs

    async def backup_job(
        self,
        string: str,
        *,
        name: str = JOB,
        level: str = "F",
        job_id: int = 1,
        previous: str = "",
        more: Iterable[str] = (),
        status: str = "T",
    ) -> Saved:
        """A backup from Hello to the end."""
        await self.hello()
        await self.job(name, level=level, job_id=job_id, previous=previous, more=more)
        await self.params(string)
        saved = await self.backup()
        if self.ext:
            await self.result(status)
        await self.end()
        return saved

    async def restore_job(
        self,
        string: str,
        files: Sequence[tuple[str, SavedFile]] | Mapping[str, SavedFile],
        objects: Iterable[RestoreObject] = (),
        *,
        name: str = "Restore.2026-11-25_11.00.00_09",
        where: str = "/",
        job_id: int = 9,
        more: Iterable[str] = (),
        status: str = "T",
    ) -> list[str]:
        """A restore from Hello to the end: the answers to the files. ``where`` is put before their names, as Bacula does."""
        await self.hello()
        prefix = "" if where in ("", "/") else where.rstrip("/") + "/"
        await self.job(name, kind="R", job_id=job_id, more=[f"Where={prefix.rstrip('/')}", *more])
        await self.params(string)
        await self.start("RestoreStart")
        for restored in objects:
            await self.restore_object(restored)
        pairs = files.items() if isinstance(files, Mapping) else files
        answers = [
            await self.restore_file(prefix + file_name, file, index=index)
            for index, (file_name, file) in enumerate(pairs, 1)
        ]
        if status == "T" or not self.ext:
            await self.finish()
        if self.ext:
            await self.result(status)
        await self.end()
        return answers


@asynccontextmanager
async def started_backend(
    *,
    ext: bool = True,
    config: Path | None = None,
    env: Mapping[str, str] | None = None,
    code: str = "import sys; from bacula_adapter.backend_command import main; sys.exit(main([]))",
    stderr: str = "",
) -> AsyncIterator[Plugin]:
    """The real process. ``config``: its configuration file, where the string names none (else there is none). ``stderr``: what it
    has to leave there.
    """
    to_backend, from_backend = os.pipe(), os.pipe()
    whole = {**os.environ, "REPLCTL_CONFIG": str(config or "/dev/null"), **(env or {})}
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", code],
        stdin=to_backend[0],
        stdout=from_backend[1],
        stderr=subprocess.PIPE,
        env=whole,
    )
    os.close(to_backend[0])
    os.close(from_backend[1])
    plugin = Plugin(from_backend[0], to_backend[1], ext=ext, cancel=process.send_signal)
    plugin.process = process
    last_words = bytearray()

    async def collect() -> None:
        assert process.stderr is not None
        async for chunk in process.stderr:
            last_words.extend(chunk)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect)
            with trio.fail_after(HANG_S):
                yield plugin
                plugin.close()
                plugin.exit_code = await process.wait()
    finally:
        plugin.close()
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            plugin.exit_code = await process.wait()
    assert last_words.decode() == stderr  # messages of the last resort


@asynccontextmanager
async def inner_backend(handlers: Handlers, *, ext: bool = True) -> AsyncIterator[Plugin]:
    """A session in this process; with trio's autojump clock, time passes as soon as nothing else happens."""
    to_backend, from_backend = os.pipe(), os.pipe()
    signals, heed = trio.open_memory_channel[int](100)
    plugin = Plugin(from_backend[0], to_backend[1], ext=ext, cancel=signals.send_nowait)

    async def serve() -> None:
        session = Session(to_backend[0], from_backend[1], handlers)
        try:
            plugin.exit_code = await session.run(heed)
        finally:
            plugin.ended.set()
            os.close(to_backend[0])
            os.close(from_backend[1])

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with signals:
                yield plugin
                plugin.close_input()
                while plugin.exit_code is None:
                    try:
                        await plugin.receive()
                    except BackendFailedError:
                        continue
                    except BackendEndedError:
                        await trio.testing.wait_all_tasks_blocked()
    finally:
        plugin.close()


__all__ = [
    "JOB",
    "BackendEndedError",
    "BackendFailedError",
    "Plugin",
    "RestoreObject",
    "Saved",
    "SavedFile",
    "inner_backend",
    "started_backend",
]
