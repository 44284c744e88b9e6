# SPDX-License-Identifier: AGPL-3.0-or-later
"""Compression, signature and encryption of a FileSet hold for the plugin's files too, deltas included."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bacula.chains import Chain, change, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.daemons import Daemons
from tests.bacula.lab import MIB, PATTERN, PKI_CLIENT, Lab

POOL = """Pool {
  Name = Sealed
  Pool Type = Backup
  Label Format = "Sealed-"
  Maximum Volumes = 50
  AutoPrune = no
  Recycle = no
}
"""
OPTIONS = {
    "plain": "signature = SHA1",
    "lzo": "signature = SHA1; compression = LZO",
    "gzip": "signature = SHA256; compression = GZIP1",
    "sealed": "signature = SHA1",
}


@dataclass
class Chains:
    """A Full and an Incremental for each kind of FileSet, of one VM."""

    lab: Lab
    chains: dict[str, Chain]


@pytest.fixture(scope="module")
def done() -> Iterator[Chains]:
    with a_lab(pki=True) as lab:
        vm = lab.vm("web", 16 * MIB)
        for name, options in OPTIONS.items():
            lines = ("Pool = Sealed", f"Client = {PKI_CLIENT}") if name == "sealed" else ()
            lab.add_job(name, lab.plugin("web"), options=options, lines=lines)
        lab.daemons.jobs("sealed-pool", POOL)
        lab.start()
        chains = {name: Chain(lab, name) for name in OPTIONS}
        for step, level in enumerate(("Full", "Incremental")):
            change(vm, step)
            vm.write("disk-0", 5 * MIB, PATTERN * 4000)
            jobs = lab.director.run_all(*OPTIONS, level=level)
            for name, chain in chains.items():
                chain.sums.append(vm.sums())
                chain.jobs.append(jobs[name])
        yield Chains(lab, chains)


def volumes(daemons: Daemons, label: str) -> bytes:
    """All volumes of a label."""
    found = sorted(daemons.volumes.glob(f"{label}-*"))
    assert found
    return b"".join(path.read_bytes() for path in found)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_chain_comes_back(done: Chains, name: str) -> None:
    chain = done.chains[name]
    for job in chain.jobs:
        assert job.ok, job.log
    where = done.lab.folder / f"back-{name}"
    client = PKI_CLIENT if name == "sealed" else "lab-fd"
    restored = done.lab.director.restore(
        [job.id for job in chain.jobs], where=str(where), words=f"client={client}"
    )
    assert restored.ok, restored.log
    assert sums_of(where) == chain.sums[-1]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_file_has_its_signature(done: Chains, name: str) -> None:
    # Pitfall 23: a restore object before the files would take it away. Guard: objects only after the last file.
    for job in done.chains[name].jobs:
        rows = done.lab.daemons.query("select MD5 from File where JobId = ?", job.id)
        assert len(rows) >= 2
        assert all(len(digest) > 20 for (digest,) in rows), rows


@pytest.mark.parametrize("name", ["lzo", "gzip"])
def test_images_and_deltas_are_compressed(done: Chains, name: str) -> None:
    for job, plain in zip(done.chains[name].jobs, done.chains["plain"].jobs, strict=True):
        assert re.search(r"Software Compression: +[0-9.]+%", job.log), job.log
        assert job.size < plain.size


def test_the_pattern_can_be_seen_where_nothing_hides_it(done: Chains) -> None:
    assert PATTERN in volumes(done.lab.daemons, "Vol")


def test_an_encrypted_volume_shows_nothing_of_the_disk(done: Chains) -> None:
    # Pitfall 22: addressed files would lie there in plain text, with "Encryption: yes". Guard: plain streams where PKI is on.
    for job in done.chains["sealed"].jobs:
        assert re.search(r"Encryption: +yes", job.log), job.log
        assert "plain streams" in job.log
    content = volumes(done.lab.daemons, "Sealed")
    assert PATTERN not in content
    assert PATTERN[: len(PATTERN) // 2] not in content


def test_the_incremental_of_an_encrypted_chain_is_small(done: Chains) -> None:
    full, incremental = done.chains["sealed"].jobs
    assert full.size >= 16 * MIB
    assert incremental.size < 4 * MIB
