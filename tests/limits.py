# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long a test waits for what must happen before it says that it hangs."""

from __future__ import annotations

#: Only ever reached by a defect: a shared disk can keep one fsync for half a minute. Under pytest's own limit for a test.
HANG_S = 240
