# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a side proves to the other, and what it accepts: pre-shared keys and certificates, out of the configuration.

They are looked at again whenever a connection is made or accepted: keys and certificates change without a restart.
"""

from __future__ import annotations

from replicator.credentials.certificates import check_own
from replicator.credentials.receiver import ReceiverCredentials
from replicator.credentials.source import Proof, SourceCredentials
from replicator.credentials.watch import Credentials, expiry_warnings, reload_on_hangup

__all__ = [
    "Credentials",
    "Proof",
    "ReceiverCredentials",
    "SourceCredentials",
    "check_own",
    "expiry_warnings",
    "reload_on_hangup",
]
