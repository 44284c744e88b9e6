# SPDX-License-Identifier: AGPL-3.0-or-later
"""The transport between source and receiver. Specified in docs/wire.md."""
