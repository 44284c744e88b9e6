# SPDX-License-Identifier: AGPL-3.0-or-later
"""Images and VMs out of the virtual files of Bacula backups."""
