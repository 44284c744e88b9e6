# SPDX-License-Identifier: AGPL-3.0-or-later
"""Addresses and names as the configuration spells them: of Prism, of its Elements, of iSCSI. Pure."""

from __future__ import annotations

import ipaddress
import re

from replicator.errors import UsageError

#: An iSCSI qualified name (RFC 7143, 4.2.7.2): the naming authority's date and reversed domain, and a name of its own.
_IQN = re.compile(r"iqn\.[0-9]{4}-(0[1-9]|1[0-2])\.[a-z0-9][a-z0-9.-]*(:[a-z0-9.:-]+)?")
IQN_BYTES_MAX = 223
ISCSI_PORT = 3260
_ELEMENTS_MAX = 256


def parse_prism_central(text: str) -> tuple[str, int | None]:
    """Host and, if it is given, port of ``prism_central``. Raises UsageError."""
    try:
        return _host_port(text)
    except ValueError:
        raise UsageError("prism_central: expected HOST or HOST:PORT") from None


def parse_elements(text: str) -> dict[str, str]:
    """``prism_element``: addresses (host or host:port) of Elements by their cluster's name or UUID. Raises UsageError."""
    found: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, address = (piece.strip() for piece in part.partition("="))
        try:
            if not equals or not name:
                raise ValueError
            _host_port(address)
        except ValueError:
            raise UsageError(f"prism_element: expected cluster=address, got {part!r}") from None
        if name in found:
            raise UsageError(f"prism_element: {name!r} is given twice")
        found[name] = address
        if len(found) > _ELEMENTS_MAX:
            raise UsageError(f"prism_element: more than {_ELEMENTS_MAX} clusters")
    return found


def parse_dsip(text: str) -> tuple[str, int] | None:
    """``dsip``: address and port, 3260 unless given; None if there is none. Raises UsageError."""
    if not text:
        return None
    try:
        host, port = _host_port(text)
        ipaddress.ip_address(host)
    except ValueError:
        raise UsageError("dsip: expected an IP address, or IP:PORT") from None
    return host, ISCSI_PORT if port is None else port


def is_iqn(name: str) -> bool:
    """Whether it is an iSCSI qualified name that an initiator may have."""
    return len(name.encode()) <= IQN_BYTES_MAX and _IQN.fullmatch(name) is not None


def _host_port(text: str) -> tuple[str, int | None]:
    """``host``, ``host:port``, a bare IPv6 address, or one in brackets. Raises ValueError."""
    if not text.isprintable():
        raise ValueError("a character that no address has")
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^][:\s/@]+))(?::([0-9]{1,5}))?", text)
    if match is None:
        return str(ipaddress.IPv6Address(text)), None
    port = int(match[3]) if match[3] else None
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"no port: {port}")
    if match[1]:
        ipaddress.IPv6Address(match[1])
    else:
        match[2].encode("idna")  # its UnicodeError is a ValueError
    return match[1] or match[2], port


__all__ = [
    "IQN_BYTES_MAX",
    "ISCSI_PORT",
    "is_iqn",
    "parse_dsip",
    "parse_elements",
    "parse_prism_central",
]
