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

NAMES = ("seed", "cycle", "memory", "eventstore", "month")


async def _run(names: list[str], folder: Path, shrink: int | None, pairs: int) -> list[Result]:
    results = []
    for name in names:
        own = folder / name
        own.mkdir()
        print(f"bench: {name} …", file=sys.stderr)
        module = importlib.import_module(f"bench.{name}")
        results.append(await module.run(own, shrink or getattr(module, "SHRINK", 1), pairs))
    return results


def main() -> int:
    """Run the benchmarks that were asked for, or all; 1 if a ratio with a limit is above it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="docs/figures.md says what they measure"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--shrink",
        type=int,
        help="divide disk sizes and numbers of events, to try the benchmarks themselves; month: its length"
        " [default: 1; month: 60]",
    )
    parser.add_argument("--pairs", type=int, default=5, help="how often each pair is measured")
    parser.add_argument(
        "--folder", type=Path, help="where to work (about 10 GB); a temporary folder unless given"
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="eventstore with a million events too: some minutes more",
    )
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in NAMES]
    if unknown or (given.shrink is not None and given.shrink < 1) or given.pairs < 1:
        parser.error(f"no benchmark {unknown[0]}" if unknown else "numbers from 1 on")
    with tempfile.TemporaryDirectory(prefix="rb", dir=given.folder) as folder:
        names = given.names or list(NAMES)
        if given.large:
            names.append("eventstore_large")
        results = trio.run(_run, names, Path(folder), given.shrink, given.pairs)
    if given.json:
        print(json.dumps([result.as_json() for result in results], indent=2))
    else:
        for result in results:
            print(result.as_text())
        print(f"load of {os.cpu_count()} CPUs in the last minute: {os.getloadavg()[0]:.1f}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
