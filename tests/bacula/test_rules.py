# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a chain does where Bacula's own bookkeeping would mislead it: accurate jobs, VirtualFull, jobs at once, what was lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bacula.chains import change, images, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.director import Job
from tests.bacula.gates import Gate, use_gates
from tests.bacula.lab import MIB, Lab

FALLS_BACK = "reference_snapshot not found"


@dataclass
class Virtual:
    """Jobs around a VirtualFull, and the disks' SHA-256 as each found them."""

    jobs: list[Job]
    sums: list[dict[str, str]]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with a_lab() as lab:
        use_gates(lab)
        for name in ("web", "twin", "lost", "again", "accurate", "virtual", "changed", "purged"):
            lab.vm(name, 12 * MIB)
        for name in ("lost", "again", "changed", "purged"):
            lab.add_job(name, lab.plugin(name))
        for name in ("accurate", "virtual"):
            lab.add_job(name, lab.plugin(name), lines=("Accurate = yes",))
        lab.add_job("first", lab.plugin("web"))
        lab.add_job("second", lab.plugin("web"))
        lab.start()
        yield lab


@dataclass
class Begun:
    """A Full of each Job at once, and an Incremental of most: alone, each would mostly wait for the Director."""

    fulls: dict[str, Job]
    first: dict[str, Job]
    sums: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def begun(lab: Lab) -> Begun:
    names = ("first", "second", "lost", "again", "accurate", "virtual", "changed", "purged")
    fulls = lab.director.run_all(*names)
    for vm in lab.vms.values():
        change(vm, 1)
    later = ("first", "again", "accurate", "virtual", "purged")
    first = lab.director.run_all(*later, level="Incremental")
    for job in (*fulls.values(), *first.values()):
        assert job.ok, job.log
    return Begun(fulls, first, {name: vm.sums() for name, vm in lab.vms.items()})


def restored(lab: Lab, *jobs: Job | int) -> dict[str, str]:
    """What these jobs restore to."""
    numbers = [job if isinstance(job, int) else job.id for job in jobs]
    where = lab.folder / f"restored-{'-'.join(map(str, numbers))}"
    done = lab.director.restore(numbers, where=str(where))
    assert done.ok, done.log
    return dict(sums_of(where))


def test_two_jobs_at_once_on_one_vm_are_two_chains(lab: Lab, begun: Begun) -> None:
    vm = lab.vms["web"]
    fulls, first = begun.fulls, begun.first["first"]
    change(vm, 3)
    both = lab.director.run_all("first", "second", level="Incremental")
    assert all(job.ok for job in both.values()), both["second"].log
    assert restored(lab, fulls["first"], first, both["first"]) == vm.sums()
    assert restored(lab, fulls["second"], both["second"]) == vm.sums()


def test_the_same_job_twice_at_once_is_refused_in_one_line(lab: Lab) -> None:
    # Guard: the job's folder of state is held by one process.
    gate = Gate(lab, "twin")
    lab.add_job("twin", lab.plugin("twin"), lines=("Allow Duplicate Jobs = yes",))
    lab.director.reload()
    first = lab.director.start("twin")
    gate.wait()
    second = lab.director.run("twin")
    gate.open()
    held = lab.director.wait(first)
    gate.close()
    assert second.status == "f", second.log
    assert "twin: Bacula job twin is backing it up already" in second.log
    assert held.ok, held.log
    assert restored(lab, held) == lab.vms["twin"].sums()


def test_a_state_that_was_lost_makes_a_full_and_says_so(lab: Lab, begun: Begun) -> None:
    # Guard: a chain that begins anew has an id of its own, though its parts are counted from one again.
    full = begun.fulls["lost"]
    shutil.rmtree(lab.state / "bacula" / "jobs" / "lost")
    job = lab.director.run("lost", "Incremental")
    assert job.status == "T", job.log
    assert FALLS_BACK in job.log
    assert "falling back to Full" in job.log
    assert restored(lab, full, job) == lab.vms["lost"].sums()
    assert restored(lab, job) == lab.vms["lost"].sums()


