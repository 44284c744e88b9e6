# SPDX-License-Identifier: AGPL-3.0-or-later
"""Backups that go well, estimates, listings and queries: what the backend says is what the file daemon gets."""

from __future__ import annotations

from tests.fd_plugin.driving import (
    STRING,
    VERSION_OF,
    Daemon,
    Script,
    catalogue_object,
    named_file,
    pattern,
    plain_file,
)

DISK = "@image/vm/disks/disk-0.raw"
END: Script = [["send", "F"], ["verdict"]]


def test_a_plain_file_comes_through_whole(daemon: Daemon, interface: int) -> None:
    size = 1_000_001
    done = daemon.run(interface, "backup", [["handshake"], *plain_file(DISK, size), *END])
    assert done.messages == []
    assert done.status == "T"
    assert done.file() == pattern(size)
    assert done.named("file") == [
        f"{DISK} type=3 flags=0 size={size} mode=100600 mtime=1700000001 nlink=1 link=-"
    ]
    # Every buffer but the last is full, whatever the packets' size.
    reads = [line.split()[1] for line in done.named("read")]
    assert set(reads[:-1]) == {"65536"}
    assert done.named("endfile") == ["0"]


def test_holes_are_not_sent(daemon: Daemon, interface: int) -> None:
    size = 10 << 20
    script: Script = [
        ["handshake"],
        *named_file(DISK, size, addressed=True),
        ["send", "C", "DATA"],
        ["data", 0, 100_000, 30_000],
        ["data", 100_000, 5],
        ["data", 1 << 20, 200_000],
        ["data", size - 1, 1],
        ["send", "F"],
        *END,
    ]
    done = daemon.run(interface, "backup", script)
    assert done.status == "T"
    assert done.named("file")[0].startswith(f"{DISK} type=3 flags=40000000 size={size} ")
    # Packets that lie one behind the other fill one buffer; a gap ends it.
    assert done.named("read") == [
        "0 65528",
        f"65528 {100_005 - 65528}",
        *(f"{(1 << 20) + at} {min(65528, 200_000 - at)}" for at in range(0, 200_000, 65528)),
        f"{size - 1} 1",
    ]
    expected = bytearray(size)
    expected[:100_000] = pattern(100_000, 30_000)
    expected[100_000:100_005] = pattern(5)
    expected[1 << 20 : (1 << 20) + 200_000] = pattern(200_000)
    assert done.file() == expected


def test_small_buffers_and_packets(daemon: Daemon, interface: int) -> None:
    data: Script = [["send", "C", "DATA"], ["data", None, 5000, 7], ["send", "F"]]
    script: Script = [["handshake"], *named_file(DISK, 5000), *data, *END]
    done = daemon.run(interface, "backup", script, "count=13")
    assert done.file() == pattern(5000, 7)


def test_files_folders_options_and_objects_in_order(daemon: Daemon, interface: int) -> None:
    text = "description " * 1000
    script: Script = [
        ["handshake"],
        *catalogue_object("RestoreOptions", "# options", "PLUGINCONF"),
        *named_file("@image/vm/", 0, kind="D"),
        ["send", "F"],
        *named_file("@image/vm/empty", 0, kind="E"),
        ["send", "F"],
        *plain_file("@image/vm/a", 10),
        *named_file("@image/vm/hole", 1 << 40, addressed=True),
        ["send", "C", "DATA"],
        ["send", "F"],
        *plain_file("@image/vm/b", 70_000),
        *catalogue_object("description", text),
        *catalogue_object("second", "x"),
        *END,
    ]
    done = daemon.run(interface, "backup", script)
    assert done.messages == []
    assert done.status == "T"
    files = [line.split()[:3] for line in done.named("file")]
    assert files == [
        ["RestoreOptions", "type=27", "flags=0"],
        ["@image/vm/", "type=5", "flags=0"],
        ["@image/vm/empty", "type=2", "flags=0"],
        ["@image/vm/a", "type=3", "flags=0"],
        ["@image/vm/hole", "type=3", "flags=40000000"],
        ["@image/vm/b", "type=3", "flags=0"],
        ["description", "type=25", "flags=0"],
        ["second", "type=25", "flags=0"],
    ]
    assert "mode=40600" in done.named("file")[1]
    assert done.named("file")[1].endswith("link=@image/vm/")
    assert (done.file(2), done.file(3), done.file(4)) == (b"", pattern(10), b"")
    assert done.file(5) == pattern(70_000)
    assert (done.out / "object-0-6").read_text() == text
    assert done.named("endfile") == ["3"] * 7 + ["0"]


