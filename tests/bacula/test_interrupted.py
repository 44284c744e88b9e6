# SPDX-License-Identifier: AGPL-3.0-or-later
"""Jobs that are cancelled, and processes that are killed or hang, in the middle of the data: each job is no good one, the
reference stays where it was, and the chain goes on.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.bacula.chains import change, images, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.director import Job, backends
from tests.bacula.gates import Gate, use_gates, wait_gone
from tests.bacula.lab import Lab

#: What happens to the job in its second Incremental, by the name of its VM.
MISHAPS = ("cancel", "kill", "hang", "storage")


@dataclass
class Story:
    """A Full, an Incremental that goes wrong, and an Incremental after it, of each VM."""

    lab: Lab
    fulls: dict[str, Job] = field(default_factory=dict)
    broken: dict[str, Job] = field(default_factory=dict)
    after: dict[str, Job] = field(default_factory=dict)
    sums: dict[str, dict[str, str]] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    left: list[int] = field(default_factory=list)


def break_jobs(story: Story, *mishaps: str) -> None:
    """Start an Incremental of each of these VMs, wait until all are in the middle of it, and let it happen."""
    lab = story.lab
    daemons, director = lab.daemons, lab.director
    gates = {name: Gate(lab, name) for name in mishaps}
    numbers = {name: director.start(name, "Incremental") for name in mishaps}
    story.pids |= {name: gate.wait() for name, gate in gates.items()}
    for name in mishaps:
        match name:
            case "cancel":
                director.cancel(numbers[name])
            case "kill":
                os.kill(story.pids[name], signal.SIGKILL)
            case "hang":
                os.kill(story.pids[name], signal.SIGSTOP)
            case "storage":
                daemons.stop_one("sd", signal.SIGKILL)
                gates[name].open()
                wait_gone(story.pids[name])
                daemons.start()
                # The file daemon has failed the job. A Director of 9.6.7 waits on, with any plugin.
                director.cancel(numbers[name])
            case "client":
                daemons.stop_one("lab-fd", signal.SIGKILL)
                wait_gone(story.pids[name])
                daemons.start()
    director.wait_all(*numbers.values())
    story.broken |= {name: director.job(number) for name, number in numbers.items()}
    for name, gate in gates.items():
        wait_gone(story.pids[name])
        gate.close()


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    with a_lab() as lab:
        use_gates(lab)
        told = Story(lab)
        for name in MISHAPS:
            vm = lab.vm(name, 24 << 20)
            lab.add_job(name, lab.plugin(name, "backend_timeout=5"))
            change(vm, 1)
        # More than sockets hold: it is not yet all on its way when a restore of it is interrupted.
        lab.vms["storage"].write("disk-0", 0, random.Random(1).randbytes(24 << 20))
        lab.start()
        told.fulls = lab.director.run_all(*MISHAPS)
        for vm in lab.vms.values():
            change(vm, 3)
        break_jobs(told, "cancel", "kill", "hang")
        told.left = backends(lab.daemons.pid("lab-fd"))
        break_jobs(told, "storage")
        lab.start()
        for vm in lab.vms.values():
            change(vm, 4)
        told.sums = {name: vm.sums() for name, vm in lab.vms.items()}
        told.after = lab.director.run_all(*MISHAPS, level="Incremental")
        yield told


@pytest.mark.parametrize("name", MISHAPS)
def test_the_job_is_no_good_one(story: Story, name: str) -> None:
    # Guards: fatal in IO_READ where the backend is gone; its time-out; event 14's flag (a cancelled job is not failed by us).
    job = story.broken[name]
    assert job.status in {"cancel": "A", "storage": "AfE"}.get(name, "fE"), job.log


def test_a_hung_backend_is_given_up_after_its_time(story: Story) -> None:
    assert re.search(r"Fatal error: replicator.*5 s", story.broken["hang"].log), story.broken[
        "hang"
    ].log


def test_a_killed_backend_is_named(story: Story) -> None:
    assert (
        "replicator-backend ended in the middle of the job (signal 9)" in story.broken["kill"].log
    )


def test_no_backend_is_left(story: Story) -> None:
    assert story.left == []
    assert backends(story.lab.daemons.pid("lab-fd")) == []


@pytest.mark.parametrize("name", MISHAPS)
def test_the_next_incremental_goes_on_from_the_full(story: Story, name: str) -> None:
    # Guard: references move only with RESULT T. A reference of the broken job would leave out what that job read.
    job = story.after[name]
    assert job.ok, job.log
    assert job.level == "I"
    assert "falling back to Full" not in job.log
    where = story.lab.folder / f"after-{name}"
    restored = story.lab.director.restore([story.fulls[name].id, job.id], where=str(where))
    assert restored.ok, restored.log
    assert sums_of(where) == story.sums[name]


def test_a_cancelled_restore_leaves_no_image(story: Story) -> None:
    # Bacula sets attributes and closes the file as if it were whole. Guard: the backend keeps nothing without RESULT T.
    lab = story.lab
    where = lab.folder / "cancelled"
    gate = Gate(lab, "cancel")
    number = lab.director.start_restore([story.fulls["cancel"].id], where=str(where))
    pid = gate.wait()
    lab.director.cancel(number)
    job = lab.director.wait(number)
    assert job.status == "A", job.log
    wait_gone(pid)
    gate.close()
    assert not images(where)


def test_a_restore_whose_storage_daemon_dies_leaves_no_image(story: Story) -> None:
    lab = story.lab
    where = lab.folder / "died"
    gate = Gate(lab, "storage")
    number = lab.director.start_restore([story.fulls["storage"].id], where=str(where))
    pid = gate.wait()
    lab.daemons.stop_one("sd", signal.SIGKILL)
    gate.open()
    wait_gone(pid)
    lab.start()
    lab.director.cancel(number)
    job = lab.director.wait(number)
    assert job.status in {"A", "f", "E"}, job.log
    gate.close()
    assert not images(where)


@pytest.mark.slow  # the Director waits a minute for what a dead file daemon says of its job
def test_a_file_daemon_that_is_killed_leaves_no_backend_and_no_reference() -> None:
    with a_lab() as lab:
        use_gates(lab)
        vm = lab.vm("client", 24 << 20)
        lab.add_job("client", lab.plugin("client"))
        lab.start()
        full = lab.director.run("client")
        story = Story(lab)
        change(vm, 1)
        break_jobs(story, "client")
        assert story.broken["client"].status in {"f", "E"}
        change(vm, 3)
        job = lab.director.run("client", "Incremental")
        assert job.ok, job.log
        assert "falling back to Full" not in job.log
        where = lab.folder / "back"
        assert lab.director.restore([full.id, job.id], where=str(where)).ok
        assert sums_of(where) == vm.sums()
