# SPDX-License-Identifier: AGPL-3.0-or-later
"""Drives the plugin: builds it and a file daemon of its own (host.c), writes a backend's script, runs a job, says what happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.limits import HANG_S

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = Path(__file__).resolve().parent
PLUGIN_SOURCES = ROOT / "bacula_adapter" / "fd_plugin"
#: Bacula 9.6.7 and 15.0.x.
INTERFACES = (14, 23)
VERSION_OF = {14: "9.6.7 (10 December 2020)", 23: "15.0.3 (25 March 2025)"}
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
STRICT = ("-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror")
#: The backend that is built in, for when there is none beside the plugin.
BUILT_IN = "/nowhere/replicator-backend"
BUILD_ENVIRONMENT = {**os.environ, "REPLICATOR_BACKEND": BUILT_IN}
STRING = "replicator: one"

Step = list[Any]
Script = Sequence[Step]


@dataclass(frozen=True)
class Built:
    """A plugin, the file daemon and the hostile backend, all in one folder."""

    folder: Path

    @property
    def plugin(self) -> Path:
        return self.folder / "replicator-fd.so"


def build(folder: Path, *, sanitized: bool) -> Built:
    """Compile all of it."""
    subprocess.run(
        [ROOT / "scripts" / "build-plugin", *(["--sanitize"] if sanitized else []), folder],
        check=True,
        env=BUILD_ENVIRONMENT,
    )
    options = [*STRICT, *(SANITIZERS if sanitized else ())]
    for name, sources in (
        ("host", [SOURCES / "host.c"]),
        ("fuzz_packet", [SOURCES / "fuzz_packet.c", PLUGIN_SOURCES / "packet.c"]),
    ):
        include = f"-I{PLUGIN_SOURCES}"
        subprocess.run(["gcc", *options, include, "-o", folder / name, *sources], check=True)
    subprocess.run(["gcc", *STRICT, "-o", folder / "hostile", SOURCES / "hostile.c"], check=True)
    return Built(folder)


@dataclass
class Outcome:
    """What became of a job."""

    lines: list[str]
    told: list[list[list[Any]]] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    out: Path = Path()
    pids: list[int] = field(default_factory=list)

    def named(self, word: str, number: int = 0) -> list[str]:
        """What the daemon printed under a word."""
        prefix = f"{number} {word}"
        return [
            line.removeprefix(prefix).strip()
            for line in self.lines
            if line == prefix or line.startswith(f"{prefix} ")
        ]

    @property
    def messages(self) -> list[str]:
        return self.named("message")

    @property
    def fatal(self) -> list[str]:
        mark = "FATAL replicator: "
        return [text.removeprefix(mark) for text in self.messages if text.startswith(mark)]

    @property
    def status(self) -> str:
        (status,) = self.named("end")
        return status

    def file(self, number: int = 0, run: int = 0) -> bytes:
        return (self.out / f"file-{run}-{number}").read_bytes()

    def heard(self, backend: int = 0) -> list[str]:
        """Commands and blocks' ends that a backend got, one text each."""
        return [" ".join(str(word) for word in entry).strip() for entry in self.told[backend]]


class Daemon:
    """Runs jobs with one plugin, in a folder of its own."""

    def __init__(self, built: Built, folder: Path, *, under: Sequence[str] = ()) -> None:
        self.built = built
        self.folder = folder
        self.under = under
        self.plugin = folder / "replicator-fd.so"
        shutil.copyfile(built.plugin, self.plugin)

    def backend(self, scripts: Mapping[str, Script]) -> None:
        """Put a backend beside the plugin that does what stands there."""
        program = self.folder / "replicator-backend"
        text = (SOURCES / "scripted.py").read_text("utf-8")
        program.write_text(f"#!{sys.executable} -SI\n{text}", "utf-8")
        program.chmod(0o755)
        (self.folder / "script.json").write_text(json.dumps(scripts), "utf-8")

    def start(self, interface: int, what: str, *options: str, **env: str) -> list[str]:
        """Run the daemon; it must not break. Returns what it printed."""
        done = subprocess.run(
            [*self.under, self.built.folder / "host", self.plugin, str(interface), what, *options],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HANG_S,
            env={**os.environ, "SCRIPTED": str(self.folder), **env},
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-6000:]
        assert done.stderr == b"", done.stderr.decode(errors="replace")[-6000:]
        return done.stdout.decode().splitlines()

    def run(self, interface: int, what: str, script: Script, *options: str) -> Outcome:
        """A job with a plugin string and a script for its backend."""
        return self.run_many(interface, what, {"start": script}, f"string={STRING}", *options)

    def run_many(
        self, interface: int, what: str, scripts: Mapping[str, Script], *options: str
    ) -> Outcome:
        self.backend(scripts)
        out = self.folder / "out"
        for old in (*self.folder.glob("told-*"), *self.folder.glob("data-*"), *out.glob("*")):
            old.unlink()
        out.mkdir(exist_ok=True)
        lines = self.start(interface, what, f"out={out}", *options)
        told = sorted(self.folder.glob("told-*"), key=lambda path: path.stat().st_mtime_ns)
        entries = [
            [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in told
        ]
        data = [self.folder / path.name.replace("told", "data") for path in told]
        contents = [path.read_bytes() if path.exists() else b"" for path in data]
        pids = [int(path.name.removeprefix("told-")) for path in told]
        return Outcome(lines, entries, contents, out, pids)


def pattern(length: int, packet: int = 300_000) -> bytes:
    """What `do_data` of a scripted backend sends."""
    return b"".join(
        bytes((at + i) % 251 for i in range(min(packet, length - at)))
        for at in range(0, length, packet)
    )


def named_file(name: str, size: int, *, kind: str = "F", addressed: bool = False) -> list[Step]:
    """A file's head."""
    return [
        ["send", "C", f"FNAME:{name}"],
        ["send", "C", f"STAT:{kind} {size} 0 0 100600 1"],
        ["send", "C", "TSTAMP:1700000000 1700000001 1700000002"],
        *([["send", "C", "OFFSETS"]] if addressed else []),
        ["send", "F"],
    ]


def plain_file(name: str, size: int) -> list[Step]:
    """A file with all its data."""
    data: list[Step] = [["send", "C", "DATA"], ["data", None, size], ["send", "F"]]
    return [*named_file(name, size), *data]


def catalogue_object(name: str, text: str, kind: str = "RESTOREOBJ") -> list[Step]:
    return [
        ["send", "C", f"{kind}:{name}"],
        ["send", "C", f"{kind}_LEN:{len(text)}"],
        ["raw", f"D{len(text):06}\n{text}"],
        ["send", "F"],
    ]
