# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m bench [NAME…] [--json] [--shrink N] [--pairs N] [--folder PATH]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import trio

from bench.report import Result

NAMES = ("seed", "cycle", "memory")


async def _run(names: list[str], folder: Path, shrink: int, pairs: int) -> list[Result]:
    results = []
    for name in names:
        own = folder / name
        own.mkdir()
        print(f"bench: {name} …", file=sys.stderr)
        results.append(await importlib.import_module(f"bench.{name}").run(own, shrink, pairs))
    return results


def main() -> int:
    """Run the benchmarks that were asked for, or all; 1 if a ratio with a limit is above it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="docs/figures.md says what they measure"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--shrink", type=int, default=1, help="divide disk sizes, to try the benchmarks themselves"
    )
    parser.add_argument("--pairs", type=int, default=5, help="how often each pair is measured")
    parser.add_argument(
        "--folder", type=Path, help="where to work (about 10 GB); a temporary folder unless given"
    )
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown or given.shrink < 1 or given.pairs < 1:
        parser.error(f"no benchmark {unknown[0]}" if unknown else "numbers from 1 on")
    with tempfile.TemporaryDirectory(prefix="rb", dir=given.folder) as folder:
        results = trio.run(
            _run, given.names or list(NAMES), Path(folder), given.shrink, given.pairs
        )
    if given.json:
        print(json.dumps([result.as_json() for result in results], indent=2))
    else:
        for result in results:
            print(result.as_text())
        print(f"load of {os.cpu_count()} CPUs in the last minute: {os.getloadavg()[0]:.1f}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
