# SPDX-License-Identifier: AGPL-3.0-or-later
"""The error tree: one class for each thing that an operator or a caller can do about it.

A message is one line, names what was tried, and never holds a secret.
"""

from __future__ import annotations


class ReplicatorError(Exception):
    """Base of every error that this project raises on purpose. ``exit_code`` is the command's."""

    exit_code = 1


class UsageError(ReplicatorError):
    """The command line or the configuration is wrong; nothing was touched. Mend it, run again."""

    exit_code = 2


class RefusedError(ReplicatorError):
    """The request is well formed, but the state of the VM or of the process forbids it."""

    exit_code = 3


class PhcbtError(ReplicatorError):
    """A delta stream is damaged or breaks the format. ``offset`` is the position in the stream."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"delta stream damaged at byte {offset}: {reason}")
        self.offset = offset
        self.reason = reason


class DamageError(ReplicatorError):
    """Stored data does not have the digest recorded for it (replica, delta or map)."""


class WireError(ReplicatorError):
    """The other side broke the protocol, or the transport was tampered with. The session ends."""


class AuthenticationError(WireError):
    """The two sides do not hold the same key (or one that may push this VM)."""


class FencedError(RefusedError):
    """The VM failed over: this source may push nothing more, and trying again cannot help."""


class PeerRefusedError(RefusedError):
    """The receiver refused a push; ``code`` is the protocol's word for why."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"the receiver refused: {reason}")
        self.code = code
        self.reason = reason


class SourceError(ReplicatorError):
    """The source of a VM's disks (hypervisor, image) failed or cannot be reached."""


class SnapshotGoneError(SourceError):
    """The snapshot that a push was reading no longer exists; the push must be abandoned."""


class ReferenceLostError(SourceError):
    """Change tracking cannot say what changed since the reference; compare digests instead."""


class StateError(ReplicatorError):
    """The state directory cannot be used: not writable, locked by another process, damaged."""
