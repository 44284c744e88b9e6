# SPDX-License-Identifier: AGPL-3.0-or-later
"""The lab for people: a real Bacula with the plugin, two VMs of plain images, and Jobs to run. See docs/bacula.md."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.bacula.daemons import LabError  # noqa: E402 - the path above makes these importable
from tests.bacula.director import Job  # noqa: E402
from tests.bacula.lab import MIB, PKI_CLIENT, Lab  # noqa: E402

VMS = ("web", "db")
LEVELS = ("Full", "Incremental", "Differential", "VirtualFull")


def add_jobs(lab: Lab) -> None:
    """The Jobs of the lab: one for each VM, and what there is to try besides."""
    for name in VMS:
        lab.add_job(name, lab.plugin(name))
    lab.add_job("web-compressed", lab.plugin("web"), options="signature = SHA1; compression = LZO")
    lab.add_job("web-accurate", lab.plugin("web"), lines=("Accurate = yes",))
    lab.add_job("web-encrypted", lab.plugin("web"), lines=(f"Client = {PKI_CLIENT}",))
    lab.add_job("both", *(lab.plugin(name) for name in VMS))


def make(arguments: argparse.Namespace) -> Lab:
    """The lab of the folder that the command line names."""
    return Lab(Path(arguments.dir).resolve(), debian13=arguments.debian13, pki=True)


def prepared(arguments: argparse.Namespace) -> Lab:
    """The same, with all its files."""
    lab = make(arguments)
    lab.prepare()
    for name in VMS:
        lab.vm(name)
    add_jobs(lab)
    return lab


def running(arguments: argparse.Namespace) -> Lab:
    """The same, running; whatever is up already stays."""
    lab = prepared(arguments)
    lab.start()
    return lab


def up(arguments: argparse.Namespace) -> int:
    """Start it, and say what there is."""
    lab = running(arguments)
    lab.director.reload()
    here = f"scripts/bacula-lab{'' if arguments.dir == default_folder() else f' --dir {arguments.dir}'}"
    jobs = sorted(path.stem for path in (lab.folder / "etc" / "jobs.d").glob("*.conf"))
    jobs.remove("none")
    program = " ".join(lab.daemons.argv("bconsole", "-c", str(lab.daemons.config("bconsole"))))
    print(f"Bacula runs at {lab.daemons.address}, in {lab.folder}.")
    print(f"Jobs: {', '.join(jobs)}; restores: restore")
    print(f"{here} run web                 a Full of the VM web")
    print(f"{here} write web               change its disks")
    print(f"{here} run web incremental     what changed")
    print(f"{here} restore web             to {lab.restored}")
    print(f"{here} console                 the same as: {program}")
    print(f"{here} down                    stop; `down --purge` removes the folder")
    return 0


def down(arguments: argparse.Namespace) -> int:
    """Stop it."""
    lab = make(arguments)
    lab.stop()
    if arguments.purge:
        if lab.folder.exists() and not (lab.folder / "etc" / "lab.json").exists():
            raise LabError(f"{lab.folder} is no lab's folder: it stays")
        shutil.rmtree(lab.folder, ignore_errors=True)
    return 0


def run(arguments: argparse.Namespace) -> int:
    """A backup."""
    lab = running(arguments)
    return tell(lab.director.run(arguments.job, arguments.level))


def restore(arguments: argparse.Namespace) -> int:
    """A restore of the newest state of a job, or of the jobs that are named."""
    lab = running(arguments)
    chosen: list[int] | str = arguments.jobid
    if not chosen:
        client = PKI_CLIENT if arguments.job == "web-encrypted" else "lab-fd"
        chosen = f"select current client={client} fileset={arguments.job}-files"
    done = lab.director.restore(chosen, where=arguments.where or str(lab.restored))
    return tell(done)


def write(arguments: argparse.Namespace) -> int:
    """Change a VM's disks."""
    lab = prepared(arguments)
    for disk, path in lab.vms[arguments.vm].disks.items():
        offset = random.randrange(0, path.stat().st_size - MIB, 4096)
        lab.vms[arguments.vm].write(disk, offset, os.urandom(MIB // 4))
        print(f"{MIB // 4} bytes at {offset} of {path}")
    return 0


def console(arguments: argparse.Namespace) -> int:
    """The console; with words it answers them and ends."""
    lab = running(arguments)
    if not arguments.line:
        argv = lab.daemons.argv("/usr/sbin/bconsole", "-c", str(lab.daemons.config("bconsole")))
        return subprocess.run(argv, env=lab.daemons.environment(), check=False).returncode
    print(lab.daemons.console(*arguments.line))
    return 0


def status(arguments: argparse.Namespace) -> int:
    """What runs, and the last jobs."""
    lab = make(arguments)
    for name in lab.daemons.names:
        pid = lab.daemons.pid(name)
        print(f"{name}: {f'runs, pid {pid}' if pid else 'does not run'}")
    if lab.daemons.database.exists():
        rows = lab.daemons.query(
            "select JobId, Name, Level, JobStatus, JobFiles, JobBytes, EndTime from Job"
            " order by JobId desc limit 20"
        )
        for row in reversed(rows):
            print("  ".join(str(value) for value in row))
    return 0


def messages(arguments: argparse.Namespace) -> int:
    """The messages of the last job, or of one that is named."""
    lab = make(arguments)
    number = arguments.jobid or lab.daemons.query("select max(JobId) from Job")[0][0]
    if number is None:
        print("no job has run yet")
        return 0
    return tell(lab.director.job(number))


def tell(job: Job) -> int:
    """Show a job; the exit code says whether it is good."""
    print(job.log)
    print(f"job {job.id} {job.name}: status {job.status}, {job.files} files, {job.size} bytes")
    return 0 if job.ok else 1


def default_folder() -> str:
    """Where a lab is unless told otherwise."""
    return str(ROOT / ".cache" / "bacula-lab")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="bacula-lab", description=__doc__)
    top.add_argument("--dir", default=default_folder(), help="the lab's folder (%(default)s)")
    top.add_argument(
        "--debian13", action="store_true", help="Bacula 15.0.3, of the root of scripts/bacula-root"
    )
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str) -> argparse.ArgumentParser:
        function = globals()[name]
        each = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        each.set_defaults(function=function)
        return each

    add("up")
    add("down").add_argument("--purge", action="store_true", help="remove the folder too")
    running_job = add("run")
    running_job.add_argument("job")
    running_job.add_argument(
        "level",
        nargs="?",
        default="Full",
        choices=LEVELS,
        type=lambda text: next((each for each in LEVELS if each.lower() == text.lower()), text),
    )
    back = add("restore")
    back.add_argument("job")
    back.add_argument("--where", help="a folder; / is back to the platform")
    back.add_argument("--jobid", type=int, action="append", help="exactly this job (several times)")
    add("write").add_argument("vm", choices=VMS)
    add("console").add_argument("line", nargs="*")
    add("status")
    add("messages").add_argument("jobid", type=int, nargs="?")
    return top


def main() -> int:
    """Do what the command line says."""
    arguments = parser().parse_args()
    try:
        code: int = arguments.function(arguments)
    except LabError as error:
        print(f"bacula-lab: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
