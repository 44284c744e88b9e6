# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM as the virtual files of a Bacula backup, and the references between its jobs."""

from bacula_adapter.backup.handler import open_backup
from bacula_adapter.backup.listing import open_listing

__all__ = ["open_backup", "open_listing"]
