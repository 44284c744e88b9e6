# SPDX-License-Identifier: AGPL-3.0-or-later
"""The NBD protocol: what client and server share, and the client."""
