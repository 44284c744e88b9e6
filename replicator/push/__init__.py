# SPDX-License-Identifier: AGPL-3.0-or-later
"""Seeds and cycles: plan, read, encode, send, resume."""
