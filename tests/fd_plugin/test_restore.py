# SPDX-License-Identifier: AGPL-3.0-or-later
"""Restores that go well, and what becomes of those that do not."""

from __future__ import annotations

import pytest

from tests.fd_plugin.driving import STRING, Daemon, Script

SERVE: Script = [["handshake"], ["restore", {}], ["send", "F"], ["verdict"]]


def content(position: int, length: int) -> bytes:
    """What host.c writes at a position."""
    return bytes(
        (at * 131 + (at >> 8) * 7 + (at >> 16)) & 255 for at in range(position, position + length)
    )


def test_a_file_comes_back_with_its_addresses(daemon: Daemon, interface: int) -> None:
    ranges = "0+700000,1048576+10,2000000+1"
    file = f"file={STRING}|/r/@image/vm/disks/disk-0.raw|3|17|4000000|{ranges}"
    done = daemon.run(interface, "restore", SERVE, file, "where=/r", "replace=w")
    assert done.messages == []
    assert done.status == "T"
    assert done.named("create") == ["0 3"]
    assert done.named("closed") == ["0 0"]
    # As large as may be, apart only where there is a hole.
    assert [entry[1:] for entry in done.told[0] if entry[0] == "B"] == [
        [0, 262144],
        [262144, 262144],
        [524288, 175712],
        [1048576, 10],
        [2000000, 1],
    ]
    assert done.data[0] == content(0, 700000) + content(1048576, 10) + content(2000000, 1)
    heard = done.heard()
    assert heard[heard.index("C RestoreStart") + 1 : heard.index("B 0 262144")] == [
        "C FNAME:/r/@image/vm/disks/disk-0.raw",
        "C STAT:F 4000000 7 8 100640 1 17",
        "C TSTAMP:11 12 13",
        "F",
        "C DATA",
    ]
    assert heard[-5:] == ["F", "C FINISH", "C RESULT T", "C END", "T"]
    assert {"C Type=R", "C Where=/r", "C Replace=w"} <= set(heard)
    assert not any(text.startswith(("C Level", "C RegexWhere", "C Since")) for text in heard)


def test_where_is_told_as_it_is(daemon: Daemon, interface: int) -> None:
    """Empty is "back to the platform", not set is a regular expression's."""
    file = f"file={STRING}|@image/vm/x|2|1|0|"
    done = daemon.run(interface, "restore", SERVE, file, "where=")
    assert "C Where=" in done.heard()
    done = daemon.run(interface, "restore", SERVE, file, "regex=!^!/x!")
    assert "C RegexWhere=!^!/x!" in done.heard()
    assert not any(text.startswith("C Where") for text in done.heard())


def test_an_empty_file_has_data_too(daemon: Daemon, interface: int) -> None:
    done = daemon.run(interface, "restore", SERVE, f"file={STRING}|/r/x|2|1|0|")
    heard = done.heard()
    assert heard[heard.index("C DATA") + 1] == "F"
    assert "C STAT:E 0 7 8 100640 1 1" in heard
    assert done.status == "T"


def test_objects_go_to_whom_they_belong_to(daemon: Daemon, interface: int) -> None:
    scripts: dict[str, Script] = {"start": SERVE}
    done = daemon.run_many(
        interface,
        "restore",
        scripts,
        "object=25|3|description|replicator: one|first text",
        "object=25|4|description|replicator: two|second text",
        "object=27|4|RestoreOptions|replicator: one|offered",
        "object=28|9|RestoreOptions|replicator: whatever|chosen",
        "object=25|5|empty|replicator: one|",
        "file=replicator: one|/r/a|3|1|5|0+5",
        "file=replicator: two|/r/b|3|2|5|0+5",
        "file=replicator: one|/r/c|3|3|5|0+5",
    )
    assert done.messages == []
    assert done.named("object") == ["0"] * 5
    one = done.heard(0)
    start = one.index("C RestoreStart")
    assert one[start + 1 : one.index("C FNAME:/r/a")] == [
        "C RESTOREOBJ:description",
        "C RESTOREOBJ_JOBID:3",
        "C RESTOREOBJ_TYPE:25",
        "C RESTOREOBJ_LEN:10",
        "D first text",
        "F",
        "C RESTOREOBJ:RestoreOptions",
        "C RESTOREOBJ_JOBID:9",
        "C RESTOREOBJ_TYPE:28",
        "C RESTOREOBJ_LEN:6",
        "D chosen",
        "F",
        "C RESTOREOBJ:empty",
        "C RESTOREOBJ_JOBID:5",
        "C RESTOREOBJ_TYPE:25",
        "C RESTOREOBJ_LEN:0",
        "F",
    ]
    assert "C FNAME:/r/c" in one
    two = done.heard(1)
    assert [text for text in two if text.startswith("D ")] == ["D second text", "D chosen"]
    assert all("C RESULT T" in done.heard(number) for number in (0, 1))


