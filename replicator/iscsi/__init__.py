# SPDX-License-Identifier: AGPL-3.0-or-later
"""An iSCSI initiator in user space, on trio: reads disks over the network without root, kernel session or device node.

Everything that others use is here: ``discover``, ``open_disk`` and ``open_reader``, what they take and what they give.
"""

from __future__ import annotations

from replicator.iscsi.connecting import discover
from replicator.iscsi.disk import IscsiDisk, open_disk
from replicator.iscsi.errors import (
    AmbiguousDiskError,
    DiskChangedError,
    IscsiError,
    IscsiProtocolError,
    LoginAuthenticationError,
    LoginNotFoundError,
    LoginRefusedError,
    LunGoneError,
    MediumError,
    PortalUnreachableError,
    RedirectUnreachableError,
    ScsiError,
    SessionLostError,
    TargetNotTrustedError,
    TimedOutError,
)
from replicator.iscsi.reader import DiskReader, open_reader
from replicator.iscsi.settings import Chap, IscsiSettings, Portal, Target

__all__ = [
    "AmbiguousDiskError",
    "Chap",
    "DiskChangedError",
    "DiskReader",
    "IscsiDisk",
    "IscsiError",
    "IscsiProtocolError",
    "IscsiSettings",
    "LoginAuthenticationError",
    "LoginNotFoundError",
    "LoginRefusedError",
    "LunGoneError",
    "MediumError",
    "Portal",
    "PortalUnreachableError",
    "RedirectUnreachableError",
    "ScsiError",
    "SessionLostError",
    "Target",
    "TargetNotTrustedError",
    "TimedOutError",
    "discover",
    "open_disk",
    "open_reader",
]
