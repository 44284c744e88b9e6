# SPDX-License-Identifier: AGPL-3.0-or-later
"""The plugin as it is installed, under valgrind: nothing is read that was not written, nothing is left behind."""

from __future__ import annotations

from pathlib import Path

from tests.fd_plugin.driving import (
    STRING,
    Built,
    Daemon,
    Script,
    catalogue_object,
    named_file,
    plain_file,
)

VALGRIND = (
    "valgrind",
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--show-leak-kinds=all",
    "--track-fds=yes",
    "--child-silent-after-fork=yes",
    "--trace-children=no",
)


def test_the_main_ways_are_clean(released: Built, tmp_path: Path, interface: int) -> None:
    daemon = Daemon(released, tmp_path, under=VALGRIND)
    backup: Script = [
        ["handshake", "CLAIM:@"],
        *named_file("a", 400_000, addressed=True),
        ["send", "C", "DATA"],
        ["data", 0, 100_000],
        ["data", 300_000, 100_000],
        ["send", "F"],
        *plain_file("b", 100_000),
        *catalogue_object("description", "text" * 100),
        ["send", "F"],
        ["until", "C", "CHECKFILE"],
        ["send", "C", "GONE"],
        ["verdict"],
    ]
    assert daemon.run(interface, "backup", backup, "check=@x", "accurate=1").status == "T"
    restore: Script = [["handshake"], ["restore", {}], ["send", "F"], ["verdict"]]
    file = f"file={STRING}|/r/a|3|1|400000|0+100000,300000+100000"
    assert (
        daemon.run(interface, "restore", restore, file, f"object=28|1|o|{STRING}|x").status == "T"
    )
    estimate: Script = [["handshake"], *named_file("a", 5), ["send", "F"], ["end"]]
    assert daemon.run(interface, "estimate", estimate).messages == []
    crash: Script = [["handshake"], *named_file("a", 5), ["kill"]]
    assert daemon.run(interface, "backup", crash).status == "f"
    cancelled: Script = [["handshake"], *named_file("a", 5), ["hang"], ["verdict"]]
    assert daemon.run(interface, "backup", cancelled, "cancel=open").status == "A"
