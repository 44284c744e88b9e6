# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m bench.measured FILE ARGUMENTS…`: `replctl ARGUMENTS…`, and its peak memory in bytes left in FILE at the end.

The kernel forgets the peak with the process, and what wait4 reports counts its parent's memory too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.proc import read_status
from replicator.cli.main import main

if __name__ == "__main__":
    code = main(sys.argv[2:])
    Path(sys.argv[1]).write_text(str(read_status("self")["VmHWM"]), "ascii")
    sys.exit(code)
