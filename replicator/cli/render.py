# SPDX-License-Identifier: AGPL-3.0-or-later
"""Tables for a person. They show what the JSON of docs/json.md holds, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from replicator.cli.text import duration, one_line, size
from replicator.cli.underway import sentence as sentence_of
from replicator.domain.sampling import sentence

#: Columns where nobody watches: a row in a file or a pipe is one line.
_WIDTH = 10_000
_STYLES = {
    "protected": "green",
    "ok": "green",
    "verified": "bold green",
    "held": "cyan",
    "testing": "cyan",
    "live": "green",
    "sealed": "green",
    "open": "cyan",
    "parked": "bold red",
    "missing": "bold red",
    "damaged": "bold red",
    "reference": "green",
    "push under way": "cyan",
    "left behind": "bold red",
    "failed": "bold red",
}
_ENVELOPE = {"id", "at", "kind"}


def show_status(vms: Sequence[dict[str, Any]]) -> None:
    """VmStatus objects as a table, and their warnings below it."""
    rows = []
    for vm in vms:
        last = vm["last_cycle"]
        what = (
            "-"
            if last is None
            else f"{last['kind']}, {size(last['bytes_pushed'])} in {duration(last['duration_s'])}"
        )
        age = _age(vm)
        newest = "-" if vm["newest_point"] is None else str(vm["newest_point"])
        rows.append(
            [vm["vm"], vm["role"], vm["state"], newest, age, what, str(len(vm["warnings"]) or "")]
        )
    _table(
        ["VM", "role", "state", "newest point", "RPO age", "last cycle", "warnings"], rows, styled=2
    )
    common = _common_warnings(vms)
    for warning in common:
        _console().print(Text(f"all VMs: {one_line(warning)}", style="yellow"), soft_wrap=True)
    for vm in vms:
        for warning in vm["warnings"]:
            if warning in common:
                continue
            _console().print(
                Text(f"{one_line(vm['vm'])}: {one_line(warning)}", style="yellow"), soft_wrap=True
            )
        if vm["push"] is not None:
            _console().print(
                Text(f"{one_line(vm['vm'])}: {sentence_of(vm['push'])}"), soft_wrap=True
            )
        sampled = vm["sampling"]
        said = sampled and sentence(sampled["sampled"], sampled["missed"])
        if said:
            _console().print(Text(f"{one_line(vm['vm'])}: {said}"), soft_wrap=True)


def _common_warnings(vms: Sequence[dict[str, Any]]) -> list[str]:
    """What is said of each of several VMs: of their host, such as its certificate. Said once."""
    if len(vms) < 2:
        return []
    return [each for each in vms[0]["warnings"] if all(each in vm["warnings"] for vm in vms)]


def _age(vm: dict[str, Any]) -> str:
    """RPO age, and what it will come to where that is too much."""
    if vm["rpo_age_s"] is None:
        return "-"
    age = duration(vm["rpo_age_s"])
    target_s, forecast_s = vm["rpo_target_s"], vm["rpo_forecast_s"]
    if target_s is None or forecast_s is None or forecast_s <= max(target_s, vm["rpo_age_s"]):
        return age
    return f"{age}, to be {duration(forecast_s)}"


def show_points(points: Sequence[dict[str, Any]]) -> None:
    """PointInfo objects as a table."""
    rows = [
        [
            str(point["point"]),
            point["taken_at"],
            point["committed_at"],
            "-" if point["parent"] is None else str(point["parent"]),
            size(point["bytes_pushed"]),
            point["state"],
            point["root"][:16],
        ]
        for point in points
    ]
    _table(["point", "taken", "committed", "parent", "pushed", "state", "root"], rows, styled=5)


def show_estimates(estimates: Sequence[dict[str, Any]]) -> None:
    """Estimate objects as a table, disk by disk, with a line for the whole of each VM that has several."""
    rows = []
    for vm in estimates:
        rows += [
            [vm["vm"], *_sizes(disk["disk"], disk), disk["reason"] or ""] for disk in vm["disks"]
        ]
        if len(vm["disks"]) != 1:
            rows.append([vm["vm"], *_sizes("all", vm), ""])
    _table(["vm", "disk", "size", "full", "incremental", "note"], rows)


def _sizes(name: str, counts: dict[str, Any]) -> list[str]:
    changed = counts["incremental_bytes"]
    return [
        name,
        size(counts["size"]),
        size(counts["full_bytes"]),
        "-" if changed is None else size(changed),
    ]


def show_owned(objects: Sequence[dict[str, Any]]) -> None:
    """Owned objects as a table."""
    rows = [
        [each["kind"], each["name"], each["vm"] or "-", duration(each["age_s"]), each["why"]]
        for each in objects
    ]
    _table(["kind", "name", "VM", "age", "why"], rows, styled=4)


def show_history(events: Sequence[dict[str, Any]]) -> None:
    """Events as a table; what is particular to a kind stands in the last column."""
    rows = [[str(event["id"]), event["at"], event["kind"], _details(event)] for event in events]
    _table(["id", "at", "event", "details"], rows)


def show_periods(periods: Sequence[dict[str, Any]]) -> None:
    """Periods of the log as a table."""
    rows = [
        [
            each["label"],
            each["opened_at"],
            f"{each['first']}-{each['last']}" if each["last"] >= each["first"] else "-",
            each["state"],
            "-" if each["bytes"] is None else size(each["bytes"]),
        ]
        for each in periods
    ]
    _table(["period", "opened", "events", "state", "size"], rows, styled=3)


def show_usage(days: Sequence[dict[str, Any]]) -> None:
    """A VM's days as a table."""
    rows = [
        [
            day["day"],
            str(day["seeds"]),
            str(day["cycles"]),
            size(day["bytes_pushed"]),
            duration(day["busy_s"]),
            str(day["abandoned"]),
            str(day["damages"]),
            str(day["tests"]),
            str(day["sampled"]),
            str(day["missed"]),
        ]
        for day in days
    ]
    heads = ["day", "seeds", "cycles", "pushed", "busy", "given up", "damages", "tests"]
    heads += ["sampled", "missed"]
    _table(heads, rows)