def test_skip_and_core(daemon: Daemon, interface: int) -> None:
    answers = {"/r/skip": "SKIP", "/r/core": "CORE"}
    script: Script = [["handshake"], ["restore", answers], ["send", "F"], ["verdict"]]
    files = [f"file={STRING}|/r/{name}|3|1|5|0+5" for name in ("skip", "core", "send")]
    done = daemon.run(interface, "restore", script, *files)
    assert done.messages == []
    assert done.named("create") == ["0 1", "0 5", "0 3"]
    assert done.data[0] == content(0, 5)


def test_a_file_that_is_refused_fails_the_job(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], ["restore", {"/r/a": "E"}]]
    done = daemon.run(interface, "restore", script, f"file={STRING}|/r/a|3|1|5|0+5")
    # Skipped: to an error the file daemon of 9.6 hangs up, and the Director waits a minute. The message fails the job.
    assert done.named("create") == ["0 1"]
    assert done.messages == ["FATAL replicator: E"]
    assert "C RESULT f" in done.heard()
    assert "C FINISH" not in done.heard()


def test_an_answer_that_is_none_fails_the_job(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], ["restore", {"/r/a": "PERHAPS"}]]
    done = daemon.run(interface, "restore", script, f"file={STRING}|/r/a|3|1|5|0+5")
    assert done.fatal == ["replicator-backend answered for a file: PERHAPS"]


def test_data_that_are_refused_fail_the_job(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], ["restore", {"data": "no room"}]]
    done = daemon.run(interface, "restore", script, f"file={STRING}|/r/a|3|1|5|0+5")
    assert done.fatal == ["replicator-backend answered where OK was due: no room"]
    assert done.named("closed") == ["2 -1"]
    assert done.status == "f"


def test_an_image_that_does_not_hold_fails_the_job(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], ["restore", {}], ["send", "E", "root differs"], ["verdict"]]
    done = daemon.run(interface, "restore", script, f"file={STRING}|/r/a|3|1|5|0+5")
    assert done.fatal == ["root differs"]
    assert done.status == "f"
    assert done.heard()[-4:] == ["C FINISH", "C RESULT f", "C END", "T"]


def test_the_verdict_waits_for_all_backends(daemon: Daemon, interface: int) -> None:
    """One that fails takes the other's success away."""
    scripts: dict[str, Script] = {
        "start": [["handshake"], ["choose"]],
        "one": [["restore", {}], ["send", "F"], ["verdict"]],
        "two": [["restore", {}], ["send", "E", "two is bad"], ["verdict"]],
    }
    files = [f"file=replicator: {name}|/r/{name}|3|1|5|0+5" for name in ("one", "two")]
    done = daemon.run_many(interface, "restore", scripts, *files)
    assert done.fatal == ["two is bad"]
    assert all("C RESULT f" in done.heard(number) for number in (0, 1))


def test_a_file_without_attributes_is_not_whole(daemon: Daemon, interface: int) -> None:
    """The storage daemon died: the file daemon closes the file and says nothing."""
    done = daemon.run(
        interface,
        "restore",
        [["handshake"], ["restore", {}]],
        f"file={STRING}|/r/a|3|1|5|0+5",
        "attributes=0",
    )
    assert done.fatal == ["Bacula closed a file before it was complete"]
    assert "E Bacula did not restore all of it" in done.heard()
    assert "C RESULT f" in done.heard()


@pytest.mark.parametrize("status", ["f", "E", "A", "e"])
def test_a_job_that_did_not_end_well_is_not_finished(
    daemon: Daemon, interface: int, status: str
) -> None:
    script: Script = [["handshake"], ["restore", {}]]
    file = f"file={STRING}|/r/a|3|1|5|0+5"
    done = daemon.run(interface, "restore", script, file, f"verdict={status}")
    assert done.heard()[-3:] == [f"C RESULT {status}", "C END", "T"]
    assert "C FINISH" not in done.heard()
    assert done.messages == []


def test_names_with_control_characters_are_refused(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], ["restore", {}]]
    done = daemon.run(interface, "restore", script, f"file={STRING}|/r/a\nC000003|3|1|5|0+5")
    assert done.fatal == ["a file of the backup has a name that cannot be restored"]
    done = daemon.run(interface, "restore", SERVE, f"file={STRING}|/r/a|3|1|5|0+5", "where=/r\nx")
    assert done.fatal == ["Where holds a control character"]
    assert done.status == "f"


def test_a_restore_of_nothing(daemon: Daemon, interface: int) -> None:
    done = daemon.run(interface, "restore", SERVE, "object=25|1|a|replicator: one|text")
    assert done.told == []
    assert done.status == "T"


def test_many_plugin_strings_find_an_end(daemon: Daemon) -> None:
    scripts: dict[str, Script] = {"start": SERVE}
    files = [f"file=replicator: {number}|/r/a|3|1|1|0+1" for number in range(33)]
    done = daemon.run_many(14, "restore", scripts, *files)
    assert done.fatal == ["a job can have 32 plugin strings at most"]
    assert done.status == "f"
    assert all("C RESULT f" in done.heard(number) for number in range(32))
