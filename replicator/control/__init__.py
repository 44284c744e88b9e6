# SPDX-License-Identifier: AGPL-3.0-or-later
"""The control API of a process that runs: how it is served, what a source answers, and its metrics page."""
