# SPDX-License-Identifier: AGPL-3.0-or-later
"""Benchmarks: each a ratio against another program, or against itself at another size, measured in one run."""
