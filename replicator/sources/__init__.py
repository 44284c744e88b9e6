# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a VM's disks come from."""
