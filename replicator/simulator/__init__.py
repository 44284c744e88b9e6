# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Prism Central with its clusters in one process: v3 and v4 over HTTPS, VMs with real disks, snapshots, changed regions,
iSCSI targets. For tests, for the demonstration, and for developers of anything that talks to Prism.
"""
