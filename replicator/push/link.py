# SPDX-License-Identifier: AGPL-3.0-or-later
"""A source's way to its receiver: reach it, prove itself, speak messages."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, Protocol

import trio

from replicator.config import Config
from replicator.credentials import Proof, SourceCredentials
from replicator.errors import AuthenticationError, UsageError
from replicator.nursery import flat_nursery
from replicator.push.connection import Connection, ConnectionLostError
from replicator.push.schedule import beat_s
from replicator.wire import messages as m
from replicator.wire.framing import MessageStream

_logger = logging.getLogger(__name__)

#: How long the first contact with the receiver may take, the proof included, seconds.
CONNECT_S: Final = 15
#: ... and each later one: an attempt that was made while the network was away must not outlast its return by much.
RECONNECT_S: Final = 3
#: What the kernel takes ahead of what the line has room for. trio's own 16 KiB would wake this side eight times a megabyte.
UNSENT_BYTES: Final = 1 << 20


class Wrapper(Protocol):
    """What is put around each connection, below all else: a throttle."""

    def wrap(self, stream: trio.abc.Stream) -> trio.abc.Stream:
        """The stream to use in place of ``stream``, which it owns."""


class Link:
    """The way to the receiver that ``config`` names. One object a process: it remembers what worked."""

    def __init__(
        self, config: Config, credentials: SourceCredentials, throttle: Wrapper | None = None
    ) -> None:
        self._host = config.dr_host
        self._port = config.dr_port
        self._timeout_s = config.dr_timeout
        self._credentials = credentials
        self._throttle = throttle
        self._congestion = config.dr_congestion
        self._reached = False

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        """A session with the receiver, ended on leaving.

        Raises ConnectionLostError where the line cannot be made or breaks, AuthenticationError where the two sides
        do not accept each other, WireError where the other side breaks the protocol; what the body raises comes
        through unchanged.
        """
        stream = await self._open()
        async with MessageStream(stream, m.LIMITS) as framed:
            connection = Connection(framed)
            async with flat_nursery() as nursery:
                nursery.start_soon(connection.read_replies)
                nursery.start_soon(connection.ping, beat_s(self._timeout_s))
                try:
                    yield connection
                finally:
                    nursery.cancel_scope.cancel()

    def _tune(self, stream: trio.SocketStream) -> None:
        """What a long push over any distance wants of TCP, as far as this system has it."""
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if self._congestion == "system":
            return
        name = "bbr" if self._congestion == "auto" else self._congestion
        try:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            # Asked for by name, it was checked at the start; else the system's own will do.
            _logger.debug("TCP goes on with the system's congestion control: %s: %s", name, error)

    async def _open(self) -> trio.abc.Stream:
        """A stream on which this side has proved itself, by the first proof that is accepted."""
        *others, last = await self._credentials.proofs()
        for proof in others:
            try:
                return await self._try(proof)
            except AuthenticationError as error:
                _logger.debug("%s: %s", proof.name, error)
        return await self._try(last)

    async def _try(self, proof: Proof) -> trio.abc.Stream:
        where = f"{self._host}:{self._port}"
        limit_s = RECONNECT_S if self._reached else CONNECT_S
        deadline = trio.current_time() + limit_s
        try:
            with trio.fail_at(deadline):
                transport: trio.abc.Stream = await trio.open_tcp_stream(self._host, self._port)
        except (OSError, trio.TooSlowError) as error:
            raise ConnectionLostError(
                f"cannot reach the receiver at {where}: {_why(error, limit_s)}"
            ) from error
        if isinstance(transport, trio.SocketStream):
            self._tune(transport)
        if self._throttle is not None:
            transport = self._throttle.wrap(transport)
        try:
            stream = await proof.prove(
                transport,
                deadline_s=max(0.0, deadline - trio.current_time()),
                idle_timeout_s=self._timeout_s,
            )
        except trio.BrokenResourceError as error:
            raise ConnectionLostError(
                f"{where}: the line broke while authenticating: {error}"
            ) from error
        self._reached = True
        self._credentials.taken(proof)
        return stream


def check_congestion(name: str) -> None:
    """Raise UsageError unless this process may use the congestion control that ``dr_congestion`` names."""
    if name in ("auto", "system"):
        return
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
            try:
                names = ", ".join(allowed.read_text("ascii").split())
            except OSError:
                names = "not known"
            raise UsageError(
                f"dr_congestion: this system does not let us use {name} ({error.strerror}); allowed: {names}"
            ) from None


def _why(error: BaseException, limit_s: int) -> str:
    """Why no connection could be made, for people: what the attempts failed of, each reason once."""
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {limit_s} s"
    return ", ".join(dict.fromkeys(_reason(attempt) for attempt in _attempts(error)))


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)  # trio's own text repeats the address
    return str(error) or type(error).__name__


def _attempts(error: BaseException) -> Iterator[BaseException]:
    """The errors of the single attempts: trio sums them up in one whose cause is the error, or a group of them."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _attempts(inner)
    elif isinstance(error, OSError) and error.errno is None and error.__cause__ is not None:
        yield from _attempts(error.__cause__)
    else:
        yield error


__all__ = ["CONNECT_S", "RECONNECT_S", "Link", "Wrapper", "check_congestion"]
