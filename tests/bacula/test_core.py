# SPDX-License-Identifier: AGPL-3.0-or-later
"""A chain of a VM of images through a real Bacula and back, on each version; that of Debian 13 in scripts/test-all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bacula.chains import LEVELS, PARTS, Chain, change, images, run_chain, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.lab import MIB

VERSIONS = ["9.6.7", pytest.param("15.0.3", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=VERSIONS)
def chain(request: pytest.FixtureRequest) -> Iterator[Chain]:
    with a_lab(debian13=request.param == "15.0.3") as lab:
        vm = lab.vm("web")
        lab.add_job("web", lab.plugin("web"))
        lab.start()
        done = run_chain(lab, "web", LEVELS, lambda step: change(vm, step), vm.sums)
        yield done


def test_every_job_of_the_chain_is_good_and_of_its_level(chain: Chain) -> None:
    for level, job in zip(LEVELS, chain.jobs, strict=True):
        assert job.ok, job.log
        assert job.level == level[0], job.log
        assert "Backup complete: VM=web disks=2 bytes=" in job.log
        assert "Selected 1 VM(s) for backup" in job.log
        assert "falling back to Full" not in job.log


def test_an_incremental_holds_what_changed(chain: Chain) -> None:
    full, *later = chain.jobs
    # An eighth and a bit of the disks are no holes.
    assert 6 * MIB < full.size < 12 * MIB
    for job in later:
        assert 0 < job.size < (full.size if job.level == "D" else full.size / 2), job.log


def test_deltas_have_names_of_their_own(chain: Chain) -> None:
    names = [name for job in chain.jobs for name in chain.lab.director.files(job.id)]
    deltas = [name for name in names if name.endswith(".phcbt")]
    assert len(deltas) == len(set(deltas)) == 2 * (len(LEVELS) - 1)
    full = chain.lab.director.files(chain.jobs[0].id)
    assert "@image/web/disks/disk-0.raw" in full
    assert "@image/web/disks/disk-1.raw" in full


def test_the_description_is_in_the_catalogue_and_in_the_backup(chain: Chain) -> None:
    for job in chain.jobs:
        (ours,) = [name for name, kind in chain.lab.director.objects(job.id) if kind == 25]
        assert ours.startswith("replicator/")
        names = chain.lab.director.files(job.id)
        assert len([name for name in names if "/description." in name]) == 1


@pytest.mark.parametrize("point", range(len(PARTS)))
def test_each_point_comes_back_to_files(chain: Chain, point: int) -> None:
    where = chain.lab.folder / f"point-{point}"
    job = chain.lab.director.restore(chain.ids(point), where=str(where))
    assert job.ok, job.log
    assert sums_of(where) == chain.sums[point]
    assert not [path for path in where.rglob("*") if path.suffix in {".phcbt", ".part"}]


def test_current_is_the_newest(chain: Chain) -> None:
    where = chain.lab.folder / "current"
    job = chain.lab.director.restore(
        "select current client=lab-fd fileset=web-files", where=str(where)
    )
    assert job.ok, job.log
    assert sums_of(where) == chain.sums[-1]


def test_holes_come_back_as_holes(chain: Chain) -> None:
    where = chain.lab.folder / "point-0-again"
    assert chain.lab.director.restore(chain.ids(0), where=str(where)).ok
    path = images(where)["disk-0"]
    assert path.stat().st_blocks * 512 < path.stat().st_size / 2


def test_a_chain_without_its_full_is_refused_and_names_it(chain: Chain) -> None:
    where = chain.lab.folder / "incomplete"
    job = chain.lab.director.restore([chain.jobs[1].id, chain.jobs[2].id], where=str(where))
    assert job.status == "f", job.log
    assert chain.jobs[0].name in job.log
    assert not images(where)


def test_a_chain_with_a_gap_is_refused_and_names_the_missing_job(chain: Chain) -> None:
    where = chain.lab.folder / "gap"
    job = chain.lab.director.restore([chain.jobs[0].id, chain.jobs[2].id], where=str(where))
    assert job.status == "f", job.log
    assert chain.jobs[1].name in job.log
    assert not images(where)
