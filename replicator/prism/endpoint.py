# SPDX-License-Identifier: AGPL-3.0-or-later
"""One host of Prism that is asked for JSON: the account, cookies, request ids, the rate cap, tries again, errors by class.

Knows paths and bodies of no API; v3 and v4 are built on it.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode
from uuid import UUID, uuid4

import msgspec
import trio

from replicator import __version__
from replicator.errors import UsageError
from replicator.prism.answers import Node
from replicator.prism.connection import (
    Connections,
    Dial,
    Headers,
    HttpAnswer,
    HttpRequest,
    NotSentError,
    Pieces,
    make_tls,
)
from replicator.prism.errors import (
    PrismAnswerError,
    PrismAuthError,
    PrismError,
    PrismTlsError,
    PrismUnreachableError,
)
from replicator.prism.meters import Meters, endpoint_name
from replicator.prism.outage import Outage
from replicator.prism.problems import clean, problem, read_error, secrets_in
from replicator.prism.rate import TokenBucket
from replicator.prism.retry import Passing, Tries, passing, retry_after_s
from replicator.prism.settings import Account, PrismSettings
from replicator.prism.types import Cluster

#: An account that is refused so often in a row is not tried again: Prism would lock it.
REFUSALS_MAX: Final = 3
_COOKIES_MAX: Final = 20
_COOKIE_MAX: Final = 4096
_AGENT: Final = f"replctl/{__version__}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer. ``body``: the JSON, None where there is none. ``where``: for errors about it."""

    status: int
    body: Any
    etag: str | None
    where: str
    headers: tuple[tuple[str, str], ...] = ()

    def node(self) -> Node:
        """The body as an object. Raises PrismAnswerError."""
        return Node(self.body, self.where)

    def header(self, name: str) -> str | None:
        """The first header of that name, in lower case."""
        return next((value for key, value in self.headers if key == name), None)


