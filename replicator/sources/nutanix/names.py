# SPDX-License-Identifier: AGPL-3.0-or-later
"""Names of what we make on a Nutanix cluster (nutanix-data-path.md, naming rule). They alone tell whose an object is.

``drx-<installation>-<push>-<purpose>-<UTC time>``, and for what is made for one disk, ``-<number of the disk>`` after it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from replicator.errors import SourceError
from replicator.prism.types import Kind

#: What every name of this product begins with, whichever installation made it.
COMMON: Final = "drx-"
#: Prism takes names of 64 characters everywhere.
NAME_MAX: Final = 64
DISKS_MAX: Final = 9999
_STAMP: Final = "%Y%m%dT%H%M%SZ"
_INSTALLATION: Final = re.compile(r"[0-9a-f]{8}")
_PUSH: Final = re.compile(r"[a-z0-9]{1,22}")
_NAME: Final = re.compile(
    r"drx-(?P<installation>[0-9a-f]{8})-(?P<push>[a-z0-9]{1,22})-(?P<purpose>rp|vg|img|rst)"
    r"-(?P<stamp>[0-9]{8}T[0-9]{6}Z)(?:-(?P<disk>0|[1-9][0-9]{0,3}))?"
)


def new_installation() -> str:
    """A new installation's id."""
    return secrets.token_hex(4)


def is_installation(text: object) -> bool:
    """Whether this can be an installation's id."""
    return isinstance(text, str) and _INSTALLATION.fullmatch(text) is not None


def prefix(installation: str) -> str:
    """What the names of all objects of one installation begin with."""
    return f"{COMMON}{installation}-"


@dataclass(frozen=True, slots=True)
class ObjectName:
    """A name in its parts. ``made_at_us``: microseconds since the epoch, whole seconds. ``disk`` None: not of one disk."""

    installation: str
    push_id: str
    kind: Kind
    made_at_us: int
    disk: int | None = None

    def __post_init__(self) -> None:
        if not is_installation(self.installation):
            raise ValueError(f"not an installation's id: {self.installation!r}")
        if _PUSH.fullmatch(self.push_id) is None:
            raise SourceError(
                f"push {self.push_id[:64]!r} cannot be in a name on a cluster (1 to 22 small letters and digits)"
            )
        if self.disk is not None and not 0 <= self.disk <= DISKS_MAX:
            raise SourceError(f"a VM with a disk number {self.disk}: at most {DISKS_MAX}")

    def __str__(self) -> str:
        """The name as Prism has it; at most NAME_MAX characters."""
        stamp = datetime.fromtimestamp(self.made_at_us // 1_000_000, UTC).strftime(_STAMP)
        disk = "" if self.disk is None else f"-{self.disk}"
        return f"{prefix(self.installation)}{self.push_id}-{self.kind}-{stamp}{disk}"

    @classmethod
    def parse(cls, text: str) -> ObjectName | None:
        """The parts of a name; None if it is not one of this product's, to the letter."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        try:
            made = datetime.strptime(match["stamp"], _STAMP).replace(tzinfo=UTC)
        except ValueError:
            return None
        return cls(
            installation=match["installation"],
            push_id=match["push"],
            kind=Kind(match["purpose"]),
            made_at_us=int(made.timestamp()) * 1_000_000,
            disk=None if match["disk"] is None else int(match["disk"]),
        )


__all__ = [
    "COMMON",
    "DISKS_MAX",
    "NAME_MAX",
    "ObjectName",
    "is_installation",
    "new_installation",
    "prefix",
]
