# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backend that crashes, hangs or speaks nonsense: the job fails in words, the daemon goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fd_plugin.driving import STRING, Daemon, Script, Step, named_file, plain_file

DISK = "@image/vm/disks/disk-0.raw"
FILE = f"file={STRING}|/r/a|3|1|1000000|0+1000000"

#: Where a backup can go wrong: what was said before.
BACKUP_PLACES: dict[str, list[Step]] = {
    "at once": [],
    "before Hello": [["until", "C", "Hello"]],
    "before the job": [
        ["until", "C", "Hello"],
        ["send", "C", "Hello Bacula ext=1"],
        ["until", "F"],
    ],
    "at the start": [
        ["until", "C", "Hello"],
        ["send", "C", "Hello Bacula ext=1"],
        *([["until", "F"], ["send", "F"]] * 2),
        ["until", "C", "BackupStart"],
    ],
    "before a file": [["handshake"]],
    "in a file's head": [["handshake"], *named_file(DISK, 500_000)[:2]],
    "before data": [["handshake"], *named_file(DISK, 500_000)],
    "among data": [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["data", None, 100_000],
    ],
    "within a packet": [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["raw", "D100000\n" + "x" * 70_000],
    ],
    "within a header": [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["raw", "D10"],
    ],
    "after data": [
        ["handshake"],
        *named_file(DISK, 500_000),
        ["send", "C", "DATA"],
        ["data", None, 500_000],
    ],
    "after a file": [["handshake"], *plain_file(DISK, 500_000)],
    "in an object": [
        ["handshake"],
        ["send", "C", "RESTOREOBJ:a"],
        ["send", "C", "RESTOREOBJ_LEN:9"],
        ["raw", "D000004\nabcd"],
    ],
    "at the verdict": [
        ["handshake"],
        *plain_file(DISK, 9),
        ["send", "F"],
        ["until", "C", "RESULT"],
    ],
}
#: Where a restore can.
RESTORE_PLACES: dict[str, list[Step]] = {
    "at an object": [["handshake"], ["until", "F"]],
    "at a file": [["handshake"], ["until", "F"], ["send", "C", "OK"], ["until", "C", "FNAME"]],
    "among data": [
        ["handshake"],
        *([["until", "F"], ["send", "C", "OK"]] * 2),
        ["until", "C", "DATA"],
        ["until", "B"],
    ],
    "after data": [
        ["handshake"],
        *([["until", "F"], ["send", "C", "OK"]] * 2),
        ["until", "C", "DATA"],
        ["until", "F"],
    ],
    "at FINISH": [["handshake"], ["restore", {}]],
    "at the verdict": [
        ["handshake"],
        ["restore", {}],
        ["send", "F"],
        ["until", "C", "RESULT"],
    ],
}
OBJECT = f"object=25|1|description|{STRING}|text"
#: How, and what of it the operator reads.
FAULTS: dict[str, tuple[list[Step], str]] = {
    "crash": ([["kill"]], "replicator-backend ended in the middle of the job (signal 9)"),
    "exit": ([["exit", 3]], "replicator-backend ended in the middle of the job (exit code 3)"),
    "early end": ([["exit", 0]], "replicator-backend ended in the middle of the job"),
    "nonsense": ([["raw", "this is no packet of any protocol\n" * 9]], "sent what is no packet"),
}
#: In the middle of a packet nothing is nonsense.
WITHIN = {"within a packet", "within a header"}


def check_failed(done: Any, text: str) -> None:
    assert done.status == "f", done.lines
    assert any(text in line for line in done.fatal), done.messages


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", BACKUP_PLACES)
def test_in_a_backup(daemon: Daemon, interface: int, place: str, fault: str) -> None:
    steps, text = FAULTS[fault]
    if place in WITHIN and fault not in {"crash", "exit", "early end"}:
        text = ""
        steps = [*steps, ["exit", 0]]
    check_failed(daemon.run(interface, "backup", [*BACKUP_PLACES[place], *steps]), text)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", RESTORE_PLACES)
def test_in_a_restore(daemon: Daemon, interface: int, place: str, fault: str) -> None:
    steps, text = FAULTS[fault]
    done = daemon.run(interface, "restore", [*RESTORE_PLACES[place], *steps], FILE, OBJECT)
    check_failed(done, text)