def test_what_the_backend_is_told_about_the_job(daemon: Daemon, interface: int) -> None:
    done = daemon.run(
        interface,
        "backup",
        [["handshake"], *END],
        "level=I",
        "since=1700000000",
        "previous=Test.2026-11-24_10.00.00_01",
        "accurate=1",
        "where=/wrong",
        "-c",
        "../../../../../../../etc/hostname",
    )
    assert done.heard() == [
        "C Hello replicator 3 ext=1",
        "C Job",
        "C Name=Test.2026-11-25_10.00.00_03",
        "C JobID=1",
        "C Type=B",
        "C Level=I",
        "C Since=1700000000",
        "C PrevJobName=Test.2026-11-24_10.00.00_01",
        "C Accurate=1",
        "C WorkingDir=/working",
        "C Client=test-client",
        f"C FDVersion={VERSION_OF[interface]}",
        f"C Interface={interface}",
        "C FDConfig=/etc/hostname",
        "F",
        "C Params",
        "C PluginString= one",
        "F",
        "C BackupStart",
        "C RESULT T",
        "C END",
        "T",
    ]


def test_what_is_not_set_is_not_told(daemon: Daemon, interface: int) -> None:
    done = daemon.run(interface, "backup", [["handshake"], *END], "client=")
    keys = [text.partition("=")[0].removeprefix("C ") for text in done.heard()]
    assert not {"Since", "PrevJobName", "Client", "FDConfig", "Where", "Replace"} & set(keys)
    assert "C Level=F" in done.heard()


def test_messages_keep_their_weight_in_both_versions(daemon: Daemon, interface: int) -> None:
    script: Script = [
        ["handshake"],
        ["send", "I", "for your information"],
        ["send", "W", "a warning"],
        ["send", "K"],
        ["send", "Q", "an error that the job survives"],
        *named_file(DISK, 3),
        ["send", "I", "among the data"],
        ["send", "C", "DATA"],
        ["send", "K"],
        ["data", None, 3],
        ["send", "W", "100 %n%n%s %d of it"],
        ["send", "F"],
        *END,
    ]
    done = daemon.run(interface, "backup", script)
    assert done.messages == [
        "INFO replicator: for your information",
        "WARNING replicator: a warning",
        "ERROR replicator: an error that the job survives",
        "INFO replicator: among the data",
        "WARNING replicator: 100 %n%n%s %d of it",
    ]
    assert done.status == "T"


def test_messages_are_one_clean_line(daemon: Daemon, interface: int) -> None:
    long = "ä" * 3000
    script: Script = [
        ["handshake"],
        ["send", "I", long],
        ["raw", "I000009\na\nb\x00c\x1b[m\n"],
        ["raw", "W000004\n\xff\xc3\xa4\xc3"],
        ["raw", "I000000\n"],
        ["raw", "I000002\n \n"],
        *END,
    ]
    done = daemon.run(interface, "backup", script)
    assert done.messages == [
        f"INFO replicator: {long[:950]}",
        "INFO replicator: a?b?c?[m",
        "WARNING replicator: ?ä?",
        "INFO replicator: replicator-backend gives no reason",
        "INFO replicator: replicator-backend gives no reason",
    ]


def test_a_flood_of_messages_ends(daemon: Daemon) -> None:
    flood: Script = [["raw", "I000002\nx\n" * 5000]]
    done = daemon.run(14, "backup", [["handshake"], *flood, *END])
    assert len(done.messages) == 2001
    assert "further messages are left out" in done.messages[-1]
    assert done.status == "T"


def test_standard_error_is_an_error_of_the_job(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], ["stderr", "Traceback\nof %s\n\npart"], *END]
    done = daemon.run(interface, "backup", script)
    assert done.messages == [
        "ERROR replicator: Traceback",
        "ERROR replicator: of %s",
        "ERROR replicator: part",
    ]
    assert done.status == "T"


def test_the_backend_inherits_nothing_of_the_daemon(daemon: Daemon, interface: int) -> None:
    done = daemon.run(interface, "backup", [["handshake"], ["descriptors"], *END])
    (found,) = [entry[1] for entry in done.told[0] if entry[0] == "descriptors"]
    # host.c holds 50; what there may be is the listing's own.
    assert 50 not in found
    assert len(found) <= 1


def test_two_lines_have_a_backend_each(daemon: Daemon, interface: int) -> None:
    scripts: dict[str, Script] = {
        "start": [["handshake"], ["choose"]],
        "one": [*plain_file("a", 5), *END],
        "two": [*plain_file("b", 6), *END],
    }
    strings = ("string=replicator: one", "string=replicator: two with more")
    done = daemon.run_many(interface, "backup", scripts, *strings)
    assert done.messages == []
    assert [line.split()[0] for line in done.named("file")] == ["a", "b"]
    assert all("C RESULT T" in done.heard(number) for number in (0, 1))
    assert done.status == "T"


