# SPDX-License-Identifier: AGPL-3.0-or-later
"""What can go wrong between the initiator and a target: one class for each thing that somebody can do about it."""

from __future__ import annotations

from typing import Final

from replicator.errors import SourceError

#: Login status (class and detail) in words: RFC 7143, section 11.13.5.
LOGIN_STATUS: Final = {
    0x0200: "the target found a mistake in the login",
    0x0201: "the CHAP user or secret is wrong or missing",
    0x0202: "this initiator may not use the target",
    0x0203: "no such target for this initiator",
    0x0204: "the target has been removed and has no new address",
    0x0205: "the target speaks another version of iSCSI",
    0x0206: "too many connections in the session",
    0x0207: "the target misses a parameter in the login",
    0x0208: "the target cannot spread a session over its portals",
    0x0209: "the target knows no session of this type",
    0x020A: "the session does not exist",
    0x020B: "the target got a request that does not belong in a login",
    0x0300: "the target failed",
    0x0301: "the service is not available at the moment",
    0x0302: "the target is out of resources",
}


class IscsiError(SourceError):
    """Base of every error of the initiator. The message names the portal and the target."""


class PortalUnreachableError(IscsiError):
    """No TCP connection to the portal: wrong data services address, firewall, or the service is down."""


class RedirectUnreachableError(PortalUnreachableError):
    """The portal sent us on, and where it sent us nobody answers: this host must reach that network as well."""


class LoginRefusedError(IscsiError):
    """The target refused the login. ``status`` is its class and detail, as in LOGIN_STATUS."""

    def __init__(self, where: str, status: int) -> None:
        reason = LOGIN_STATUS.get(status, "for a reason that the protocol does not name")
        super().__init__(f"{where} refused the login: {reason} (status 0x{status:04x})")
        self.status = status


class LoginAuthenticationError(LoginRefusedError):
    """CHAP failed, or this initiator is not allowed in: mend the secret, or what is attached to whom."""


class LoginNotFoundError(LoginRefusedError):
    """No target of that name for this initiator: not attached, attached to another name, or not yet visible."""


class TargetNotTrustedError(IscsiError):
    """The target did not prove that it knows the secret of mutual CHAP: it may be another machine."""


class SessionLostError(IscsiError):
    """The session ended: the target went away, cut the connection or asked us to leave. Reading anew may succeed."""


class TimedOutError(IscsiError):
    """The target did not answer in time."""


class IscsiProtocolError(IscsiError):
    """The other side broke the protocol (RFC 7143), or asks for what this initiator does not do. The session ends."""


class ScsiError(IscsiError):
    """A command ended with something other than GOOD. ``status`` and the sense code say what; the session goes on."""

    def __init__(
        self, text: str, *, status: int, key: int = 0, asc: int = 0, ascq: int = 0
    ) -> None:
        super().__init__(text)
        self.status = status
        self.key = key
        self.asc = asc
        self.ascq = ascq

    @property
    def is_reset(self) -> bool:
        """A UNIT ATTENTION that only says that the unit was reset, or that its list of units changed: ask again."""
        return self.key == 6 and (self.asc == 0x29 or (self.asc, self.ascq) == (0x3F, 0x0E))

    @property
    def is_unsupported(self) -> bool:
        """The target does not know this command, or a field of it."""
        return self.key == 5 and self.asc in {0x20, 0x24}


class BusyError(ScsiError):
    """BUSY or TASK SET FULL: the target has no room for the command now."""


class MediumError(ScsiError):
    """The target cannot read these blocks. ``lba`` is the first of them as far as the target says, else of the request."""

    def __init__(self, text: str, *, status: int, asc: int, ascq: int, lba: int) -> None:
        super().__init__(text, status=status, key=3, asc=asc, ascq=ascq)
        self.lba = lba


class LunGoneError(ScsiError):
    """The target is there, but this disk is no longer in it (or never was)."""


class AmbiguousDiskError(IscsiError):
    """The target holds no disk, or several, and nobody said which: name the LUN."""


class DiskChangedError(IscsiError):
    """After a new login the disk is not the one that was read before: another size, serial number or identifier."""


__all__ = [
    "LOGIN_STATUS",
    "AmbiguousDiskError",
    "BusyError",
    "DiskChangedError",
    "IscsiError",
    "IscsiProtocolError",
    "LoginAuthenticationError",
    "LoginNotFoundError",
    "LoginRefusedError",
    "LunGoneError",
    "MediumError",
    "PortalUnreachableError",
    "RedirectUnreachableError",
    "ScsiError",
    "SessionLostError",
    "TargetNotTrustedError",
    "TimedOutError",
]
