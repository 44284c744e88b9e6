# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a caller says about a session: where, as whom, and within which limits. Values that can only be built if valid."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Final

#: The port that iSCSI targets listen on.
PORT: Final = 3260
#: An iSCSI name has at most 223 bytes (RFC 7143, 4.2.7.1).
NAME_MAX: Final = 223
_NAME = re.compile(r"(iqn\.[a-z0-9.:_-]+|eui\.[0-9a-f]{16}|naa\.([0-9a-f]{16}|[0-9a-f]{32}))")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,253}[A-Za-z0-9])?\.?")
#: A CHAP secret on the wire is bytes; this bounds what a configuration can hold.
SECRET_MAX: Final = 255


def check_name(name: str) -> str:
    """The iSCSI name, in lower case. Raises ValueError if it is none."""
    lower = name.lower()
    if len(lower) > NAME_MAX or _NAME.fullmatch(lower) is None:
        raise ValueError(f"not an iSCSI name: {name[:64]!r}")
    return lower


@dataclass(frozen=True, slots=True)
class Portal:
    """Where a target listens: a host name or an address (IPv6 without brackets) and a port."""

    host: str
    port: int = PORT

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            if _HOST.fullmatch(self.host) is None:
                raise ValueError(f"not a host: {self.host[:64]!r}") from None
        if not 1 <= self.port <= 65535:
            raise ValueError(f"not a port: {self.port}")

    @classmethod
    def parse(cls, text: str) -> Portal:
        """``host[:port][,group]`` as targets write it, IPv6 in brackets. Raises ValueError."""
        address = text.partition(",")[0]
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::([0-9]{1,5}))?", address)
        if match is None:
            raise ValueError(f"not an iSCSI portal: {text[:64]!r}")
        return cls(match[1] or match[2], int(match[3]) if match[3] else PORT)

    def __str__(self) -> str:
        """As in messages: ``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Chap:
    """How the two sides prove themselves. ``target_secret``: the target has to prove itself too (mutual CHAP).

    ``target_user`` is the name that the target must then give; empty: any, as the secret is what counts. The secrets are
    in no repr. Raises ValueError for a secret that is empty or too long, or the same in both directions.
    """

    user: str
    secret: str = field(repr=False)
    target_user: str = ""
    target_secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.user or not self.secret:
            raise ValueError("CHAP needs a user and a secret")
        if len(self.secret.encode()) > SECRET_MAX or len(self.target_secret.encode()) > SECRET_MAX:
            raise ValueError(f"a CHAP secret has at most {SECRET_MAX} bytes")
        if self.secret == self.target_secret:
            # RFC 7143, 12.1.3: else the initiator itself would answer the challenge that it gives.
            raise ValueError("mutual CHAP needs two different secrets")

    @property
    def mutual(self) -> bool:
        """Whether the target has to prove itself."""
        return bool(self.target_secret)


@dataclass(frozen=True, slots=True)
class IscsiSettings:
    """One initiator's identity and limits. Times in seconds, sizes in bytes.

    ``depth``: commands in flight in one session. ``read_size``: most bytes of one READ. ``task_timeout_s``: how long a
    command may take; after that it is aborted at the target. ``login_timeout_s``: the login at one portal.
    """

    initiator: str
    chap: Chap | None = None
    depth: int = 16
    read_size: int = 256 << 10
    connect_timeout_s: float = 10.0
    login_timeout_s: float = 15.0
    task_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check_name(self.initiator)
        if not 1 <= self.depth <= 128:
            raise ValueError(f"a depth of {self.depth}: 1 to 128")
        if not 4096 <= self.read_size <= 8 << 20 or self.read_size % 4096:
            raise ValueError(f"a read size of {self.read_size}: multiples of 4096 up to 8 MiB")
        if min(self.connect_timeout_s, self.login_timeout_s, self.task_timeout_s) <= 0:
            raise ValueError("timeouts are positive")


@dataclass(frozen=True, slots=True)
class Target:
    """What discovery found: a target's name and where it can be reached, in the order given."""

    name: str
    portals: tuple[Portal, ...]


__all__ = [
    "NAME_MAX",
    "PORT",
    "SECRET_MAX",
    "Chap",
    "IscsiSettings",
    "Portal",
    "Target",
    "check_name",
]
