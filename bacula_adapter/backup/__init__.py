# SPDX-License-Identifier: AGPL-3.0-or-later
"""A VM as the virtual files of a Bacula backup, and the references between its jobs."""
