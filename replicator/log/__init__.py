# SPDX-License-Identifier: AGPL-3.0-or-later
"""The event log of one side: what happened to its VMs, what they are now, and how they were."""

from replicator.log.event_log import EventLog, open_log
from replicator.log.past import Wanted

__all__ = ["EventLog", "Wanted", "open_log"]
