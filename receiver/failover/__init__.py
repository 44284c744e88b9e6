# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a failover does to the world: test clones."""