@pytest.mark.parametrize("status", ["E", "A"])
@pytest.mark.parametrize("place", [place for place in BACKUP_PLACES if place not in WITHIN])
def test_an_error_anywhere_in_a_backup_fails_it(
    daemon: Daemon, interface: int, place: str, status: str
) -> None:
    script: Script = [*BACKUP_PLACES[place], ["send", status, "it %s went wrong"]]
    if place != "at the verdict":
        script = [*script, ["verdict"]]
    done = daemon.run(interface, "backup", script)
    check_failed(done, "it %s went wrong")
    if place != "at the verdict":
        assert done.fatal == ["it %s went wrong"]
        assert done.heard()[-3:] == ["C RESULT f", "C END", "T"]


@pytest.mark.parametrize("place", RESTORE_PLACES)
def test_an_error_anywhere_in_a_restore_fails_it(
    daemon: Daemon, interface: int, place: str
) -> None:
    script: Script = [*RESTORE_PLACES[place], ["send", "E", "it went wrong"]]
    script = [*script, ["end"] if place == "at the verdict" else ["verdict"]]
    done = daemon.run(interface, "restore", script, FILE, OBJECT)
    check_failed(done, "it went wrong")


@pytest.mark.parametrize(
    "place", ["before a file", "among data", "within a packet", "at the verdict"]
)
def test_a_backend_that_hangs_is_given_up(daemon: Daemon, interface: int, place: str) -> None:
    script = [
        ["handshake", "TIMEOUT:1"] if step == ["handshake"] else step
        for step in BACKUP_PLACES[place]
    ]
    done = daemon.run(interface, "backup", [*script, ["hang"]])
    check_failed(done, "replicator-backend was not heard of for 1 s")


def test_signs_of_life_are_heard(daemon: Daemon) -> None:
    """For longer than the time-out there is nothing but K."""
    script: Script = [
        ["handshake", "TIMEOUT:3"],
        *([["alive", 0.1]] * 35),
        *plain_file(DISK, 9),
        ["send", "F"],
        ["verdict"],
    ]
    assert daemon.run(14, "backup", script).status == "T"


def test_a_backend_that_does_not_read_is_given_up(daemon: Daemon, interface: int) -> None:
    script: Script = [
        ["handshake", "TIMEOUT:1"],
        ["until", "F"],
        ["send", "C", "OK"],
        ["hang"],
    ]
    big = f"file={STRING}|/r/a|3|1|4000000|0+4000000"
    done = daemon.run(interface, "restore", script, big)
    check_failed(done, "replicator-backend was not heard of for 1 s")
    assert done.named("write-failed")


def test_a_backend_that_will_not_end_is_killed(daemon: Daemon) -> None:
    script: Script = [["handshake", "TIMEOUT:1"], *named_file(DISK, 9), ["deaf"]]
    done = daemon.run(14, "backup", script)
    check_failed(done, "replicator-backend was not heard of for 1 s")
    (pid,) = done.pids
    assert not Path(f"/proc/{pid}").exists()


def test_a_backend_that_stays_after_its_job_is_ended(daemon: Daemon, interface: int) -> None:
    """It has closed its output, and still runs: the end of it is its end."""
    script: Script = [["handshake"], *named_file(DISK, 9), ["close"], ["hang"]]
    done = daemon.run(interface, "backup", script)
    check_failed(done, "replicator-backend ended in the middle of the job (signal 15)")


def test_an_exit_code_after_a_good_job_is_a_warning(daemon: Daemon, interface: int) -> None:
    script: Script = [["handshake"], *plain_file(DISK, 9), ["send", "F"], ["verdict"], ["exit", 5]]
    done = daemon.run(interface, "backup", script)
    assert done.messages == [
        "WARNING replicator: replicator-backend did not end well after the job (exit code 5)"
    ]
    assert done.status == "T"


@pytest.mark.parametrize("answer", ["RESULT", "RESULT NO", "OK", "FNAME:x"])
def test_only_one_answer_confirms_a_verdict(daemon: Daemon, interface: int, answer: str) -> None:
    script: Script = [*BACKUP_PLACES["at the verdict"], ["send", "C", answer], ["end"]]
    check_failed(daemon.run(interface, "backup", script), "did not confirm the end of the job")


