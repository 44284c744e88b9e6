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
from typing import Any

import trio

from bench.report import Result

NAMES = (
    "seed",
    "cycle",
    "transport",
    "memory",
    "wan",
    "eventstore",
    "month",
    "iscsi",
    "nutanix",
    "bacula",
)
PAIRS = 5


async def _run(
    names: list[str], folder: Path, shrink: int | None, pairs: int | None
) -> list[Result]:
    """``NAME/PART``: only a part of a benchmark that has parts."""
    results = list[Result]()
    for number, given in enumerate(names):
        own = folder / str(number)
        own.mkdir()
        print(f"bench: {given} …", file=sys.stderr)
        name, _, part = given.partition("/")
        module = importlib.import_module(f"bench.{name}")
        arguments: list[Any] = [own, shrink or getattr(module, "SHRINK", 1)]
        arguments.append(pairs or getattr(module, "PAIRS", PAIRS))
        found = await module.run(*arguments, *([part] if part else []))
        results += found if isinstance(found, list) else [found]
    return results


def _is_known(given: str) -> bool:
    name, slash, part = given.partition("/")
    if name not in NAMES:
        return False
    return not slash or part in getattr(importlib.import_module(f"bench.{name}"), "PARTS", ())


def main() -> int:
    """Run the benchmarks that were asked for, or all; 1 if a ratio with a limit is above it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="docs/figures.md says what they measure"
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(NAMES)}; transport/PART for a part of that",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--shrink",
        type=int,
        help="divide disk sizes and numbers of events, to try the benchmarks themselves; month: its length"
        " [default: 1; month: 60]",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        help="how often each pair is measured, and each round of transport [default: 5; transport: 3]",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work (about 30 GB for transport, 10 for the others); a temporary folder unless given",
    )
    parser.add_argument(
        "--large",
        action="store_true",
        help="eventstore with a million events too: some minutes more",
    )
    given = parser.parse_args()
    unknown = [name for name in given.names if not _is_known(name)]
    if (
        unknown
        or (given.shrink is not None and given.shrink < 1)
        or (given.pairs is not None and given.pairs < 1)
    ):
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
