# SPDX-License-Identifier: AGPL-3.0-or-later
"""docs/bacula.md: its resources are loaded by a Director, its Jobs run, and its console lines do what the page says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bacula.chains import images, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.daemons import CHECKOUT
from tests.bacula.director import Job
from tests.bacula.lab import MIB, Lab

PAGE = (CHECKOUT / "docs" / "bacula.md").read_text("utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
RESOURCES = [block for block in BLOCKS if block.startswith("# bacula-dir")]
LINES = [block for block in BLOCKS if block.startswith("*")]


@dataclass
class Page:
    """The page's Jobs, loaded and run."""

    lab: Lab
    jobs: dict[str, Job]

    def here(self, text: str) -> str:
        """The page's text with this lab's names."""
        names = {
            "vmhost-fd": "lab-fd",
            "File1": "lab-sd",
            "= VMs": "= P",
            "= Standard": "= Std",
            "config=web01": f"config={self.lab.folder}/etc/replicator/web01.conf",
            "config=db01": f"config={self.lab.folder}/etc/replicator/db01.conf",
            "/srv/restored": str(self.lab.folder / "srv"),
        }
        for name, ours in names.items():
            text = text.replace(name, ours)
        return text


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with a_lab() as lab:
        lab.vm("web01", 6 * MIB)
        lab.vm("db01", 4 * MIB)
        page = Page(lab, {})
        for number, block in enumerate(RESOURCES):
            lab.daemons.jobs(f"page-{number}", page.here(block))
        lab.start()
        page.jobs["full"] = lab.director.run("web01")
        lab.vms["web01"].write("disk-0", MIB, b"changed" * 1000)
        page.jobs["incremental"] = lab.director.run("web01", "Incremental")
        page.jobs["two"] = lab.director.run("two-vms")
        yield page


def test_the_jobs_of_the_page_run(page: Page) -> None:
    assert len(RESOURCES) == 2
    for job in page.jobs.values():
        assert job.ok, job.log
    assert page.jobs["incremental"].level == "I"


@pytest.mark.parametrize("block", LINES)
def test_the_console_lines_of_the_page_do_what_it_says(page: Page, block: str) -> None:
    text = page.here(block)
    if not text.startswith("*restore"):
        for line in text.splitlines():
            said = page.lab.daemons.console(line.removeprefix("*"))
            assert "disk-0.raw" in said or "@image/web01" in said, said
        return
    assert [page.jobs["full"].id, page.jobs["incremental"].id] == [1, 2]
    number = page.lab.director.queue(*text.removeprefix("*").splitlines())
    job = page.lab.director.wait(number)
    assert job.ok, job.log
    where = Path(re.search(r"where=(\S+)", text)[1])  # type: ignore[index]
    if "qcow2" in text:
        (path,) = images(where).values()
        source = page.lab.vms["web01"].disks["disk-0"]
        subprocess.run(["qemu-img", "compare", str(path), str(source)], check=True)
    else:
        assert sums_of(where / "@image") == page.lab.vms["web01"].sums()


def test_the_lab_does_what_the_page_shows(tmp_path: Path) -> None:
    (block,) = [each for each in BLOCKS if "bacula-lab up" in each]
    program = [CHECKOUT / ".venv/bin/python", CHECKOUT / "scripts" / "bacula-lab.py"]
    steps = [line.split("#")[0].split()[1:] for line in block.splitlines()]
    assert steps[0] == ["up"]
    assert steps[-1] == ["down", "--purge"]
    folder = tmp_path / "lab"
    said = {}
    for step in steps:
        words = ["console", "status dir"] if step == ["console"] else step
        done = subprocess.run(
            [*program, "--dir", folder, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        said[" ".join(step)] = done.stdout
        if step == ["restore", "web"]:
            kept = sums_of(folder / "restored")
            assert kept == sums_of(folder / "vms" / "web")
    assert "lab-dir Version" in said["console"]
    assert not folder.exists()
