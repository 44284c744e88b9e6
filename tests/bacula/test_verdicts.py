# SPDX-License-Identifier: AGPL-3.0-or-later
"""No way in which a backend can fail leads to a job that says OK over a bad image: section 6 of shared/reference/bacula.md.

The file daemon and the plugin are real, the backend is ``fake_backend.py``. What Bacula does without the plugin's fatal
message stands in the comment of each row; leave that message out, and the row's test fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bacula.conftest import a_lab
from tests.bacula.daemons import CHECKOUT
from tests.bacula.director import Job, backends
from tests.bacula.lab import Lab

FAKE = f"exec {CHECKOUT}/.venv/bin/python {CHECKOUT}/tests/bacula/fake_backend.py"

BACKUP_FAULTS = {
    # IO_READ -1 in the middle of a disk: "Backup OK -- with warnings", a truncated image in the catalogue. Guard: fatal in IO_READ.
    "error@data": "the fake fails at data",
    "abort@data": "the fake gives up at data",
    "exit@data": "",
    "crash@data": "",
    "nonsense@data": "",
    "hang@data": "",
    "error@end_of_data": "the fake fails at end_of_data",
    # IO_OPEN fails: "with warnings", a file without data. Guard: fatal where DATA is awaited.
    "error@open": "the fake fails at open",
    "exit@open": "",
    # BackupCommand returns Error: "Backup OK", no files, no message. Guard: fatal while the backend is started.
    "error@params": "the fake fails at params",
    "error@start": "the fake fails at start",
    "nonsense@params": "",
    # startBackupFile is not OK on the first call: "Backup OK", no files. Guard: fatal where FNAME is awaited.
    "error@first_file": "the fake fails at first_file",
    "exit@first_file": "",
    "error@end_of_files": "the fake fails at end_of_files",
    # The backend cannot keep the reference: without a fatal message in event 4 the job would be OK.
    "error@result": "the fake fails at result",
    "exit@result": "",
}

RESTORE_FAULTS = {
    # createFile returns Error: "Restore OK -- with errors". Guard: fatal in createFile.
    "error@create": "the fake fails at create",
    "exit@create": "",
    # IO_WRITE fails: status E by itself, kept so.
    "error@write": "the fake fails at write",
    "crash@write": "",
    # IO_CLOSE's result is ignored. Guard: fatal in IO_CLOSE.
    "error@close": "the fake fails at close",
    # What is found out at the end. Guard: fatal in event 6.
    "error@finish": "the fake fails at finish",
    "error@result": "the fake fails at result",
}


@dataclass
class Seen:
    """All jobs of this module, by fault."""

    lab: Lab
    backups: dict[str, Job]
    restores: dict[str, Job]
    after: Job
    restored: Job
    daemon: tuple[int, int]
    left: list[int]


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    with a_lab() as lab:
        lab.set_backend(FAKE)
        for fault in BACKUP_FAULTS:
            lab.add_job(job_name(fault), f"replicator: fault={fault}")
        for fault in RESTORE_FAULTS:
            # A restore has the plugin string of the backup; this one goes wrong in restores only.
            lab.add_job(job_name(fault, "restored"), f"replicator: fault={fault} restores")
        lab.add_job("good", "replicator: fault=")
        lab.start()
        before = lab.daemons.pid("lab-fd")
        jobs = lab.director.run_all(
            *map(job_name, BACKUP_FAULTS), *(job_name(each, "restored") for each in RESTORE_FAULTS)
        )
        restores = {
            fault: lab.director.restore([jobs[job_name(fault, "restored")].id])
            for fault in RESTORE_FAULTS
        }
        after = lab.director.run("good")
        restored = lab.director.restore([after.id])
        daemon = before, lab.daemons.pid("lab-fd")
        yield Seen(lab, jobs, restores, after, restored, daemon, backends(daemon[1]))


def job_name(fault: str, prefix: str = "fault") -> str:
    return f"{prefix}-{fault.replace('@', '-').replace('_', '-')}"


@pytest.mark.parametrize("fault", BACKUP_FAULTS)
def test_a_backup_whose_backend_fails_is_no_good_backup(seen: Seen, fault: str) -> None:
    job = seen.backups[job_name(fault)]
    assert job.status == "f", job.log
    assert BACKUP_FAULTS[fault] in job.log
    assert "Fatal error" in job.log


@pytest.mark.parametrize("fault", RESTORE_FAULTS)
def test_a_restore_whose_backend_fails_is_no_good_restore(seen: Seen, fault: str) -> None:
    job = seen.restores[fault]
    assert job.status in {"f", "E"}, job.log
    assert RESTORE_FAULTS[fault] in job.log


def test_nothing_of_it_ends_the_daemon_or_stays_behind(seen: Seen) -> None:
    assert seen.daemon[0] == seen.daemon[1]
    assert seen.after.ok, seen.after.log
    assert seen.restored.ok, seen.restored.log
    assert seen.left == []
