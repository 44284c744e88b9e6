# SPDX-License-Identifier: AGPL-3.0-or-later
"""The v4 APIs of the simulated Prism Central and its Elements: 4.0 to 4.4, each namespace with a window of minors of its own."""
