# SPDX-License-Identifier: AGPL-3.0-or-later
"""A thin client of Nutanix Prism, v3 and v4, behind one interface. Knows nothing of pushes, points or jobs."""
