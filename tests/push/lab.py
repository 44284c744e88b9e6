# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source that says what a test tells it to, and what a refusal must leave as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import trio

from replicator.domain.model import Point, PushKind
from replicator.imagemap import RootBuilder, vm_root
from replicator.phcbt import Algorithm, StreamHeader, StreamWriter, encode_chunk
from replicator.wire import messages as m
from replicator.wire.framing import MessageLimits, MessageStream
from replicator.wire.keys import PreSharedKey
from replicator.wire.stream import connect_stream
from tests.limits import HANG_S
from tests.sites import TOKEN, ReceiverSite

VM = UUID("5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01")
GRAIN = 4096
CHUNK = 65536


class RawSource:
    """A session that proved its key; nothing else is checked on this side."""

    def __init__(self, stream: MessageStream) -> None:
        self.stream = stream

    async def say(self, *messages: m.Message) -> None:
        for message in messages:
            await self.stream.send(m.CONTROL, m.encode(message))

    async def data(self, disk: int, offset: int, payload: bytes) -> None:
        await self.stream.send(m.DATA, m.data_head(disk, offset), payload)

    async def hear_any(self) -> m.FromReceiver | None:
        """The next answer of any kind; None at the end of the session, however it came."""
        with trio.fail_after(HANG_S):
            try:
                message = await self.stream.receive()
            except trio.BrokenResourceError:
                return None
        return None if message is None else m.decode_from_receiver(message[1])

    async def hear(self) -> m.FromReceiver | None:
        """The next answer that is neither an Ack, a Landed nor a sign of life."""
        while isinstance(answer := await self.hear_any(), m.Ack | m.Landed | m.Pong):
            pass
        return answer

    async def hear_ack(self) -> m.Ack:
        """The next Ack, past all Landed."""
        while isinstance(answer := await self.hear_any(), m.Landed | m.Pong):
            pass
        assert isinstance(answer, m.Ack)
        return answer

    async def ask(self, message: m.Message) -> m.FromReceiver | None:
        await self.say(message)
        return await self.hear()

    async def ended(self) -> bool:
        """Whether the receiver ends the session without another answer."""
        return await self.hear() is None


@asynccontextmanager
async def raw_source(port: int, token: str = TOKEN) -> AsyncIterator[RawSource]:
    transport = await trio.open_tcp_stream("127.0.0.1", port)
    stream = await connect_stream(transport, PreSharedKey.from_hex(token), deadline_s=HANG_S)
    # This side sends whatever it is told to, so it has no limits.
    limits = MessageLimits(dict.fromkeys(range(256), 1 << 30))
    async with MessageStream(stream, limits) as framed:
        yield RawSource(framed)


@dataclass(frozen=True, slots=True)
class RawPush:
    """A push of one disk as a correct source would send it."""

    opened: m.Open
    stream: bytes
    finish: m.Finish

    async def send(self, source: RawSource) -> m.FromReceiver | None:
        """Open, stream and Finish; the last answer, or the refusal."""
        answer = await source.ask(self.opened)
        if not isinstance(answer, m.Ready):
            return answer
        (at,) = answer.positions
        await source.data(0, at, self.stream[at:])
        return await source.ask(self.finish)


def raw_push(
    content: bytes,
    parent: Point | None = None,
    *,
    push_id: str = "1" * 16,
    **header_fields: Any,
) -> RawPush:
    """A seed, or a cycle on ``parent`` that sends the whole disk. ``header_fields`` make the stream's header lie."""
    number = parent.number + 1 if parent else 1
    old = parent.disks[0] if parent else None
    fields: dict[str, Any] = {
        "algorithm": Algorithm.XXH3_128,
        "grain": GRAIN,
        "chunk": CHUNK,
        "disk_size": len(content),
        "vm": VM,
        "base_point": parent.number if parent else 0,
        "target_point": number,
        "base_root": old.root if old else bytes(32),
        "disk_id": "disk-0",
    }
    header = StreamHeader(**(fields | header_fields))
    writer = StreamWriter(header)
    pieces: list[bytes | memoryview] = [writer.start()]
    builder = RootBuilder(header.algorithm, header.grain, len(content))
    for at in range(0, len(content), header.chunk):
        chunk = content[at : at + header.chunk]
        for record in encode_chunk(header, at, chunk, None):
            pieces += writer.add(record)
        digests = header.algorithm.digest_grains(chunk, header.grain)
        builder.add(at // header.grain, digests, len(digests) // header.digest_size)
    pieces.append(writer.finish())
    root = builder.root()
    since = old.since if old else number
    disk = m.OpenDisk("disk-0", "id-0", len(content), since, 1 << 40)
    opened = m.Open(
        vm=str(VM),
        name="web",
        epoch=1,
        push_id=push_id,
        kind=PushKind.CYCLE if parent else PushKind.SEED,
        point=number,
        parent=parent.number if parent else 0,
        parent_root=parent.root if parent else None,
        taken_at_us=1,
        disks=(disk,),
    )
    final = (m.FinalDisk(root, writer.root),)
    finish = m.Finish(push_id, vm_root([("disk-0", len(content), root)]), final, 1)
    return RawPush(opened, b"".join(pieces), finish)


async def state_of(rx: ReceiverSite) -> dict[str, Any]:
    """Everything that a receiver keeps: VMs, events, unfinished pushes and the bytes of all files."""
    state: dict[str, Any] = {}
    for vm in rx.log.vms:
        uuid = UUID(vm.vm)
        state[f"events of {vm.name}"] = [
            type(event).__name__ for event in await rx.log.history(uuid)
        ]
        state[f"push of {vm.name}"] = await rx.log.journal_get(f"push/{uuid}")
    return state | await trio.to_thread.run_sync(files_of, rx.config.state_dir / "vms")


def files_of(folder: Path) -> dict[str, Any]:
    """Content of every file below a folder, by its name."""
    return {
        str(path.relative_to(folder)): _content(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def _content(path: Path) -> str:
    """A digest of a file's bytes that are not zeros; maps are sparse and seem to be gigabytes long."""
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file, suppress(OSError):  # ENXIO: only a hole is left
        at = 0
        while True:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            data = os.pread(file.fileno(), 1 << 16, at)
            digest.update(b"%d" % at + data.rstrip(b"\0"))
            at += len(data)
    return digest.hexdigest()
