# SPDX-License-Identifier: AGPL-3.0-or-later
"""The v3 API of the simulated Prism Central and its Elements, and what of v2.0 the Elements still answer."""
