# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who asks: basic authentication, API keys, session cookies, the tokens of v4, and what the account's role allows.

Sessions and the rate of requests are kept in memory: after a restart everybody logs in again, as after one of Prism.
"""

from __future__ import annotations

import base64
import hmac
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

import trio

from replicator.simulator.core import Core
from replicator.simulator.model import Role, User
from replicator.simulator.web import HttpError, Route

#: How long a session is good, in seconds, unless the knob ``session_lifetime_s`` says otherwise.
SESSION_S = 900.0
_SESSIONS_MAX = 10_000
_EVERYTHING = "*"
#: Whose token the cookie of an Element is; None: no token. Raises HttpError 401. Arguments: path, token, cluster.
TokenOwner = Callable[[str, str, str], User | None]


class UnauthorizedError(Exception):
    """Nobody that is known: answered with 401 and a page of HTML, as Prism does it."""


class RateLimitedError(HttpError):
    """Too many requests. ``retry_after_s`` None: nothing is said of when to come back."""

    def __init__(self, retry_after_s: int | None, status: int = 429) -> None:
        super().__init__(status, "too many requests", "rate_limit")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Caller:
    """An account that asks; ``cookie`` is to be set where a session begins: its name and value."""

    user: User
    cookie: tuple[str, str] | None = None


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float


class Gate:
    """Lets callers in, on Prism Central (``cluster`` None) and on Elements."""

    def __init__(self, core: Core, token_owner: TokenOwner | None = None) -> None:
        self._core = core
        self._token_owner = token_owner
        self._sessions: OrderedDict[str, tuple[str, str | None, float]] = OrderedDict()
        self._buckets: dict[tuple[str, str | None], _Bucket] = {}

    def forget_sessions(self) -> None:
        """Every cookie that was given out is worth nothing from now on."""
        self._sessions.clear()

    def admit(self, headers: dict[str, str], path: str, cluster: str | None) -> Caller:
        """Who asks. Raises UnauthorizedError, and HttpError for a token of v4 that is not good here."""
        name = cookie_name(cluster)
        held = _cookies(headers.get("cookie", "")).get(name)
        if held is not None:
            user = self._session(held, cluster)
            if user is None and cluster is not None and self._token_owner is not None:
                user = self._token_owner(path, held, cluster)
            if user is not None:
                return Caller(user)
        key = headers.get("x-ntnx-api-key")
        if key is not None:
            return Caller(self._by_key(key))
        scheme, _, rest = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and cluster is not None:
            raise HttpError(403, "a token is taken as a cookie only", "forbidden")
        if scheme.lower() != "basic":
            raise UnauthorizedError
        user = self._by_password(rest.strip(), cluster)
        return Caller(user, (name, self._open(user, cluster)))

    def _session(self, value: str, cluster: str | None) -> User | None:
        uuid, where, until = self._sessions.get(value, ("", None, 0.0))
        if where != cluster or until <= trio.current_time():
            return None
        return self._core.world.users.get(uuid)

    def _open(self, user: User, cluster: str | None) -> str:
        value = secrets.token_urlsafe(32)
        lifetime_s = float(self._core.knobs.get("session_lifetime_s", SESSION_S))
        self._sessions[value] = (user.uuid, cluster, trio.current_time() + lifetime_s)
        if len(self._sessions) > _SESSIONS_MAX:
            self._sessions.popitem(last=False)
        return value

    def _by_key(self, key: str) -> User:
        for user in self._core.world.users.values():
            for known in user.keys.values():
                if hmac.compare_digest(known.encode(), key.encode()):
                    return user
        raise UnauthorizedError

    def _by_password(self, pair: str, cluster: str | None) -> User:
        try:
            name, _, password = base64.b64decode(pair, validate=True).decode().partition(":")
        except ValueError:
            raise UnauthorizedError from None
        for user in self._core.world.users.values():
            if user.name != name or not user.password:
                continue
            if cluster is not None and not user.on_element:
                break
            if hmac.compare_digest(user.password.encode(), password.encode()):
                return user
        raise UnauthorizedError

    def limit(self, user: User, cluster: str | None) -> None:
        """Count a request of an account on a host.

        Raises RateLimitedError above the knob ``rate_limit_rpm`` requests a minute, of which ``rate_limit_burst`` at once.
        """
        rpm = float(self._core.knobs.get("rate_limit_rpm", 0))
        if rpm <= 0:
            return
        burst = max(1.0, float(self._core.knobs.get("rate_limit_burst", rpm)))
        now = trio.current_time()
        bucket = self._buckets.setdefault((user.uuid, cluster), _Bucket(burst, now))
        bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * rpm / 60)
        bucket.at = now
        if bucket.tokens < 1:
            raise RateLimitedError(math.ceil((1 - bucket.tokens) * 60 / rpm))
        bucket.tokens -= 1

    def check(self, user: User, route: Route) -> None:
        """Raises HttpError 403 that names the permission which the account's role lacks."""
        if route.permission is None:
            return
        role = self._role_of(user)
        held = role.operations if role is not None else []
        if _EVERYTHING not in held and route.permission not in held:
            text = f"user {user.name} lacks the permission {route.permission}"
            raise HttpError(403, text, "forbidden", route.permission)

    def is_super(self, user: User) -> bool:
        """Whether an account may do everything: it may also turn the simulator's own knobs."""
        role = self._role_of(user)
        return role is not None and _EVERYTHING in role.operations

    def _role_of(self, user: User) -> Role | None:
        """By id, or by name."""
        roles = self._core.world.roles
        named = (role for role in roles.values() if role.name == user.role)
        return roles.get(user.role) or next(named, None)


def cookie_name(cluster: str | None) -> str:
    """The session cookie's name on Prism Central, or on an Element."""
    return "NTNX_IAM_SESSION" if cluster is None else "NTNX_IGW_SESSION"


def _cookies(header: str) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header).items()}
    except CookieError:
        return {}


__all__ = ["Caller", "Gate", "RateLimitedError", "UnauthorizedError", "cookie_name"]