def test_the_same_line_twice_fails_the_job(daemon: Daemon, interface: int) -> None:
    scripts: dict[str, Script] = {"start": [["handshake"], *plain_file("a", 5), *END]}
    done = daemon.run_many(interface, "backup", scripts, f"string={STRING}", f"string={STRING}")
    assert done.fatal == ["two Plugin lines of the FileSet are the same"]
    assert "C RESULT f" in done.heard()


def test_names_of_the_job_before_are_asked_of_who_claims_them(
    daemon: Daemon, interface: int
) -> None:
    script: Script = [
        ["handshake", "CLAIM:@image/", "CLAIM:@other/"],
        *plain_file(DISK, 1),
        ["send", "F"],
        ["until", "C", "CHECKFILE:"],
        ["send", "C", "SEEN"],
        ["until", "C", "CHECKFILE:"],
        ["send", "I", "looking"],
        ["send", "C", "GONE"],
        ["verdict"],
    ]
    names = ("@image/vm/x", "@nobody/y", "/etc/passwd", "@other/z")
    done = daemon.run(
        interface, "backup", script, "accurate=1", *(f"check={name}" for name in names)
    )
    assert done.named("check") == ["@image/vm/x 5", "@nobody/y 0", "/etc/passwd 0", "@other/z 0"]
    assert [text for text in done.heard() if "CHECKFILE" in text] == [
        "C CHECKFILE:@image/vm/x",
        "C CHECKFILE:@other/z",
    ]
    assert done.status == "T"


def test_of_a_failed_line_nothing_is_taken_for_deleted(daemon: Daemon, interface: int) -> None:
    script: Script = [
        ["handshake", "CLAIM:@image/"],
        *plain_file(DISK, 1),
        ["send", "F"],
        ["until", "C", "CHECKFILE:"],
        ["send", "C", "PERHAPS"],
        ["until", "T"],
    ]
    done = daemon.run(interface, "backup", script, "check=@image/a", "check=@image/b")
    assert done.named("check") == ["@image/a 5"]
    assert done.fatal == ["replicator-backend said out of turn: PERHAPS"]


def test_estimate(daemon: Daemon, interface: int) -> None:
    script: Script = [
        ["handshake"],
        *named_file("a", 1 << 30),
        *named_file("b/", 0, kind="D"),
        ["send", "F"],
        ["end"],
    ]
    done = daemon.run(interface, "estimate", script)
    assert done.messages == []
    assert [line.split()[0] for line in done.named("file")] == ["a", "b/"]
    assert {"C Type=E", "C EstimateStart", "C END", "T"} <= set(done.heard())
    assert not any("RESULT" in text for text in done.heard())


def test_an_empty_estimate(daemon: Daemon, interface: int) -> None:
    done = daemon.run(interface, "estimate", [["handshake"], ["send", "F"], ["end"]])
    assert done.messages == []
    assert done.named("start") == ["1"]


def test_a_listing_is_told_by_its_string(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], *named_file("vm/", 0, kind="D"), ["send", "F"], ["end"]]
    string = "string=replicator: one listing=/"
    done = daemon.run_many(interface, "estimate", {"start": script}, string)
    assert {"C Type=E", "C ListingStart", "C PluginString= one listing=/"} <= set(done.heard())


def test_a_query(daemon: Daemon) -> None:
    script: Script = [
        ["handshake"],
        ["send", "C", "vm=first"],
        ["send", "C", "vm=second"],
        ["send", "F"],
        ["until", "T"],
    ]
    done = daemon.run(23, "query", script, "parameter=vm")
    assert done.named("query") == ["3 vm=first", "3 vm=second", "0 -"]
    assert {"C Type=E", "C QueryStart", "C query=vm"} <= set(done.heard())
    assert done.messages == []


def test_a_query_that_fails_says_why(daemon: Daemon) -> None:
    script: Script = [["handshake"], ["send", "E", "no such parameter"], ["until", "T"]]
    done = daemon.run(23, "query", script, "parameter=nonsense")
    assert done.named("query") == ["2 -"]
    assert done.fatal == ["no such parameter"]


def test_a_backup_and_a_restore_at_once(daemon: Daemon, interface: int) -> None:
    """Two jobs, two threads, one plugin."""
    scripts: dict[str, Script] = {
        "start": [["handshake"], ["choose"]],
        "one": [*plain_file("a", 3_000_000), *END],
        "back": [["restore", {}], ["send", "F"], ["verdict"]],
    }
    done = daemon.run_many(
        interface,
        "threads",
        scripts,
        "string=replicator: one",
        "file=replicator: back|/to/b|3|1|2000000|0+2000000",
    )
    assert done.messages == []
    assert done.file() == pattern(3_000_000)
    assert (done.named("end", 0), done.named("end", 1)) == (["T"], ["T"])
    assert sorted(len(data) for data in done.data) == [0, 2_000_000]
