# SPDX-License-Identifier: AGPL-3.0-or-later
"""PHCBT01: the delta format. Specified in docs/phcbt01.md."""
