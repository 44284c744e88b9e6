# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an operator asks for: in plugin strings, at the console, and with the options of a restore."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.bacula.chains import change, images, sums_of
from tests.bacula.conftest import a_lab
from tests.bacula.director import Job
from tests.bacula.lab import MIB, Lab

#: Numbers in the menu of plugin options (``bacula_adapter/restore/options.py``).
DISKS_ONLY, FORMAT = "5", "10"


@dataclass
class Asked:
    """A Full and an Incremental of two VMs by one job, and jobs that are wrong."""

    lab: Lab
    full: Job
    incremental: Job
    sums: list[dict[str, dict[str, str]]]
    wrong: dict[str, Job]

    @property
    def ids(self) -> list[int]:
        return [self.full.id, self.incremental.id]


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    with a_lab() as lab:
        vms = [lab.vm("web", 8 * MIB, 4 * MIB), lab.vm("db", 6 * MIB)]
        lab.add_job("both", lab.plugin("web"), lab.plugin("db"))
        lab.add_job("unknown-key", lab.plugin("web", "concurent_vms=3"))
        lab.add_job("bad-value", lab.plugin("web", "bacula_streams=fast"))
        lab.add_job("no-config", "replicator: config=/nowhere/web.conf")
        lab.add_job("secret-path", lab.plugin("web", "passfile=/etc/shadow"))
        lab.add_job("no-plugin", "nosuchplugin: vm=web")
        # The first line fails: the second must not make a job of half of the VMs look well.
        lab.add_job("one-of-two", lab.plugin("web", "vcpuu=1"), lab.plugin("db"))
        lab.start()
        wrong_jobs = (
            "unknown-key",
            "bad-value",
            "no-config",
            "secret-path",
            "no-plugin",
            "one-of-two",
        )
        sums = [{vm.name: vm.sums() for vm in vms}]
        done = lab.director.run_all("both", *wrong_jobs)
        full = done.pop("both")
        for vm in vms:
            change(vm, 1)
        sums.append({vm.name: vm.sums() for vm in vms})
        incremental = lab.director.run("both", "Incremental")
        yield Asked(lab, full, incremental, sums, done)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown-key", "unknown key concurent_vms (did you mean concurrent_vms?)"),
        ("bad-value", "bacula_streams: expected one of"),
        ("no-config", "/nowhere/web.conf"),
        ("secret-path", "passfile: the path of a secret"),
        ("one-of-two", "unknown key vcpuu"),
        ("no-plugin", "nosuchplugin"),
    ],
)
def test_a_wrong_plugin_string_fails_the_job_in_one_clear_line(
    asked: Asked, name: str, said: str
) -> None:
    # BackupCommand that returns an error alone would be "Backup OK" with no files. Guard: fatal.
    job = asked.wrong[name]
    assert job.status == "f", job.log
    assert said in job.log
    assert "Traceback" not in job.log


def test_several_lines_are_backed_up_and_restored_together(asked: Asked) -> None:
    assert asked.full.ok, asked.full.log
    assert asked.incremental.ok, asked.incremental.log
    where = asked.lab.folder / "both"
    job = asked.lab.director.restore(asked.ids, where=str(where))
    assert job.ok, job.log
    for vm in ("web", "db"):
        assert sums_of(where / "@image" / vm) == asked.sums[1][vm]


def test_one_vm_of_several_comes_back_alone(asked: Asked) -> None:
    where = asked.lab.folder / "one"
    job = asked.lab.director.restore(asked.ids, where=str(where), files=["@image/db"])
    assert job.ok, job.log
    assert sums_of(where) == asked.sums[1]["db"]


def test_one_disk_comes_back_alone_if_its_files_are_marked(asked: Asked) -> None:
    where = asked.lab.folder / "disk"
    job = asked.lab.director.restore(
        asked.ids, where=str(where), files=["@image/web/disks/disk-1*"]
    )
    assert job.status == "T", job.log
    assert sums_of(where) == {"disk-1": asked.sums[1]["web"]["disk-1"]}


def test_a_delta_without_its_image_is_refused(asked: Asked) -> None:
    where = asked.lab.folder / "delta"
    job = asked.lab.director.restore(
        asked.ids, where=str(where), files=["@image/web/disks/disk-1.*phcbt"]
    )
    assert job.status == "f", job.log
    assert not images(where)


def test_restore_disks_only_by_plugin_options(asked: Asked) -> None:
    where = asked.lab.folder / "only"
    options = {DISKS_ONLY: "disk-0", FORMAT: "raw"}
    job = asked.lab.director.restore(
        asked.ids, where=str(where), files=["@image/web"], options=options, plugin="1"
    )
    assert job.ok, job.log
    assert sums_of(where) == {"disk-0": asked.sums[1]["web"]["disk-0"]}


