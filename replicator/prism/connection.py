# SPDX-License-Identifier: AGPL-3.0-or-later
"""HTTP/1.1 over TLS to one host, on trio: connections that are kept, deadlines, bounded answers.

Knows nothing of accounts, retries or what the bodies mean.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h11
import trio

from replicator.errors import UsageError
from replicator.nursery import flat_nursery
from replicator.prism.errors import (
    PrismAnswerError,
    PrismError,
    PrismTlsError,
    PrismUnreachableError,
)

#: Connections to one host at once.
PARALLEL_MAX = 5
#: An idle connection is not used again after so long: the server may be closing it.
IDLE_S = 20.0
BODY_MAX = 64 << 20
_HEADERS_MAX = 64 << 10
_HEADERS_COUNT_MAX = 200
_RECEIVE = 64 << 10
#: How long a server that stopped taking a body may take to say why.
_LAST_WORDS_S = 5.0

Headers = Sequence[tuple[str, str]]
#: Makes a connection to a host and a port, without TLS. Raises OSError.
Dial = Callable[[str, int], Awaitable[trio.abc.Stream]]
#: A body, piece by piece; a piece is good until the next one is asked for.
Pieces = AsyncIterable[bytes | memoryview]
_BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request. ``target``: path and query, encoded."""

    method: str
    target: str
    headers: Headers = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer, read whole. Header names are in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """The first header of that name."""
        return next((value for key, value in self.headers if key == name), None)


class StaleError(Exception):
    """A connection that was kept had been closed by the server: nothing was answered on it."""


class NotSentError(PrismUnreachableError):
    """No connection could be made: nothing was asked."""


