# SPDX-License-Identifier: AGPL-3.0-or-later
"""Hostile bytes, the same in every run: `scripts/fuzz` looks for more. Invariant: the daemon lives, frees everything, ends every
child and closes every descriptor (host.c checks), and nothing undefined happens (the sanitizers do)."""

from __future__ import annotations

import shutil
import subprocess

from tests.fd_plugin.driving import STRING, Built, Daemon

FILES = [
    f"file={STRING}|/r/a|3|1|200000|0+200000",
    f"file={STRING}|/r/b|3|2|200000|0+2,50000+100000",
]


def test_a_hostile_backend(daemon: Daemon, interface: int) -> None:
    shutil.copy(daemon.built.folder / "hostile", daemon.folder / "replicator-backend")
    options = [f"string={STRING}", *FILES, "check=@image/x"]
    lines = daemon.start(interface, "fuzz", f"seed={interface * 10_000}", "runs=1500", *options)
    assert lines[-1] == "0 fuzzed 1500"


def test_packets(sanitized: Built) -> None:
    done = subprocess.run(
        [sanitized.folder / "fuzz_packet", "0", "200000"], check=True, capture_output=True
    )
    assert (done.stdout, done.stderr) == (b"fuzzed 200000\n", b"")