def test_options_that_sqlite_has_damaged_fail_the_job(asked: Asked) -> None:
    # Pitfall 14: with 9.6.7 some lengths come back as garbage, and these do. Guard: the text must begin as Bacula writes it.
    where = asked.lab.folder / "damaged"
    job = asked.lab.director.restore(
        asked.ids,
        where=str(where),
        files=["@image/web"],
        options={DISKS_ONLY: "disk-0"},
        plugin="1",
    )
    assert job.status == "f", job.log
    assert "damaged in Bacula's catalogue" in job.log
    assert not images(where)


def test_another_format_by_plugin_options(asked: Asked) -> None:
    where = asked.lab.folder / "qcow2"
    job = asked.lab.director.restore(
        asked.ids, where=str(where), files=["@image/db"], options={FORMAT: "qcow2"}, plugin="2"
    )
    assert job.ok, job.log
    (path,) = images(where).values()
    assert path.suffix == ".qcow2"
    for words in (
        ["check", str(path)],
        [
            "compare",
            "-f",
            "qcow2",
            "-F",
            "raw",
            str(path),
            str(asked.lab.vms["db"].disks["disk-0"]),
        ],
    ):
        done = subprocess.run(["qemu-img", *words], capture_output=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "below"),
    [
        ("regexwhere=!^!{where}/moved/!", "moved"),
        ("add_prefix={where}/put/", "put"),
    ],
)
def test_names_may_be_rewritten(asked: Asked, words: str, below: str) -> None:
    # Pitfall 16 and section 5.2: Where is NULL then, and names are rewritten already.
    where = asked.lab.folder / "rewritten"
    job = asked.lab.director.restore(
        asked.ids, where=None, files=["@image/db"], words=words.format(where=where)
    )
    assert job.ok, job.log
    assert sums_of(where / below / "@image" / "db") == asked.sums[1]["db"]


def test_what_is_rewritten_beyond_recognition_is_refused(asked: Asked) -> None:
    where = asked.lab.folder / "unknown"
    words = f"regexwhere=!^@image/!{where}/!"
    job = asked.lab.director.restore(asked.ids, where=None, files=["@image/db"], words=words)
    assert job.status == "f", job.log
    assert "a regular expression may only change what stands before its first component" in job.log
    assert not images(where)


def test_never_replaces_nothing(asked: Asked) -> None:
    where = asked.lab.folder / "never"
    first = asked.lab.director.restore([asked.full.id], where=str(where), files=["@image/db"])
    assert first.ok, first.log
    job = asked.lab.director.restore(
        asked.ids, where=str(where), files=["@image/db"], words="replace=never"
    )
    assert job.status == "f", job.log
    assert sums_of(where) == asked.sums[0]["db"]
    job = asked.lab.director.restore(asked.ids, where=str(where), files=["@image/db"])
    assert job.ok, job.log
    assert sums_of(where) == asked.sums[1]["db"]


def test_a_relative_name_is_never_opened(asked: Asked) -> None:
    # Pitfall 16: where=/ gives the bare name `@image/…`. It means "to the platform", which images in files have not.
    job = asked.lab.director.restore([asked.full.id], where="/", files=["@image/db"])
    assert job.status == "f", job.log
    assert not (asked.lab.folder / "run" / "lab-fd" / "@image").exists()


def test_a_bootstrap_file_alone_is_enough(asked: Asked) -> None:
    # Section 7: no restore objects come then. Guard: the description files in the backup.
    where = asked.lab.folder / "bootstrap"
    lab = asked.lab
    volume = next(iter(sorted(lab.daemons.volumes.glob("Vol-*")))).name
    sessions = lab.daemons.query(
        "select VolSessionId, VolSessionTime from Job where JobId in (?, ?) order by JobId",
        *asked.ids,
    )
    text = "".join(
        f'Volume="{volume}"\nMediaType="File"\nVolSessionId={number}\nVolSessionTime={time}\n'
        for number, time in sessions
    )
    path = lab.folder / "both.bsr"
    path.write_text(text)
    number = lab.director.queue(f"run job=restore client=lab-fd bootstrap={path} where={where} yes")
    job = lab.director.wait(number)
    assert job.status == "T", job.log
    for vm in ("web", "db"):
        assert sums_of(where / "@image" / vm) == asked.sums[1][vm]


def test_estimate_says_what_would_be_carried(asked: Asked) -> None:
    said = asked.lab.director.estimate("both", "level=Full", "listing")
    for name in ("@image/web/disks/disk-0.raw", "@image/web/disks/disk-1.raw", "@image/db/disks"):
        assert name in said
    assert "2000 OK estimate" in said


def test_listing_shows_the_vms_and_their_disks(asked: Asked) -> None:
    plugin = asked.lab.plugin("web")
    said = asked.lab.daemons.console(f'.ls plugin="{plugin}" client=lab-fd path=/')
    assert "@image/web/" in said
    said = asked.lab.daemons.console(f'.ls plugin="{plugin}" client=lab-fd path=/web')
    assert "disk-0" in said
    assert "disk-1" in said


def test_the_plugin_is_loaded_and_says_so(asked: Asked) -> None:
    assert "replicator-fd.so" in asked.lab.daemons.console("status client=lab-fd")
