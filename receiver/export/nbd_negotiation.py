# SPDX-License-Identifier: AGPL-3.0-or-later
"""The server's side of NBD negotiation: which export, structured replies or not, allocation wanted
or not.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from replicator.disk import DiskView
from replicator.nbd.protocol import (
    BASE_ALLOCATION,
    BLOCK_SIZE_INFO,
    EXPORT_INFO,
    GREETING,
    INIT_MAGIC,
    OPTION,
    OPTION_LENGTH_MAX,
    OPTION_MAGIC,
    PAYLOAD_MAX,
    U16,
    U32,
    HandshakeFlag,
    Info,
    NbdDisconnectedError,
    NbdProtocolError,
    Option,
    Reply,
    TransmissionFlag,
    decode_contexts,
    decode_go,
    encode_name,
    encode_option_reply,
)

#: A client that asks more questions than this is not going to choose.
OPTIONS_MAX = 1000
CONTEXT_ID = 1
_BASE_QUERIES = (BASE_ALLOCATION, "base:")
_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.READ_ONLY
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.CAN_MULTI_CONN
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a client chose; ``context`` is the id of base:allocation, None if it is not wanted."""

    export: str
    structured: bool
    context: int | None


class Negotiation:
    """Fixed newstyle negotiation with one client."""

    def __init__(self, stream: trio.SocketStream, exports: Mapping[str, DiskView]) -> None:
        self._stream = stream
        self._exports = exports
        self._structured = False
        self._context: tuple[str, int] | None = None
        self._no_zeroes = False

    async def run(self) -> Chosen | None:
        """Negotiate; None if the client chose to leave. Raises NbdProtocolError,
        NbdDisconnectedError.
        """
        greeting = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        await self._stream.send_all(GREETING.pack(INIT_MAGIC, OPTION_MAGIC, greeting))
        flags = U32.unpack(await self._receive(U32.size))[0]
        if flags & ~int(greeting) or not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise NbdProtocolError(f"client flags {flags:#x}", errno.EINVAL)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        for _ in range(OPTIONS_MAX):
            magic, option, length = OPTION.unpack(await self._receive(OPTION.size))
            if magic != OPTION_MAGIC or length > OPTION_LENGTH_MAX:
                raise NbdProtocolError(f"option of {length} bytes", errno.EINVAL)
            payload = await self._receive(length)
            if option == Option.ABORT:
                await self._reply(option, Reply.ACK)
                return None
            if option == Option.EXPORT_NAME:
                return await self._export_name(payload)
            chosen = await self._option(option, payload)
            if chosen is not None:
                return chosen
        raise NbdProtocolError("too many options", errno.EINVAL)

    async def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = await self._stream.receive_some(count - len(data))
            if not piece:
                raise NbdDisconnectedError("the client left during negotiation")
            data += piece
        return bytes(data)

    async def _reply(self, option: int, reply: Reply, payload: bytes = b"") -> None:
        await self._stream.send_all(encode_option_reply(option, reply, payload))

    async def _option(self, option: int, payload: bytes) -> Chosen | None:
        """Answer one option; the result is set when it was GO and succeeded."""
        try:
            if option == Option.LIST:
                await self._list(payload)
            elif option in (Option.INFO, Option.GO):
                return await self._go(option, payload)
            elif option == Option.STRUCTURED_REPLY:
                await self._structured_reply(payload)
            elif option in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
                await self._contexts(option, payload)
            else:
                await self._reply(option, Reply.ERR_UNSUPPORTED)
        except NbdProtocolError:
            await self._reply(option, Reply.ERR_INVALID)
        return None

    async def _list(self, payload: bytes) -> None:
        if payload:
            raise NbdProtocolError("LIST with a payload", errno.EINVAL)
        for name in self._exports:
            await self._reply(Option.LIST, Reply.SERVER, encode_name(name))
        await self._reply(Option.LIST, Reply.ACK)

    async def _structured_reply(self, payload: bytes) -> None:
        if payload:
            raise NbdProtocolError("STRUCTURED_REPLY with a payload", errno.EINVAL)
        self._structured = True
        await self._reply(Option.STRUCTURED_REPLY, Reply.ACK)

    async def _contexts(self, option: int, payload: bytes) -> None:
        name, queries = decode_contexts(payload)
        if not self._structured:
            raise NbdProtocolError("contexts before structured replies", errno.EINVAL)
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._context = None
        if name not in self._exports:
            await self._reply(option, Reply.ERR_UNKNOWN)
            return
        # "base:" with nothing after it, and no query at all, are wildcards in LIST only.
        wanted = _BASE_QUERIES[: 1 if setting else 2]
        if any(query in wanted for query in queries) or (not setting and not queries):
            if setting:
                self._context = (name, CONTEXT_ID)
            number = CONTEXT_ID if setting else 0
            await self._reply(
                option, Reply.META_CONTEXT, U32.pack(number) + BASE_ALLOCATION.encode()
            )
        await self._reply(option, Reply.ACK)

    async def _go(self, option: int, payload: bytes) -> Chosen | None:
        name, _wanted = decode_go(payload)
        view = self._exports.get(name)
        if view is None:
            await self._reply(option, Reply.ERR_UNKNOWN, b"no export of that name")
            return None
        export = U16.pack(Info.EXPORT) + EXPORT_INFO.pack(view.size, _FLAGS)
        sizes = U16.pack(Info.BLOCK_SIZE) + BLOCK_SIZE_INFO.pack(1, 64 << 10, PAYLOAD_MAX)
        await self._reply(option, Reply.INFO, export)
        await self._reply(option, Reply.INFO, sizes)
        await self._reply(option, Reply.ACK)
        return self._chosen(name) if option == Option.GO else None

    async def _export_name(self, payload: bytes) -> Chosen:
        """The oldest way to choose; it has no way to say no but to hang up."""
        name = payload.decode(errors="replace")
        view = self._exports.get(name)
        if view is None:
            raise NbdProtocolError("no export of that name", errno.ENOENT)
        padding = b"" if self._no_zeroes else bytes(124)
        await self._stream.send_all(EXPORT_INFO.pack(view.size, _FLAGS) + padding)
        return self._chosen(name)

    def _chosen(self, name: str) -> Chosen:
        context = self._context[1] if self._context and self._context[0] == name else None
        return Chosen(name, self._structured, context)
