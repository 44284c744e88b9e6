# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recovery points as NBD exports."""
