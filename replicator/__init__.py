# SPDX-License-Identifier: AGPL-3.0-or-later
"""The shared core and the source side: disks, deltas, events, wire, sources, pushes, command."""

__version__ = "0.1.0"
