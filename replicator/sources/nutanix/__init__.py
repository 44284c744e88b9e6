# SPDX-License-Identifier: AGPL-3.0-or-later
"""VMs on Nutanix clusters as sources: snapshots, changed regions, and reading over iSCSI or REST.

``open_site`` over a Prism client and an event log; then ``NutanixSource(site, uuid, name)`` for each VM.
"""

from __future__ import annotations

from replicator.sources.nutanix.settings import NutanixSettings
from replicator.sources.nutanix.site import NutanixSite, open_site
from replicator.sources.nutanix.source import NutanixSource

__all__ = ["NutanixSettings", "NutanixSite", "NutanixSource", "open_site"]
