# SPDX-License-Identifier: AGPL-3.0-or-later
"""The client's side of NBD negotiation: from a fresh connection to an export ready for requests."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import trio

from replicator.nbd.protocol import (
    GREETING,
    INIT_MAGIC,
    OPTION_LENGTH_MAX,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REPLY_ERROR,
    U32,
    ExportInfo,
    HandshakeFlag,
    Info,
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    Option,
    Reader,
    Reply,
    decode_info,
    encode_contexts,
    encode_go,
    encode_option,
)

#: More replies than this to one option is a server gone wrong, not a long list.
REPLIES_MAX = 1 << 16


async def receive_exactly(sock: trio.socket.SocketType, count: int) -> bytes:
    """Read exactly ``count`` bytes (the caller has bounded it); raises NbdDisconnectedError.

    Cancellation loses what was read so far: the connection is of no use afterwards.
    """
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = await sock.recv_into(view)
        if not received:
            raise NbdDisconnectedError("the NBD server closed the connection")
        view = view[received:]
    return bytes(data)


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    """Send everything. After cancellation the connection is of no use."""
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]


async def negotiate(
    sock: trio.socket.SocketType, export: str, contexts: Sequence[str]
) -> tuple[ExportInfo, dict[str, int]]:
    """Negotiate structured replies, ``contexts`` and the export; the result is ready for requests.

    Returns the export's facts and the id of each context that the server has (asking for one that
    it has not is no error here). Raises NbdError. Cancellation leaves the connection of no use.
    """
    head = await receive_exactly(sock, GREETING.size)
    init, option_magic, flags = GREETING.unpack(head)
    if init != INIT_MAGIC or option_magic != OPTION_MAGIC:
        raise NbdProtocolError("not an NBD server of the newstyle kind", errno.EINVAL)
    if not flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise NbdProtocolError("the NBD server is too old (no fixed newstyle)", errno.EINVAL)
    await send_all(sock, U32.pack(flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)))
    await _simple_option(sock, Option.STRUCTURED_REPLY)
    ids = await _set_contexts(sock, export, contexts) if contexts else {}
    return await _go(sock, export), ids


async def _read_reply(sock: trio.socket.SocketType, option: Option) -> tuple[int, bytes]:
    head = await receive_exactly(sock, OPTION_REPLY.size)
    magic, answered, reply, length = OPTION_REPLY.unpack(head)
    if magic != OPTION_REPLY_MAGIC or answered != option:
        raise NbdProtocolError("negotiation reply to another question", errno.EINVAL)
    if length > OPTION_LENGTH_MAX:
        raise NbdProtocolError(f"negotiation reply of {length} bytes", errno.EINVAL)
    payload = await receive_exactly(sock, length) if length else b""
    if reply & REPLY_ERROR:
        raise _refusal(option, reply, payload)
    return reply, payload


def _refusal(option: Option, reply: int, payload: bytes) -> NbdError:
    said = payload.decode(errors="replace").replace("\n", " ")[:200]
    code = errno.ENOENT if reply == Reply.ERR_UNKNOWN else errno.EINVAL
    what = f"the NBD server refused {option.name} ({reply - REPLY_ERROR})"
    return NbdError(f"{what}: {said}" if said else what, code)


async def _simple_option(sock: trio.socket.SocketType, option: Option) -> None:
    await send_all(sock, encode_option(option))
    reply, _ = await _read_reply(sock, option)
    if reply != Reply.ACK:
        raise NbdProtocolError(f"reply {reply} to {option.name}", errno.EINVAL)


async def _set_contexts(
    sock: trio.socket.SocketType, export: str, contexts: Sequence[str]
) -> dict[str, int]:
    option = Option.SET_META_CONTEXT
    await send_all(sock, encode_option(option, encode_contexts(export, contexts)))
    ids: dict[str, int] = {}
    for _ in range(len(contexts) + 1):
        reply, payload = await _read_reply(sock, option)
        if reply == Reply.ACK:
            return ids
        reader = Reader(payload)
        number = reader.u32()
        name = reader.text(len(payload) - 4)
        if reply != Reply.META_CONTEXT or name not in contexts or name in ids:
            raise NbdProtocolError(f"reply {reply} to {option.name}", errno.EINVAL)
        ids[name] = number
    raise NbdProtocolError(f"no end of replies to {option.name}", errno.EINVAL)


async def _go(sock: trio.socket.SocketType, export: str) -> ExportInfo:
    await send_all(sock, encode_option(Option.GO, encode_go(export, (Info.BLOCK_SIZE,))))
    info: ExportInfo | None = None
    has_size = False
    for _ in range(REPLIES_MAX):
        reply, payload = await _read_reply(sock, Option.GO)
        if reply == Reply.ACK:
            if info is None or not has_size:
                raise NbdProtocolError("the NBD server did not say the size", errno.EINVAL)
            return info
        if reply != Reply.INFO:
            raise NbdProtocolError(f"reply {reply} to GO", errno.EINVAL)
        has_size = has_size or payload[:2] == Info.EXPORT.to_bytes(2, "big")
        info = decode_info(payload, info)
    raise NbdProtocolError("no end of replies to GO", errno.EINVAL)
