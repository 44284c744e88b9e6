# SPDX-License-Identifier: AGPL-3.0-or-later
"""How to reach one Prism, and with what account. Secrets stay out of every repr."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DEFAULT_PORT = 9440

Expose = Literal["auto", "vg-clone", "vg-image", "vg-url"]


@dataclass(frozen=True, slots=True)
class Account:
    """Who asks: an API key where there is one, else a user and a password."""

    user: str = ""
    password: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """Limits in seconds. ``retry_s``: how long one call is tried again for what may pass (0: not at all).

    ``poll_s``: the gaps between looks at a task, the last one again and again. The others: how long a task may take.
    """

    connect_s: float = 15.0
    request_s: float = 60.0
    retry_s: float = 180.0
    poll_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    snapshot_s: float = 600.0
    snapshot_application_s: float = 1200.0
    group_s: float = 300.0
    delete_s: float = 300.0
    image_s: float = 4 * 3600.0
    conflict_s: float = 5.0
    """Between two tries of a change that met a newer state of its object."""
    settle_s: float = 60.0
    """How long changed regions of a new snapshot may be unknown (404) before that is taken for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrismSettings:
    """One Prism Central, or Element. ``port`` is that of the Elements as well, where their address does not say another.

    ``ca``: a file of authorities in place of the system's; ``insecure``: no certificate is checked. ``rate_rpm``: requests
    a minute to each host, 0 for any number. ``cluster``: name or UUID of the one to look at; empty for all. ``elements``:
    an Element's address (``host`` or ``host:port``) by cluster name or UUID, where Prism's own cannot be reached.
    ``element_account``: None: the same account. ``expose``: how v3 makes a snapshot's disk readable.
    """

    host: str
    port: int = DEFAULT_PORT
    api_version: Literal["auto", "v3", "v4"] = "auto"
    account: Account = Account()
    insecure: bool = False
    ca: Path | None = None
    rate_rpm: int = 30
    cluster: str = ""
    elements: Mapping[str, str] = field(default_factory=dict)
    element_account: Account | None = None
    expose: Expose = "auto"
    waits: Waits = Waits()

    def for_element(self) -> Account:
        """The account that Elements know."""
        return self.account if self.element_account is None else self.element_account

    def element_address(self, uuid: str, name: str, told: str | None) -> tuple[str, int] | None:
        """Host and port of a cluster's Element: the override, else what Prism ``told``; None where nobody knows it."""
        address = self.elements.get(uuid) or self.elements.get(name) or told
        return None if not address else split_address(address, self.port)


def split_address(address: str, port: int) -> tuple[str, int]:
    """``host``, ``host:port``, ``[v6]:port`` or a bare v6 address; ``port`` where it has none."""
    if address.startswith("["):
        host, _, rest = address[1:].partition("]")
        number = rest[1:] if rest.startswith(":") else ""
    elif address.count(":") == 1:
        host, _, number = address.partition(":")
    else:
        host, number = address, ""
    return host, int(number) if number.isascii() and number.isdigit() else port
