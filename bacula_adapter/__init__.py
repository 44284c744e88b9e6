# SPDX-License-Identifier: AGPL-3.0-or-later
"""Backups of the same data to Bacula."""
