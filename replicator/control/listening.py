# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether this host can listen at an address, found out before anything is made."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

from replicator.errors import StateError, UsageError


def check_listen(host: str, port: int, key: str, *, busy_is_fine: bool) -> None:
    """Raise UsageError that names ``key`` unless ``host`` is an address of this host; all addresses where it is empty.

    A port that another process has is a StateError, unless ``busy_is_fine``. Blocks while the name is looked up.
    """
    where = f"{host or 'all addresses'}:{port}"
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{key}: cannot listen on {where}: {reason}") from None
    for family, kind, protocol, _, address in found:
        try:
            _bind(family, kind, protocol, address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                if busy_is_fine:
                    continue
                raise StateError(
                    f"{key}: cannot listen on {where}: {os.strerror(error.errno)}"
                ) from None
            if error.errno == errno.EAFNOSUPPORT and len(found) > 1:
                continue  # a host without IPv6: the other addresses are listened on
            raise UsageError(f"{key}: cannot listen on {where}: {_reason(error)}") from None


def _bind(family: int, kind: int, protocol: int, address: Any) -> None:
    """As what listens does, without listening: nobody can connect to what is gone at once."""
    with socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return "not an address of this host"
    return os.strerror(error.errno or 0)


__all__ = ["check_listen"]