def test_what_was_on_its_way_is_thrown_away(daemon: Daemon, interface: int) -> None:
    """The daemon has left off in the middle of a file: storage failed."""
    script: Script = [
        ["handshake"],
        *named_file(DISK, 3_000_000),
        ["send", "C", "DATA"],
        ["data", None, 3_000_000],
        ["send", "F"],
        *plain_file("next", 10),
        ["send", "F"],
        ["verdict"],
    ]
    done = daemon.run(interface, "backup", script, "reads_max=3")
    assert done.fatal == [f"{DISK} is not complete"]
    assert done.heard()[-3:] == ["C RESULT f", "C END", "T"]


@pytest.mark.parametrize(
    "hello", ["Hello Bacula", "Hello Bacula ext=2", "Hello", "hello bacula ext=1", ""]
)
def test_another_backend_is_told_apart(daemon: Daemon, interface: int, hello: str) -> None:
    done = daemon.run(interface, "backup", [["until", "C", "Hello"], ["send", "C", hello]])
    check_failed(done, "replicator-fd.so and replicator-backend were not installed together")


def test_last_words_are_heard(daemon: Daemon, interface: int) -> None:
    """It says why, and is gone before it was told everything."""
    script: Script = [
        ["until", "C", "Hello"],
        ["send", "C", "Hello Bacula ext=1"],
        ["send", "A", "no configuration file"],
        ["exit", 2],
    ]
    done = daemon.run(interface, "backup", script)
    check_failed(done, "no configuration file")


def test_a_broken_pipe_does_not_end_the_daemon(daemon: Daemon, interface: int) -> None:
    script: Script = [
        ["handshake"],
        ["until", "F"],
        ["send", "C", "OK"],
        ["until", "C", "DATA"],
        ["kill"],
    ]
    big = f"file={STRING}|/r/a|3|1|9000000|0+9000000"
    done = daemon.run(interface, "restore", script, big, "sigpipe=default")
    check_failed(done, "replicator-backend ended in the middle of the job (signal 9)")


LIES: dict[str, list[Step]] = {
    "too long": [["raw", "C1000000\n"]],
    "no status": [["raw", "T000000\n"]],
    "F with bytes": [["raw", "F000001\nx"]],
    "a length with a sign": [["raw", "C+00001\nx"]],
    "a length without an end": [["raw", "C0000010x"]],
    "data of a hole": [
        *named_file(DISK, 99, addressed=True),
        ["send", "C", "DATA"],
        ["data", None, 9],
    ],
    "addresses of a plain file": [*named_file(DISK, 99), ["send", "C", "DATA"], ["data", 0, 9]],
    "backwards": [
        *named_file(DISK, 99, addressed=True),
        ["send", "C", "DATA"],
        ["data", 50, 9],
        ["data", 58, 9],
    ],
    "beyond the end": [
        *named_file(DISK, 99, addressed=True),
        ["send", "C", "DATA"],
        ["data", 90, 10],
    ],
    "beyond all numbers": [
        *named_file(DISK, 99, addressed=True),
        ["send", "C", "DATA"],
        ["raw", "B000009\n" + "\xff" * 9],
    ],
    "address without data": [
        *named_file(DISK, 99, addressed=True),
        ["send", "C", "DATA"],
        ["raw", "B000008\n" + "\0" * 8],
    ],
    "no size": [["send", "C", "FNAME:x"], ["send", "F"]],
    "no name": [["send", "C", "FNAME:"]],
    "negative size": [["send", "C", "FNAME:x"], ["send", "C", "STAT:F -1 0 0 600 1"]],
    "huge size": [["send", "C", "FNAME:x"], ["send", "C", f"STAT:F {1 << 63} 0 0 600 1"]],
    "decimal mode": [["send", "C", "FNAME:x"], ["send", "C", "STAT:F 1 0 0 698 1"]],
    "kind of file": [["send", "C", "FNAME:x"], ["send", "C", "STAT:L 1 0 0 600 1"]],
    "times": [["send", "C", "FNAME:x"], ["send", "C", "TSTAMP:1 2"]],
    "attributes without end": [["send", "C", "FNAME:x"], *([["send", "C", "TSTAMP:1 2 3"]] * 99)],
    "long name": [["send", "C", "FNAME:" + "x" * 9000]],
    "control characters": [["send", "C", "FNAME:a\nb"]],
    "zero in a name": [["raw", "C000009\nFNAME:a\0b"]],
    "unknown command": [["send", "C", "REMOVE:/"]],
    "data without a file": [["data", None, 9]],
    "a file after an object": [
        ["send", "C", "RESTOREOBJ:a"],
        ["send", "C", "RESTOREOBJ_LEN:1"],
        ["raw", "D000001\nx"],
        ["send", "F"],
        ["send", "C", f"FNAME:{DISK}"],
    ],
    "an object that is too short": [
        ["send", "C", "RESTOREOBJ:a"],
        ["send", "C", "RESTOREOBJ_LEN:2"],
        ["raw", "D000001\nx"],
        ["send", "F"],
    ],
    "an object that is too long": [
        ["send", "C", "RESTOREOBJ:a"],
        ["send", "C", "RESTOREOBJ_LEN:2"],
        ["raw", "D000003\nxyz"],
    ],
    "a huge object": [["send", "C", "RESTOREOBJ:a"], ["send", "C", "RESTOREOBJ_LEN:16777217"]],
    "an empty object": [["send", "C", "RESTOREOBJ:a"], ["send", "C", "RESTOREOBJ_LEN:0"]],
}