class Endpoint:
    """One host. ``account`` None: every call brings its own ``session``. Use from any number of tasks.

    Calls raise PrismError; cancelled, what was asked may still happen.
    """

    def __init__(
        self,
        settings: PrismSettings,
        host: str,
        port: int,
        *,
        what: str,
        account: Account | None,
        tls: ssl.SSLContext,
        meters: Meters,
        dial: Dial = trio.open_tcp_stream,
    ) -> None:
        self.host = host
        self.port = port
        self.where = f"{what} {host}:{port}"
        self._waits = settings.waits
        self._account = account
        self._meters = meters
        self._bucket = TokenBucket(settings.rate_rpm, host)
        self._outage = Outage(self.where)
        self._connections = Connections(
            host,
            port,
            tls,
            what=what,
            connect_timeout_s=settings.waits.connect_s,
            dial=dial,
        )
        self._credentials = () if account is None else _credentials(account)
        self._secrets = () if account is None else tuple(filter(None, _secrets(account)))
        self._cookies: dict[str, str] = {}
        self._refusals = 0
        self._trusted = False
        self._signing_in = trio.Lock()

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: Mapping[str, str | int] | None = None,
        etag: str | None = None,
        request_id: UUID | None = None,
        session: str | None = None,
        repeat: bool = True,
        timeout_s: float | None = None,
        retry_s: float | None = None,
    ) -> Answer:
        """Ask, again where that may help (class and times of retry.py), and return the answer of a success.

        ``path``: encoded (``segment``) and without query. ``body`` becomes JSON. ``etag``: sent as If-Match. ``request_id``: the
        NTNX-Request-Id of every try, a new one if None. ``session``: a Cookie header in place of the account. ``repeat``
        False: what may have been done is not asked for again (PrismUnreachableError says so). ``timeout_s`` for each try;
        ``retry_s`` for all, 0 for one try.
        Raises by class: PrismUnreachableError, PrismTlsError, PrismAuthError, PrismPermissionError, PrismNotFoundError,
        PrismConflictError (ETag or spec_version), PrismRateLimitedError, PrismRefusedError, PrismAnswerError.
        """
        target = path if not query else f"{path}?{urlencode(query, quote_via=quote)}"
        data = b"" if body is None else msgspec.json.encode(body)
        headers = [
            ("Host", self._host_header()),
            ("Accept", "application/json"),
            ("User-Agent", _AGENT),
            ("NTNX-Request-Id", str(request_id or uuid4())),
        ]
        if data:
            headers.append(("Content-Type", "application/json"))
        if data or method in {"POST", "PUT"}:
            headers.append(("Content-Length", str(len(data))))
        if etag is not None:
            headers.append(("If-Match", etag))
        request = HttpRequest(method, target, headers, data)
        secrets = (*self._secrets, *secrets_in(body))
        tries = Tries(trio.current_time(), self._waits.retry_s if retry_s is None else retry_s)
        while True:
            told_s = None
            try:
                reply = await self._signed(
                    request, session, timeout_s or self._waits.request_s, once=not repeat
                )
                if 200 <= reply.status < 300:
                    self._outage.answered()
                    return self._answer(method, path, reply)
                self._meters.count_error(endpoint_name(path))
                error, kind = self._failure(method, path, reply, secrets)
                told_s = retry_after_s(reply.header("retry-after"))
                if kind is Passing.NO:
                    self._outage.answered()
            except PrismUnreachableError as failure:
                self._meters.count_error(endpoint_name(path))
                error, kind = failure, Passing.AWAY
            except PrismTlsError:
                self._meters.count_error(endpoint_name(path))
                raise
            if kind is Passing.BUSY:
                self._bucket.hold(min(told_s or 1.0, 60.0))
            if kind is not Passing.BUSY and not repeat and not isinstance(error, NotSentError):
                raise error
            wait_s = tries.wait_s(kind, trio.current_time(), told_s)
            if wait_s is None:
                raise error
            self._outage.trying_again(kind, error, wait_s, trio.current_time())
            await trio.sleep(wait_s)

    async def whole_file(self, path: str, what: str) -> AsyncGenerator[bytes, None]:
        """The bytes of a file, piece by piece. Raises PrismAnswerError at the end of one that is shorter than was said."""
        async with self.download(path) as (length, pieces):
            came = 0
            async for piece in pieces:
                came += len(piece)
                yield piece
            if length is not None and came != length:
                raise PrismAnswerError(f"{self.where}: {what} ended after {came} of {length} bytes")

    @asynccontextmanager
    async def download(
        self, path: str, *, timeout_s: float | None = None
    ) -> AsyncGenerator[tuple[int | None, AsyncGenerator[bytes, None]], None]:
        """A file: its length if that is told, and its bytes piece by piece. One try; errors as for ``call``."""
        timeout_s = timeout_s or self._waits.request_s
        await self._bucket.take()
        self._check_refusals()
        request = HttpRequest(
            "GET",
            path,
            [
                ("Host", self._host_header()),
                ("Accept", "application/octet-stream, application/json"),
                ("User-Agent", _AGENT),
                ("NTNX-Request-Id", str(uuid4())),
                *self._credentials,
            ],
        )
        self._meters.count_request(self.host, endpoint_name(path))
        async with self._connections.streamed(request, timeout_s=timeout_s) as (head, pieces):
            if head.status != 200:
                self._meters.count_error(endpoint_name(path))
                self._note(head.status)
                raise problem(self.where, "GET", path, head.status, read_error(b"", ""))
            length = head.header("content-length") or ""
            yield (int(length) if length.isascii() and length.isdigit() else None), pieces

    async def upload(
        self,
        path: str,
        pieces: Pieces,
        length: int,
        headers: Headers,
        *,
        answer_s: float,
    ) -> None:
        """PUT a file of ``length`` bytes, once. ``answer_s``: how long Prism may work on it after the last byte.

        Errors as for ``call``: PrismUnreachableError says that it may have been taken whole, in part, or not at all.
        """
        await self._bucket.take()
        self._check_refusals()
        request = HttpRequest(
            "PUT",
            path,
            [
                ("Host", self._host_header()),
                ("Accept", "application/json"),
                ("User-Agent", _AGENT),
                ("NTNX-Request-Id", str(uuid4())),
                ("Content-Type", "application/octet-stream"),
                ("Content-Length", str(length)),
                *headers,
                *self._credentials,
            ],
        )
        self._meters.count_request(self.host, endpoint_name(path))
        try:
            reply = await self._connections.upload(
                request, pieces, timeout_s=self._waits.request_s, answer_s=answer_s
            )
        except PrismError:
            self._meters.count_error(endpoint_name(path))
            raise
        self._note(reply.status)
        if not 200 <= reply.status < 300:
            self._meters.count_error(endpoint_name(path))
            raise self._failure("PUT", path, reply, self._secrets)[0]

    async def aclose(self) -> None:
        """Close its connections."""
        await self._connections.aclose()

    async def _signed(
        self, request: HttpRequest, session: str | None, timeout_s: float, *, once: bool
    ) -> HttpAnswer:
        """One try, with the cookie in place of the account, and with the account once where the cookie is refused."""
        if session is not None or self._account is None:
            signed = () if session is None else (("Cookie", session),)
            return await self._send(request, signed, timeout_s, once=once)
        if not self._trusted:
            # One at a time until the account has been accepted: a wrong password must not be sent by all at once.
            async with self._signing_in:
                return await self._as_account(request, timeout_s, once=once)
        return await self._as_account(request, timeout_s, once=once)

    async def _as_account(
        self, request: HttpRequest, timeout_s: float, *, once: bool
    ) -> HttpAnswer:
        self._check_refusals()
        if self._cookies:
            cookie = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
            reply = await self._send(request, (("Cookie", cookie),), timeout_s, once=once)
            if reply.status != 401:
                self._note(reply.status)
                self._keep_cookies(reply)
                return reply
            self._cookies.clear()
        reply = await self._send(request, self._credentials, timeout_s, once=once)
        self._note(reply.status)
        self._keep_cookies(reply)
        return reply

    async def _send(
        self, request: HttpRequest, signed: Headers, timeout_s: float, *, once: bool
    ) -> HttpAnswer:
        await self._bucket.take()
        self._meters.count_request(self.host, endpoint_name(request.target))
        whole = HttpRequest(
            request.method, request.target, [*request.headers, *signed], request.body
        )
        return await self._connections.exchange(whole, timeout_s=timeout_s, once=once)

    def _check_refusals(self) -> None:
        if self._refusals >= REFUSALS_MAX:
            raise PrismAuthError(
                f"{self.where}: the account was refused {self._refusals} times in a row and is not tried again, so that"
                " Prism does not lock it: check user and password (or the API key), then start again"
            )

    def _note(self, status: int) -> None:
        if status == 401:
            self._refusals += 1
            self._trusted = False
        elif status < 500 and status != 429:
            self._refusals = 0
            self._trusted = True

    def _keep_cookies(self, reply: HttpAnswer) -> None:
        if reply.status == 401 or (self._account is not None and self._account.api_key):
            return  # a key needs no session
        for name, value in reply.headers:
            if name != "set-cookie":
                continue
            pair = value.partition(";")[0].strip()
            key, equals, held = pair.partition("=")
            if not equals or not _is_cookie(key, held):
                continue
            if not held or "max-age=0" in value.lower().replace(" ", ""):
                self._cookies.pop(key, None)
            elif key in self._cookies or len(self._cookies) < _COOKIES_MAX:
                self._cookies[key] = held

    def _answer(self, method: str, path: str, reply: HttpAnswer) -> Answer:
        where = f"{self.where}: {method} {path}"
        body = None
        if reply.body:
            try:
                body = msgspec.json.decode(reply.body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                kind = clean(reply.header("content-type") or "no content type")
                raise PrismAnswerError(f"{where}: the answer is no JSON ({kind[:40]})") from None
        etag = reply.header("etag") or reply.header("x-ntnx-etag")
        return Answer(reply.status, body, etag, where, reply.headers)

    def _failure(
        self, method: str, path: str, reply: HttpAnswer, secrets: tuple[str, ...]
    ) -> tuple[PrismError, Passing]:
        said = read_error(reply.body, reply.header("content-type") or "")
        error = problem(self.where, method, path, reply.status, said, secrets=secrets)
        return error, passing(reply.status, said.words)

    def _host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Hosts:
    """Prism itself and the Elements behind it: one Endpoint each, made when it is first asked for."""

    def __init__(
        self,
        settings: PrismSettings,
        meters: Meters | None = None,
        dial: Dial = trio.open_tcp_stream,
    ) -> None:
        self.settings = settings
        self._dial = dial
        self.meters = meters or Meters()
        self._tls: ssl.SSLContext | None = None
        self._elements: dict[tuple[str, int, bool], Endpoint] = {}
        self.central = self._make(
            settings.host, settings.port, what="Prism", account=settings.account
        )

    def element(self, cluster: Cluster) -> Endpoint:
        """The Element of a cluster, with the Elements' account. Raises PrismError where its address is not known."""
        address = self.settings.element_address(cluster.uuid, cluster.name, cluster.address)
        if address is None:
            raise PrismError(
                f"cluster {cluster.name}: Prism does not know its address: set its virtual IP in Prism,"
                " or give it in prism_element"
            )
        return self.at(*address, name=cluster.name, account=self.settings.for_element())

    def at(self, host: str, port: int, *, name: str, account: Account | None) -> Endpoint:
        """The Element at an address; ``account`` None: for calls that bring their session."""
        key = (host, port, account is None)
        if key not in self._elements:
            self._elements[key] = self._make(
                host, port, what=f"Prism Element {name}", account=account
            )
        return self._elements[key]

    def _make(self, host: str, port: int, *, what: str, account: Account | None) -> Endpoint:
        if self._tls is None:
            self._tls = make_tls(self.settings.ca, insecure=self.settings.insecure)
        return Endpoint(
            self.settings,
            host,
            port,
            what=what,
            account=account,
            tls=self._tls,
            meters=self.meters,
            dial=self._dial,
        )

    async def aclose(self) -> None:
        """Close every connection."""
        for endpoint in (self.central, *self._elements.values()):
            await endpoint.aclose()


def segment(text: str) -> str:
    """One segment of a path, encoded: ids of tasks hold ``=`` and ``:``."""
    return quote(text, safe="")


def _credentials(account: Account) -> Headers:
    """The headers that sign a request. Raises UsageError for what HTTP cannot carry; it does not show it."""
    if account.api_key:
        if not (account.api_key.isascii() and account.api_key.isprintable()):
            raise UsageError("the API key for Prism holds characters that no key has")
        return (("X-ntnx-api-key", account.api_key.strip()),)
    if ":" in account.user:
        raise UsageError("user: a name with a colon cannot be used with Prism")
    pair = base64.b64encode(f"{account.user}:{account.password}".encode()).decode()
    return (("Authorization", f"Basic {pair}"),)


def _secrets(account: Account) -> tuple[str, ...]:
    pair = base64.b64encode(f"{account.user}:{account.password}".encode()).decode()
    return account.password, account.api_key, pair


def _is_cookie(name: str, value: str) -> bool:
    text = name + value
    return (
        bool(name)
        and len(text) <= _COOKIE_MAX
        and text.isascii()
        and text.isprintable()
        and not set(text) & set(' ;,\\"')
    )
