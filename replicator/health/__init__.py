# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether everything that a job needs of Prism is there, found out before the first one: five probes, each with its remedy."""

from replicator.health.checking import Wanted, check_health
from replicator.health.findings import Finding, Probe, Report, State

__all__ = ["Finding", "Probe", "Report", "State", "Wanted", "check_health"]
