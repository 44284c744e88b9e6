# SPDX-License-Identifier: AGPL-3.0-or-later
"""The tokens that Prism Central hands out for its Elements: JSON Web Tokens, signed with a key of this process.

A token names the path that it is good for, version included: with another version an Element refuses it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from typing import TYPE_CHECKING

import msgspec

from replicator.simulator.model import User
from replicator.simulator.web import HttpError

if TYPE_CHECKING:
    from replicator.simulator.core import Core

_LENGTH = 8192
_HEADER = {"alg": "HS256", "typ": "JWT"}
_REFUSED = "unauthorized"


class _Payload(msgspec.Struct):
    sub: str
    exp: float
    scope: str
    aud: str = ""


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def issue(key: bytes, user: User, cluster: str, minor: int, lifetime_s: float) -> str:
    """A token for content calls of ``minor`` on a cluster's Element."""
    now = int(time.time())
    payload = {
        "sub": user.uuid,
        "username": user.name,
        "aud": cluster,
        "iat": now,
        "exp": now + lifetime_s,
        "scope": f"/api/dataprotection/v4.{minor}/content",
    }
    signed = ".".join(_encode(msgspec.json.encode(part)) for part in (_HEADER, payload))
    return f"{signed}.{_encode(_sign(key, signed))}"


def _sign(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def open_token(core: Core, key: bytes, path: str, token: str, cluster: str | None) -> User | None:
    """Whose token it is. None: it is no token of this kind.

    Raises HttpError 401 if it is none of ours, old, or for another path or cluster.
    """
    parts = token.split(".")
    if len(token) > _LENGTH or len(parts) != 3:
        return None
    try:
        payload = msgspec.json.decode(_decode(parts[1]), type=_Payload)
        signature = _decode(parts[2])
    except (ValueError, msgspec.DecodeError):
        return None
    if not hmac.compare_digest(signature, _sign(key, f"{parts[0]}.{parts[1]}")):
        raise HttpError(401, "the token's signature is not valid", _REFUSED)
    if payload.exp <= time.time():
        raise HttpError(401, "the token has expired", _REFUSED)
    if cluster is not None and payload.aud != cluster:
        raise HttpError(401, "the token is for another cluster", _REFUSED)
    if not path.startswith(payload.scope + "/"):
        raise HttpError(401, "Scope claim value does not match API base path", _REFUSED)
    user = core.world.users.get(payload.sub)
    if user is None:
        raise HttpError(401, "the token's user is gone", _REFUSED)
    return user
