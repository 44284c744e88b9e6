# SPDX-License-Identifier: AGPL-3.0-or-later
"""A target that a test writes line by line: it logs initiators in, plays a small disk, and then does what it likes."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from replicator.iscsi import Portal
from replicator.iscsi.digest import crc32c

LAYOUT: Final = struct.Struct(">4BI8s8I")
NO_TAG: Final = 0xFFFFFFFF
BLOCK: Final = 512
BLOCKS: Final = 4096
#: Sense: illegal request, invalid field in the command.
UNSUPPORTED: Final = bytes([0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0, 0, 0])


def pdu(
    opcode: int,
    *,
    flags: int = 0x80,
    byte2: int = 0,
    byte3: int = 0,
    lun: bytes = bytes(8),
    itt: int = NO_TAG,
    words: tuple[int, ...] = (),
    data: bytes = b"",
    length: int | None = None,
) -> bytes:
    """A PDU; ``words`` are those from byte 20 on. ``length``: what the header says, if it is to lie."""
    words = (words + (0,) * 7)[:7]
    size = len(data) if length is None else length
    return (
        LAYOUT.pack(opcode, flags, byte2, byte3, size, lun, itt, *words)
        + data
        + bytes(-len(data) % 4)
    )


@dataclass(slots=True)
class Command:
    """A PDU that the initiator sent."""

    opcode: int
    flags: int
    lun: bytes
    itt: int
    words: tuple[int, ...]
    data: bytes

    @property
    def cdb(self) -> bytes:
        """Of a SCSI command."""
        return struct.pack(">4I", *self.words[3:7])

    @property
    def expected(self) -> int:
        """Bytes that a SCSI command asks for."""
        return self.words[0]


class Connection:
    """One initiator. ``window``: commands that it may send ahead. ``digests``: of headers and data, from full feature on."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.stat_sn = 1
        self.window = 64
        self.exp_cmd_sn = 1
        self.max_cmd_sn = 1
        self.digests = (False, False)
        self._in = b""

    async def _read(self, size: int) -> bytes:
        while len(self._in) < size:
            got = await self.stream.receive_some()
            if not got:
                raise trio.EndOfChannel
            self._in += got
        data, self._in = self._in[:size], self._in[size:]
        return data

    async def receive(self) -> Command:
        """The next PDU. Raises trio.EndOfChannel at the end."""
        header = await self._read(48)
        if self.digests[0]:
            assert crc32c(header) == int.from_bytes(await self._read(4), "little")
        fields = LAYOUT.unpack(header)
        size = fields[4]
        data = (await self._read(size + -size % 4))[:size]
        if size and self.digests[1]:
            padded = data + bytes(-size % 4)
            assert crc32c(padded) == int.from_bytes(await self._read(4), "little")
        assert fields[9] <= self.stat_sn, "an answer was acknowledged that was not given"
        if fields[0] & 0x3F == 0x01:
            assert fields[8] == self.exp_cmd_sn <= self.max_cmd_sn
            self.exp_cmd_sn += 1
        return Command(fields[0] & 0x3F, fields[1], fields[5], fields[6], fields[7:], data)

    async def send(self, data: bytes, *, spoil: str = "") -> None:
        """One PDU, with the digests that were agreed on; ``spoil``: which of them is to be wrong (header, data)."""
        header, rest = data[:48], data[48:]
        if self.digests[0]:
            header += (crc32c(header) ^ (spoil == "header")).to_bytes(4, "little")
        if rest and self.digests[1]:
            rest += (crc32c(rest) ^ (spoil == "data")).to_bytes(4, "little")
        await self.stream.send_all(header + rest)

    def numbers(self, *, ends: bool = True) -> tuple[int, int, int]:
        """StatSN (used up by what ends a command), ExpCmdSN, MaxCmdSN."""
        stat_sn = self.stat_sn
        self.stat_sn += ends
        # What was once allowed stays allowed.
        self.max_cmd_sn = max(self.max_cmd_sn, self.exp_cmd_sn + self.window - 1)
        return stat_sn, self.exp_cmd_sn, self.max_cmd_sn

    async def login(self, answers: dict[str, str] | None = None) -> list[Command]:
        """Let the initiator in without CHAP. ``answers``: to its keys, beside the necessary ones."""
        requests = []
        while True:
            request = await self.receive()
            requests.append(request)
            stage, following = request.flags >> 2 & 3, request.flags & 3
            keys = {"AuthMethod": "None"} if stage == 0 else (answers or {})
            await self.answer_login(request, flags=0x80 | stage << 2 | following, keys=keys)
            if following == 3:
                self.digests = (
                    keys.get("HeaderDigest") == "CRC32C",
                    keys.get("DataDigest") == "CRC32C",
                )
                return requests

    async def answer_login(
        self, request: Command, *, flags: int, keys: dict[str, str] | None = None, status: int = 0
    ) -> None:
        """One login response."""
        text = "".join(f"{key}={value}\0" for key, value in (keys or {}).items()).encode()
        isid = request.lun[:6] + (b"\0\7" if flags & 0x83 == 0x83 else b"\0\0")
        words = (0, *self.numbers(), status << 16)
        await self.send(pdu(0x23, flags=flags, lun=isid, itt=request.itt, words=words, data=text))

    async def serve_until_read(self) -> Command:
        """Answer what a disk is asked first; return the first command that is not among that."""
        while True:
            command = await self.receive()
            if not await self.answer(command):
                return command

    async def answer(self, command: Command) -> bool:
        """Answer as a plain disk of BLOCKS blocks would; False for a read or anything that is no such question."""
        if command.opcode != 0x01:
            return False
        name = command.cdb[0]
        if name == 0x00:
            await self.respond(command)
        elif name == 0x12 and not command.cdb[1]:
            await self.data(command, bytes(36), ends=True)
        elif name == 0x12:
            await self.respond(command, status=2, sense=UNSUPPORTED)
        elif name == 0xA0:
            await self.data(command, struct.pack(">II8s", 8, 0, bytes(8)), ends=True)
        elif name == 0x9E and command.cdb[1] & 0x1F == 0x10:
            await self.data(command, struct.pack(">QI20x", BLOCKS - 1, BLOCK), ends=True)
        else:
            return False
        return True

    async def data(
        self,
        command: Command,
        data: bytes,
        *,
        number: int = 0,
        offset: int = 0,
        ends: bool = False,
        spoil: str = "",
    ) -> None:
        """A Data-In; ``ends``: with the status GOOD, and the residual count that follows from it."""
        missing = command.expected - offset - len(data) if ends else 0
        flags = (0x81 if ends else 0x00) | (0x02 if missing > 0 else 0)
        words = (NO_TAG, *self.numbers(ends=ends), number, offset, max(missing, 0))
        await self.send(
            pdu(0x25, flags=flags, itt=command.itt, words=words, data=data), spoil=spoil
        )

    async def respond(self, command: Command, *, status: int = 0, sense: bytes = b"") -> None:
        """A SCSI response."""
        data = struct.pack(">H", len(sense)) + sense if sense else b""
        words = (0, *self.numbers())
        await self.send(pdu(0x21, byte3=status, itt=command.itt, words=words, data=data))

    async def hold(self) -> None:
        """Take what comes, answer nothing but a logout, until the initiator goes."""
        while True:
            command = await self.receive()
            if command.opcode == 0x06:
                await self.send(pdu(0x26, itt=command.itt, words=(0, *self.numbers())))


Script = Callable[[Connection], Awaitable[None]]


@asynccontextmanager
async def fake_target(script: Script) -> AsyncIterator[Portal]:
    """Plays ``script`` for each connection; one that the initiator ends is over."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                await script(Connection(stream))
            except (trio.BrokenResourceError, trio.EndOfChannel):
                return

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield Portal("127.0.0.1", listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def content(lba: int, blocks: int) -> bytes:
    """What the fake disk holds."""
    return b"".join(struct.pack(">Q", at) * (BLOCK // 8) for at in range(lba, lba + blocks))


def wanted(command: Command) -> bytes:
    """The right answer to a READ(16)."""
    lba, blocks = struct.unpack(">QI", command.cdb[2:14])
    return content(lba, blocks)
