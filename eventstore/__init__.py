# SPDX-License-Identifier: AGPL-3.0-or-later
"""LMDB persistence for the `eventsourcing` library. Knows nothing of disks."""
