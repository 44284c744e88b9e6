# SPDX-License-Identifier: AGPL-3.0-or-later
"""The transport between source and receiver. Specified in docs/wire.md."""

from replicator.wire.framing import MessageLimits, MessageParser, MessageStream
from replicator.wire.keys import Keyring, PreSharedKey
from replicator.wire.stream import (
    AuthenticatedStream,
    PeerSilentError,
    TamperedError,
    accept_stream,
    connect_stream,
)

__all__ = [
    "AuthenticatedStream",
    "Keyring",
    "MessageLimits",
    "MessageParser",
    "MessageStream",
    "PeerSilentError",
    "PreSharedKey",
    "TamperedError",
    "accept_stream",
    "connect_stream",
]
