# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the receiver tells about itself."""
