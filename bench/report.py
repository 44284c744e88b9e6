# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a benchmark hands back, and how it is shown."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Result:
    """``figures``: name to value, the unit at the end of the name. ``ratios``: name to (value, limit or None);
    a ratio above its limit is a failure. ``floors``: name to (value, least); one below it is a failure.
    ``columns``: what several values of a figure are of, in their order.
    """

    name: str
    what: str
    figures: dict[str, float | list[float]] = field(default_factory=dict)
    ratios: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    floors: dict[str, tuple[float, float]] = field(default_factory=dict)
    columns: Sequence[str] = ()
    #: Sentences that belong to it.
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every ratio keeps its limit."""
        return all(
            limit is None or value <= limit for value, limit in self.ratios.values()
        ) and all(value >= least for value, least in self.floors.values())

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        ratios = {name: {"ratio": v, "limit": limit} for name, (v, limit) in self.ratios.items()}
        more: dict[str, Any] = {"columns": list(self.columns)} if self.columns else {}
        if self.notes:
            more["notes"] = self.notes
        if self.floors:
            more["floors"] = {
                name: {"ratio": value, "least": least}
                for name, (value, least) in self.floors.items()
            }
        return {
            "benchmark": self.name,
            "what": self.what,
            "machine": machine(),
            "figures": self.figures,
            "ratios": ratios,
            "good": self.good,
            **more,
        }

    def as_text(self) -> str:
        """For people."""
        lines = [f"{self.name}: {self.what}"]
        if self.columns:
            lines.append(f"  {'':44} " + " ".join(f"{each:>10}" for each in self.columns))
        for name, value in self.figures.items():
            values = value if isinstance(value, list) else [value]
            lines.append(f"  {name:44} " + " ".join(f"{each:10.3f}" for each in values))
        for name, (ratio, limit) in self.ratios.items():
            bound = "" if limit is None else f"  (at most {limit}: {_verdict(ratio <= limit)})"
            lines.append(f"  {name:44} {ratio:10.2f}{bound}")
        for name, (ratio, least) in self.floors.items():
            lines.append(
                f"  {name:44} {ratio:10.2f}  (at least {least}: {_verdict(ratio >= least)})"
            )
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _verdict(kept: bool) -> str:
    return "kept" if kept else "NOT KEPT"


def machine() -> dict[str, Any]:
    """What it ran on, and how busy that was."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 1),
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of runs that followed each other: what the rest of the machine does hits both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


__all__ = ["Result", "machine", "paired_ratio"]
