# SPDX-License-Identifier: AGPL-3.0-or-later
"""Replicas, deltas, recovery points and views of them."""
