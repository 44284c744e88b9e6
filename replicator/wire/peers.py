# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who stands on the other side once it has proved itself, and which VMs it may push. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from replicator.errors import UsageError
from replicator.wire.keys import PreSharedKey


class Peer(Protocol):
    """The other side of a session, whatever it proved."""

    @property
    def name(self) -> str:
        """For logs and refusals; no secret."""

    def may_push(self, vm_uuid: str, vm_name: str) -> bool:
        """Whether it may push the VM with this UUID (lower case) and name."""


@dataclass(frozen=True, slots=True)
class KeyPeer:
    """A holder of a pre-shared key: may push the VM that the key is for, or any."""

    key: PreSharedKey

    @property
    def name(self) -> str:
        """``the key NAME``."""
        return f"the key {self.key.name}"

    def may_push(self, vm_uuid: str, vm_name: str) -> bool:
        """See ``Peer``."""
        return self.key.vm is None or self.key.vm in {vm_uuid, vm_name}


@dataclass(frozen=True, slots=True)
class CertificatePeer:
    """A holder of a certificate with ``names``: each may push what ``allowed`` says of it, else the VM that it is called."""

    names: tuple[str, ...]
    allowed: Mapping[str, Sequence[str]]

    @property
    def name(self) -> str:
        """``the certificate NAME, NAME``."""
        return f"the certificate {', '.join(self.names) or 'without a name'}"

    def may_push(self, vm_uuid: str, vm_name: str) -> bool:
        """See ``Peer``."""
        for name in self.names:
            globs = self.allowed.get(name)
            if globs is None:
                if name in {vm_uuid, vm_name}:
                    return True
            elif any(glob == vm_uuid or fnmatch.fnmatchcase(vm_name, glob) for glob in globs):
                return True
        return False


def parse_allow(text: str) -> dict[str, tuple[str, ...]]:
    """``NAME: vm, vm; NAME: *`` to the globs of each name. Raises UsageError that names ``dr_allow`` and the entry.

    The name ends at the first colon with a blank behind it, or at the last colon: a name may be a URI.
    """
    allowed: dict[str, tuple[str, ...]] = {}
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, vms = entry.partition(": ")
        if not colon:
            name, colon, vms = entry.rpartition(":")
        name = name.strip()
        globs = tuple(filter(None, (vm.strip() for vm in vms.split(","))))
        if not name or not globs:
            raise UsageError(f"dr_allow: expected NAME: VM, VM, got {entry[:80]!r}")
        if name in allowed:
            raise UsageError(f"dr_allow: {name[:80]!r} is given twice")
        allowed[name] = globs
    return allowed


__all__ = ["CertificatePeer", "KeyPeer", "Peer", "parse_allow"]