def show_projections(projections: Sequence[dict[str, Any]]) -> None:
    """Projections as a table, and what has stopped one below it."""
    rows = [
        [
            each["name"],
            each["state"],
            str(each["position"]),
            str(each["lag"]),
            "-" if each["rebuilt"] is None else f"{each['rebuilt']:.0%}",
        ]
        for each in projections
    ]
    _table(["projection", "state", "position", "lag", "rebuilt"], rows, styled=1)
    for each in projections:
        if each["error"] is not None:
            text = f"{each['name']} is parked at event {each['event']}: {each['error']}"
            _console().print(Text(one_line(text), style="red"), soft_wrap=True)


def _details(event: dict[str, Any]) -> str:
    parts = []
    for name, value in event.items():
        if name in _ENVELOPE or value is None:
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = f"{name}: {len(value)}"
        elif isinstance(value, dict):
            text = ", ".join(f"{key}={inner}" for key, inner in value.items())
        elif name == "root":
            text = f"root={str(value)[:16]}"
        else:
            text = f"{name}={value}"
        parts.append(text)
    return ", ".join(parts)


def show_backups(rows: Sequence[dict[str, Any]]) -> None:
    """BackupInfo objects as a table, and failures of last jobs below it."""
    cells = []
    for row in rows:
        last, full = row["last"], row["full"]
        cells.append(
            [
                row["vm"],
                row["job"],
                "-" if full is None else full["taken_at"],
                "-" if last is None else last["job"],
                "-" if last is None else last["level"],
                "-" if last is None else str(last["job_id"]),
                "-" if last is None else size(last["bytes"]),
                "-" if last is None else duration(last["age_s"]),
                str(row["parts"]),
                row["snapshot"] or row["reference"] or "-",
                "failed" if row["failure"] is not None else "ok",
            ]
        )
    heads = ["VM", "job", "last Full", "last job", "level", "JobId", "data", "age", "parts"]
    _table([*heads, "reference", "last result"], cells, styled=10)
    for row in rows:
        if (failure := row["failure"]) is not None:
            text = f"{row['vm']}: {failure['job']} (JobId {failure['job_id']}) failed at {failure['at']}: {failure['reason']}"
            _console().print(Text(one_line(text), style="red"), soft_wrap=True)


def show_health(report: dict[str, Any]) -> None:
    """A HealthReport as a table, a row for each finding, and what to do below it."""
    rows = []
    for probe in report["probes"]:
        took = "-" if probe["state"] == "not run" else duration(probe["seconds"])
        for finding in probe["findings"]:
            rows.append([probe["probe"], finding["state"], took, finding["text"]])
            took = ""
    _table(["probe", "state", "time", "what was found"], rows, styled=1)
    for probe in report["probes"]:
        for finding in probe["findings"]:
            if finding["remedy"] is not None:
                style = "red" if finding["state"] == "failed" else "yellow"
                text = f"{probe['probe']}: {one_line(finding['remedy'])}"
                _console().print(Text(text, style=style), soft_wrap=True)
    ready = "ready for a job" if report["ready"] else "not ready for a job"
    api = "" if report["api"] is None else f" ({report['api']})"
    _console().print(
        Text(f"{one_line(report['prism'])}{api}: {ready}, {duration(report['seconds'])}"),
        soft_wrap=True,
    )


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], styled: int | None = None) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        cells = [Text(one_line(cell)) for cell in row]
        if styled is not None:
            cells[styled].stylize(_STYLES.get(row[styled], "yellow"))
        table.add_row(*cells)
    if sys.stdout.isatty():
        _console().print(table)
        return
    plain = Console(width=_WIDTH, highlight=False, color_system=None)
    with plain.capture() as captured:
        plain.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def _console() -> Console:
    return Console(highlight=False)


__all__ = [
    "show_backups",
    "show_health",
    "show_history",
    "show_periods",
    "show_points",
    "show_projections",
    "show_status",
    "show_usage",
]