@pytest.mark.parametrize("lie", LIES)
def test_what_the_protocol_does_not_allow_fails_the_job(
    daemon: Daemon, interface: int, lie: str
) -> None:
    done = daemon.run(interface, "backup", [["handshake"], *LIES[lie], ["until", "T"]])
    assert done.status == "f"
    assert done.fatal[0].startswith(("replicator-backend said", "replicator-backend sen"))
    assert not any("RESULT T" in text for text in done.heard())


@pytest.mark.parametrize(
    "extra", ["TIMEOUT:0", "TIMEOUT:86401", "TIMEOUT:x", "TIMEOUT:", "CLAIM:", "STRIP:1", "OK"]
)
def test_what_is_said_before_the_start_is_checked(
    daemon: Daemon, interface: int, extra: str
) -> None:
    done = daemon.run(interface, "backup", [["handshake", extra], ["until", "T"]])
    check_failed(done, f"replicator-backend said while it got ready: {extra}")


def test_claims_find_an_end(daemon: Daemon) -> None:
    claims = [f"CLAIM:@{number}/" for number in range(65)]
    done = daemon.run(14, "backup", [["handshake", *claims], ["until", "T"]])
    check_failed(done, "claims more than 64 names")


@pytest.mark.parametrize("wrong", ["bad_size", "bad_end"])
@pytest.mark.parametrize(
    ("what", "packet"),
    [
        ("backup", "save"),
        ("backup", "open"),
        ("backup", "read"),
        ("backup", "close"),
        ("backup", "xacl"),
        ("restore", "object"),
        ("restore", "restore"),
        ("restore", "open"),
        ("restore", "write"),
        ("restore", "seek"),
        ("restore", "close"),
        ("query", "query"),
    ],
)
def test_a_packet_of_another_layout_fails_the_job(
    daemon: Daemon, interface: int, what: str, packet: str, wrong: str
) -> None:
    if what == "query":
        interface = 23
    scripts: dict[str, Script] = {
        "backup": [["handshake"], *plain_file(DISK, 70_000), ["send", "F"], ["verdict"]],
        "restore": [["handshake"], ["restore", {}], ["send", "F"], ["verdict"]],
        "query": [["handshake"], ["send", "F"], ["until", "T"]],
    }
    ranges = f"file={STRING}|/r/a|3|1|900|0+3,500+3"
    done = daemon.run(interface, what, scripts[what], ranges, OBJECT, f"{wrong}={packet}")
    check_failed(done, "unknown layout")
    assert not any(
        "RESULT T" in text for told in range(len(done.told)) for text in done.heard(told)
    )


def test_bacula_does_not_get_away_with_good_over_a_failure(daemon: Daemon, interface: int) -> None:
    """Storage confirmed a job whose line the daemon had silently left."""
    script: Script = [["handshake"], *plain_file(DISK, 9), *plain_file("second", 9), ["verdict"]]
    done = daemon.run(interface, "backup", script, "files_max=1")
    check_failed(done, "the job is not complete, although Bacula took it for good")
    assert "C RESULT f" in done.heard()