def test_a_full_that_is_run_again_begins_anew(lab: Lab, begun: Begun) -> None:
    # There is no `rerun` in Debian's Bacula: a job is run again.
    assert begun.first["again"].ok
    vm = lab.vms["again"]
    full = lab.director.run("again")
    change(vm, 3)
    job = lab.director.run("again", "Incremental")
    assert full.ok, full.log
    assert job.ok, job.log
    assert FALLS_BACK not in job.log
    assert restored(lab, full, job) == vm.sums()


def test_an_accurate_chain_keeps_the_files_that_it_stands_on(lab: Lab, begun: Begun) -> None:
    # Guard: checkFile answers Seen. Else the Full's image is marked deleted, and `current` restores deltas without it.
    vm = lab.vms["accurate"]
    assert begun.first["accurate"].ok
    change(vm, 3)
    job = lab.director.run("accurate", "Incremental")
    assert job.ok, job.log
    where = lab.folder / "accurate-current"
    done = lab.director.restore(
        "select current client=lab-fd fileset=accurate-files", where=str(where)
    )
    assert done.ok, done.log
    assert sums_of(where) == vm.sums()


@pytest.fixture(scope="module")
def virtual(lab: Lab, begun: Begun) -> Virtual:
    """Full, Incremental, Incremental, VirtualFull, Incremental, Differential; and the disks after the later steps."""
    vm = lab.vms["virtual"]
    jobs = [begun.fulls["virtual"], begun.first["virtual"]]
    sums = [{}, begun.sums["virtual"]]
    for step, level in enumerate(("Incremental", "VirtualFull", "Incremental", "Differential")):
        if level != "VirtualFull":
            change(vm, 10 + step)
        jobs.append(lab.director.run("virtual", level))
        sums.append(vm.sums())
    return Virtual(jobs, sums)


def test_a_virtual_full_alone_comes_back(lab: Lab, virtual: Virtual) -> None:
    # Pitfall 13: Bacula numbers parts anew after it. On 9.6.7 no restore object comes: the description files decide.
    job = virtual.jobs[3]
    assert job.ok, job.log
    assert restored(lab, job) == virtual.sums[3]


def test_an_incremental_after_a_virtual_full_comes_back(lab: Lab, virtual: Virtual) -> None:
    job = virtual.jobs[4]
    assert job.ok, job.log
    assert FALLS_BACK not in job.log
    assert restored(lab, virtual.jobs[3], job) == virtual.sums[4]


def test_a_differential_after_a_virtual_full_is_a_full_and_says_so(
    lab: Lab, virtual: Virtual
) -> None:
    # Bacula names the VirtualFull as the job before, which no file daemon ever ran.
    job = virtual.jobs[5]
    assert job.status == "T", job.log
    assert FALLS_BACK in job.log
    assert restored(lab, job) == virtual.sums[5]


def test_a_changed_plugin_string_makes_a_full(lab: Lab, begun: Begun) -> None:
    assert begun.fulls["changed"].ok
    lab.add_job("changed", lab.plugin("changed", "verbose=2"))
    lab.director.reload()
    job = lab.director.run("changed", "Incremental")
    assert job.level == "F", job.log
    assert job.ok, job.log
    lab.add_job("changed", lab.plugin("changed"), fileset=("Ignore FileSet Changes = yes",))
    lab.director.reload()
    lab.director.run("changed")
    lab.add_job(
        "changed", lab.plugin("changed", "verbose=2"), fileset=("Ignore FileSet Changes = yes",)
    )
    lab.director.reload()
    job = lab.director.run("changed", "Incremental")
    assert job.level == "I", job.log


def test_a_full_that_the_catalogue_has_forgotten_is_missed(lab: Lab, begun: Begun) -> None:
    full, job = begun.fulls["purged"], begun.first["purged"]
    lab.director.purge(full.id)
    where = lab.folder / "purged"
    done = lab.director.restore([job.id], where=str(where))
    assert done.status == "f", done.log
    assert full.name in done.log
    assert not images(where)
