# SPDX-License-Identifier: AGPL-3.0-or-later
"""The backend process of a Bacula job: the dialogue with the FD plugin (docs/backend-protocol.md), and what runs behind it."""
