# SPDX-License-Identifier: AGPL-3.0-or-later
"""The hands of the failover state machine: test clones of recovery points."""
