# SPDX-License-Identifier: AGPL-3.0-or-later
"""The DR side: keeps recovery points, serves and boots them."""
