# SPDX-License-Identifier: AGPL-3.0-or-later
"""Accepts pushes and control requests."""