def make_tls(ca: Path | None, *, insecure: bool) -> ssl.SSLContext:
    """What checks certificates: against ``ca``, else the system's authorities; ``insecure``: nothing is checked."""
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except OSError as error:  # ssl.SSLError is one: a file that holds no certificate
        reason = error.strerror or getattr(error, "reason", None) or "no certificate in it"
        raise UsageError(f"prism_ca_cert: cannot use {ca}: {reason}") from None
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Wire:
    """One connection."""

    def __init__(self, stream: trio.SSLStream[trio.abc.Stream]) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADERS_MAX)
        self.used = False
        self.heard = False  # of this request's answer
        self.ended = False
        self.idle_since = 0.0

    async def send(self, request: HttpRequest) -> None:
        head = h11.Request(
            method=request.method, target=request.target, headers=list(request.headers)
        )
        data = self.http.send(head) or b""
        if request.body:
            data += self.http.send(h11.Data(data=request.body)) or b""
        data += self.http.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)

    async def send_pieces(self, request: HttpRequest, pieces: Pieces, gap_s: float) -> None:
        """A request whose Content-Length is in its headers, and its body; nothing of it is kept. ``gap_s``: for each piece."""
        head = h11.Request(
            method=request.method, target=request.target, headers=list(request.headers)
        )
        await self.stream.send_all(self.http.send(head) or b"")
        async for piece in pieces:
            # h11 only counts: the bytes go as they are.
            data = h11.Data(data=piece)  # type: ignore[arg-type]
            for part in self.http.send_with_data_passthrough(data) or ():
                with trio.fail_after(gap_s):
                    await self.stream.send_all(part)
        await self.stream.send_all(self.http.send(h11.EndOfMessage()) or b"")

    async def head(self) -> h11.Response:
        """The answer's first part."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event
            if isinstance(event, h11.InformationalResponse):
                continue
            raise trio.BrokenResourceError

    async def data(self) -> AsyncGenerator[bytes, None]:
        """The body, piece by piece."""
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise trio.BrokenResourceError

    async def _event(self) -> h11.Event | type[h11.PAUSED]:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            data = await self.stream.receive_some(_RECEIVE)
            self.heard = self.heard or bool(data)
            self.ended = not data
            self.http.receive_data(bytes(data))
        if isinstance(event, (h11.Response, h11.InformationalResponse)) and (
            len(event.headers) > _HEADERS_COUNT_MAX
        ):
            raise h11.RemoteProtocolError("too many headers")
        return event  # type: ignore[return-value]  # NEED_DATA is gone: the loop above

    def renew(self) -> bool:
        """Make it ready for another request; False where it cannot be used again."""
        if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
            return False
        self.http.start_next_cycle()
        self.used, self.heard = True, False
        self.idle_since = trio.current_time()
        return True

    async def close(self) -> None:
        await trio.aclose_forcefully(self.stream)


class Connections:
    """Up to PARALLEL_MAX connections to ``host``, kept and used again; further requests wait for one.

    ``what`` is the host's part for messages: "Prism Central", "the Element of …". Use from any number of tasks; a request that
    is cancelled closes its connection.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext,
        *,
        what: str,
        connect_timeout_s: float,
        dial: Dial = trio.open_tcp_stream,
    ) -> None:
        self.host = host
        self.port = port
        self.where = f"{what} {host}:{port}"
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._dial = dial
        self._idle: list[_Wire] = []
        self._slots = trio.Semaphore(PARALLEL_MAX)
        self._closed = False

    async def exchange(
        self, request: HttpRequest, *, timeout_s: float, once: bool = False
    ) -> HttpAnswer:
        """Send one request, and read its answer whole, within ``timeout_s`` of its being sent.

        ``once``: the request is sent at most once, so on a new connection; else a kept connection on which no answer comes is
        taken for one that the server had closed, and the request is sent again.
        Raises NotSentError (no connection), PrismTlsError, PrismUnreachableError (it may have been done) and PrismAnswerError
        (no HTTP, or more than BODY_MAX).
        """
        async with self._slots:
            while True:
                wire = await self._wire(fresh=once)
                try:
                    return await self._exchange(wire, request, timeout_s)
                except StaleError:
                    continue  # each such try uses up an idle connection: there are few

    async def _exchange(self, wire: _Wire, request: HttpRequest, timeout_s: float) -> HttpAnswer:
        kept = False
        try:
            with trio.fail_after(timeout_s):
                head = await self._ask(wire, request)
                whole = await self._whole(wire)
            kept = wire.renew()
            return HttpAnswer(head.status_code, _decoded(head), whole)
        except trio.TooSlowError:
            raise PrismUnreachableError(
                f"{self.where}: no answer to {request.method} within {timeout_s:g} s"
            ) from None
        except _BROKEN as error:
            raise self._broken(wire, request.method, error) from None
        finally:
            await self._put_back(wire, kept=kept)

    async def _ask(self, wire: _Wire, request: HttpRequest) -> h11.Response:
        try:
            await wire.send(request)
            return await wire.head()
        except _BROKEN:
            if wire.used and not wire.heard:
                raise StaleError from None
            raise

    async def _whole(self, wire: _Wire) -> bytes:
        pieces, length = [], 0
        async with aclosing(wire.data()) as data:
            async for piece in data:
                length += len(piece)
                if length > BODY_MAX:
                    raise PrismAnswerError(
                        f"{self.where}: an answer of more than {BODY_MAX >> 20} MiB"
                    )
                pieces.append(piece)
        return b"".join(pieces)

    @asynccontextmanager
    async def streamed(
        self, request: HttpRequest, *, timeout_s: float
    ) -> AsyncGenerator[tuple[HttpAnswer, AsyncGenerator[bytes, None]], None]:
        """An answer whose body is read in pieces, however long: the head (its body is empty), and the pieces.

        ``timeout_s`` is for the head, and for each piece. Errors as for ``exchange``.
        """
        async with self._slots:
            wire = await self._wire(fresh=True)
            try:
                try:
                    with trio.fail_after(timeout_s):
                        head = await self._ask(wire, request)
                except trio.TooSlowError:
                    raise PrismUnreachableError(
                        f"{self.where}: no answer to {request.method} within {timeout_s:g} s"
                    ) from None
                except _BROKEN as error:
                    raise self._broken(wire, request.method, error) from None
                async with aclosing(self._pieces(wire, timeout_s)) as pieces:
                    yield HttpAnswer(head.status_code, _decoded(head)), pieces
            finally:
                await self._put_back(wire, kept=False)

    async def upload(
        self, request: HttpRequest, pieces: Pieces, *, timeout_s: float, answer_s: float
    ) -> HttpAnswer:
        """Send one request with a body of any length, once, on a connection of its own; its answer is read whole.

        ``timeout_s`` is for each piece that the server takes, ``answer_s`` for its answer after the last. Where it takes no more
        of them, what it says about that is the answer. Errors as for ``exchange``, and what ``pieces`` raises.
        """
        async with self._slots:
            wire = await self._wire(fresh=True)
            try:
                return await self._upload(wire, request, pieces, timeout_s, answer_s)
            finally:
                await self._put_back(wire, kept=False)

    async def _upload(
        self, wire: _Wire, request: HttpRequest, pieces: Pieces, timeout_s: float, answer_s: float
    ) -> HttpAnswer:
        answers: list[HttpAnswer] = []
        errors: list[Exception] = []
        heard = trio.Event()
        sending = trio.CancelScope()

        async def listen() -> None:
            try:
                head = await wire.head()
                whole = await self._whole(wire)
                answers.append(HttpAnswer(head.status_code, _decoded(head), whole))
            except (*_BROKEN, PrismAnswerError) as error:
                errors.append(error)
            heard.set()
            sending.cancel()  # an answer in the middle is a refusal: nobody takes the rest

        async with flat_nursery() as nursery:
            nursery.start_soon(listen)
            wait_s = answer_s
            with sending:
                try:
                    await wire.send_pieces(request, pieces, timeout_s)
                except trio.TooSlowError:
                    raise PrismUnreachableError(
                        f"{self.where}: nothing more of the file was taken within {timeout_s:g} s"
                    ) from None
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    errors.append(error)
                    wait_s = _LAST_WORDS_S
            with trio.move_on_after(wait_s):
                await heard.wait()
            nursery.cancel_scope.cancel()
        if answers:
            return answers[0]
        if not errors:
            raise PrismUnreachableError(
                f"{self.where}: no answer to {request.method} within {answer_s:g} s"
            )
        if isinstance(errors[0], PrismAnswerError):
            raise errors[0]
        raise self._broken(wire, request.method, errors[0]) from None

    async def _pieces(self, wire: _Wire, timeout_s: float) -> AsyncGenerator[bytes, None]:
        async with aclosing(wire.data()) as data:
            while True:
                try:
                    with trio.fail_after(timeout_s):
                        piece = await anext(data, None)
                except trio.TooSlowError:
                    raise PrismUnreachableError(
                        f"{self.where}: nothing more of the file within {timeout_s:g} s"
                    ) from None
                except _BROKEN as error:
                    raise self._broken(wire, "GET", error) from None
                if piece is None:
                    return
                yield piece

    async def _wire(self, *, fresh: bool = False) -> _Wire:
        if self._closed:
            raise trio.ClosedResourceError
        while self._idle and not fresh:
            wire = self._idle.pop()  # the latest: it is the likeliest to be alive
            if trio.current_time() - wire.idle_since <= IDLE_S:
                return wire
            await wire.close()
        return await self._connect()

    async def _connect(self) -> _Wire:
        try:
            with trio.fail_after(self._connect_timeout_s):
                plain = await self._dial(self.host, self.port)
                stream = trio.SSLStream(
                    plain, self._tls, server_hostname=self.host, https_compatible=True
                )
                try:
                    await stream.do_handshake()
                except BaseException:
                    await trio.aclose_forcefully(plain)
                    raise
        except trio.TooSlowError:
            raise NotSentError(
                f"{self.where}: no connection within {self._connect_timeout_s:g} s"
            ) from None
        except trio.BrokenResourceError as error:
            raise self._handshake_error(error.__cause__ or error) from None
        except (ssl.SSLError, ssl.CertificateError) as error:
            raise self._handshake_error(error) from None
        except (OSError, UnicodeError, ValueError) as error:
            raise NotSentError(f"{self.where}: cannot connect: {_reason(error)}") from None
        return _Wire(stream)

    def _handshake_error(self, error: BaseException) -> PrismUnreachableError | PrismTlsError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return PrismTlsError(
                f"{self.where}: its certificate is not accepted: {error.verify_message};"
                " give its authority as prism_ca_cert, or set prism_insecure in a lab"
            )
        if isinstance(error, ssl.SSLError):
            return PrismTlsError(
                f"{self.where}: no TLS: {error.reason or 'the handshake failed'};"
                " check host and port (prism_central, prism_port)"
            )
        return NotSentError(f"{self.where}: the TLS handshake broke: {_reason(error)}")

    def _broken(self, wire: _Wire, method: str, error: BaseException) -> PrismError:
        if isinstance(error, h11.RemoteProtocolError) and not wire.ended:
            return PrismAnswerError(f"{self.where}: this is not HTTP/1.1: {error}")
        why = "the server ended it" if wire.ended else _reason(error)
        return PrismUnreachableError(f"{self.where}: the connection broke during {method}: {why}")

    async def _put_back(self, wire: _Wire, *, kept: bool) -> None:
        if kept and not self._closed:
            self._idle.append(wire)
        else:
            await wire.close()

    async def aclose(self) -> None:
        """Close every idle connection; those in use close when their request ends."""
        self._closed = True
        with trio.CancelScope(shield=True):
            while self._idle:
                await self._idle.pop().close()


def _decoded(head: h11.Response) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in head.headers)


def _reason(error: BaseException) -> str:
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(error, OSError):
        return _reason(cause)
    if isinstance(cause, BaseExceptionGroup):
        return _reason(cause.exceptions[0])
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "it was closed" if isinstance(error, trio.BrokenResourceError) else str(error)
