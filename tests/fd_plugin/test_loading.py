# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the file daemon and the plugin agree on when it is loaded."""

from __future__ import annotations

import subprocess

import pytest

from tests.fd_plugin.driving import (
    BUILD_ENVIRONMENT,
    BUILT_IN,
    INTERFACES,
    ROOT,
    STRING,
    Built,
    Daemon,
)


def test_both_versions_load_one_binary(daemon: Daemon, interface: int) -> None:
    assert daemon.start(interface, "load") == ["0 load 0"]


@pytest.mark.parametrize("unknown", [1, 13, 15, 21, 22, 24, 10014, 10023, 0xFFFFFFFF])
def test_every_other_version_is_refused_in_words(daemon: Daemon, unknown: int) -> None:
    lines = daemon.start(unknown, "load")
    text = (
        f"replicator: not loaded: this file daemon has plugin interface {unknown}; "
        "known are 14 (Bacula 9.6) and 23 (Bacula 15.0)"
    )
    # 6 is a warning or an information, whatever the version.
    assert lines == [f"0 debug 0 {text}", f"0 log 6 {text}", "0 load 2"]


@pytest.mark.parametrize(
    "lie", ["info_version=23", "info_version=14", "table=144", "table=168", "table=176"]
)
def test_a_daemon_that_contradicts_itself_is_refused(daemon: Daemon, lie: str) -> None:
    honest = {14: ("info_version=14", "table=144"), 23: ("info_version=23", "table=168")}
    for interface in INTERFACES:
        if lie not in honest[interface]:
            assert daemon.start(interface, "load", lie)[-1] == "0 load 2"


def test_a_table_that_is_too_short_is_not_touched(daemon: Daemon) -> None:
    assert daemon.start(14, "load", "table=8") == ["0 load 2"]


def test_a_console_starts_no_backend(daemon: Daemon, interface: int) -> None:
    daemon.backend({"start": []})
    assert daemon.start(interface, "console") == ["0 load 0", "0 end R"]
    assert list(daemon.folder.glob("told-*")) == []


def test_only_the_two_entries_are_exported_and_only_libc_is_needed(released: Built) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", released.plugin], check=True, capture_output=True, text=True
    )
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == [
        "loadPlugin",
        "unloadPlugin",
    ]
    headers = subprocess.run(
        ["readelf", "-dlW", released.plugin], check=True, capture_output=True, text=True
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in headers.splitlines() if "(NEEDED)" in line]
    assert needed == ["libc.so.6"]
    assert "GNU_RELRO" in headers
    assert "BIND_NOW" in headers
    assert "RWE" not in headers


def test_nothing_can_change_after_loading_but_what_loading_sets(released: Built) -> None:
    """All state is a job's: file daemons run jobs as threads."""
    symbols = subprocess.run(
        ["objdump", "-t", released.plugin], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in symbols.splitlines() if " O " in line]
    writable = {row[-1] for row in rows if {".bss", ".data"} & set(row)}
    made_by_the_linker = {"__dso_handle", "__TMC_END__", "completed.0"}
    assert writable - made_by_the_linker == {"abi", "beside_plugin", "daemon_funcs"}


def test_building_again_does_nothing_and_says_nothing(released: Built) -> None:
    before = released.plugin.stat().st_mtime_ns
    done = subprocess.run(
        [ROOT / "scripts" / "build-plugin", released.folder],
        check=True,
        capture_output=True,
        env=BUILD_ENVIRONMENT,
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert released.plugin.stat().st_mtime_ns == before


def test_without_a_backend_beside_it_the_built_in_one_is_started(
    daemon: Daemon, interface: int
) -> None:
    lines = daemon.start(interface, "backup", f"string={STRING}")
    reason = f"cannot start {BUILT_IN}: No such file or directory"
    assert f"0 message FATAL replicator: {reason}" in lines
    assert "0 command 2" in lines
    assert lines[-1] == "0 end f"
