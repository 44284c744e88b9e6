# SPDX-License-Identifier: AGPL-3.0-or-later
"""Jobs of a real Director: the plugin and its backend against bpipe and `dd`, in turns, with processor time and memory.

Image and volumes are in RAM, so that what is measured is the way between them. A plugin that does nothing else takes the time in
the file daemon, from the beginning of a job to the Storage daemon's word that it has everything: the Director's queue is not in it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from bench.images import BLOCK, GIB, MIB, Content, noise
from bench.nutanix import INITIATOR, PASSWORD
from bench.nutanix import Lab as Cluster
from bench.nutanix import lab as simulated
from bench.proc import Memory, watch
from bench.report import Result
from tests.bacula.daemons import LabError
from tests.bacula.director import backends
from tests.bacula.lab import Lab, job_text
from tests.lab_qemu import StorageDaemon

PARTS: Final = ("full", "increment", "start", "scale")
PAIRS: Final = 5
#: The least that a Full may be of bpipe's rate; how much faster an Incremental must be than it; the backend's start and memory.
FULL_MIN: Final = 0.9
INCREMENT_MIN: Final = 20.0
START_S_MAX: Final = 0.2
MEMORY_MAX: Final = 96 * MIB
_RAM: Final = Path("/dev/shm")  # noqa: S108 - memory is what is wanted
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_STARTS: Final = 20
_TURN: Final = (("plugin", "Incremental"), ("bpipe", "Full"))


@dataclass(frozen=True, slots=True)
class Ran:
    """Jobs that ran at once: seconds from the beginning of the first in the file daemon to the Storage daemon's word for the last,
    and processor seconds of both daemons and of what they started.
    """

    seconds: float
    file_daemon: float
    storage_daemon: float
    size: int


@contextmanager
def _lab() -> Iterator[Lab]:
    """A lab in RAM."""
    root = _RAM if _RAM.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="replctl-bench-", dir=root))
    lab = Lab(folder / "lab")
    try:
        lab.prepare()
        shutil.copy("/usr/lib/bacula/bpipe-fd.so", lab.daemons.plugins)
        source, built = (
            Path(__file__).with_name("stopwatch-fd.c"),
            lab.daemons.plugins / "stopwatch-fd.so",
        )
        subprocess.run(
            ["gcc", "-std=c11", "-O2", "-shared", "-fPIC", "-o", str(built), str(source)],
            check=True,
        )
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _cpu(pid: int) -> float:
    """Processor seconds of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / _TICKS


def _job(lab: Lab, *jobs: str, level: str = "Full") -> Ran:
    """Run jobs at once, each to a good end. Raises LabError."""
    pids = [lab.daemons.pid(name) for name in ("lab-fd", "sd")]
    before = [_cpu(pid) for pid in pids]
    done = lab.director.run_all(*jobs, level=level)
    times = dict(line.split() for line in (lab.daemons.plugins / "times").read_text().splitlines())
    seconds = max(float(times[str(job.id)]) for job in done.values())
    after = [_cpu(pid) for pid in pids]
    for job in done.values():
        if not job.ok:
            raise LabError(job.log)
    size = sum(job.size for job in done.values())
    return Ran(seconds, after[0] - before[0], after[1] - before[1], size)


def _purge(lab: Lab) -> None:
    """Forget what is on the volumes, so that RAM holds one job's."""
    for (name,) in lab.daemons.query("select VolumeName from Media"):
        lab.daemons.console(f"delete volume={name} yes")
    for path in lab.daemons.volumes.iterdir():
        path.unlink()


def _image(lab: Lab, name: str, size: int, disks: int = 1) -> None:
    """A VM of noise with its configuration and Job."""
    vm = lab.vm(name, *([MIB] * disks))
    for path in vm.disks.values():
        path.unlink()
        noise(path, size)
    lab.add_job(name, lab.plugin(name))


def _bpipe(lab: Lab, name: str, source: Path) -> None:
    """A Job that has `dd` read a file."""
    read, write = f"dd if={source} bs=1M status=none", "dd of=/dev/null bs=1M status=none"
    lab.daemons.jobs(name, job_text(name, f"bpipe:/{name}.raw:{read}:{write}"))


def _full(shrink: int, pairs: int) -> list[Result]:
    size = 2 * GIB // shrink
    runs: dict[str, list[Ran]] = {"plugin": [], "bpipe": []}
    with _lab() as lab:
        _image(lab, "plugin", size)
        _bpipe(lab, "bpipe", lab.vms["plugin"].disks["disk-0"])
        lab.start()
        for pair in range(pairs + 1):
            for name, done in runs.items():
                ran = _job(lab, name)
                _purge(lab)
                if pair:  # the first warms up
                    done.append(ran)

    def rate(name: str) -> list[float]:
        return [size / 1e6 / ran.seconds for ran in runs[name]]

    ratios = [ours / theirs for ours, theirs in zip(rate("plugin"), rate("bpipe"), strict=True)]
    result = Result(
        "bacula/full",
        f"a Full of {size >> 20} MiB: plugin and backend against bpipe and dd, {pairs} turns",
        columns=("plugin", "bpipe"),
    )
    both = ("plugin", "bpipe")
    result.figures["MB/s, median"] = [statistics.median(rate(name)) for name in both]
    result.figures["MB/s, best"] = [max(rate(name)) for name in both]
    for title, field in (("FD and child", "file_daemon"), ("SD", "storage_daemon")):
        result.figures[f"CPU s a GiB, {title}"] = [_per_gib(runs, size, field, n) for n in both]
    result.floors["rate, of bpipe's"] = (statistics.median(ratios), FULL_MIN)
    return [result]


def _per_gib(runs: dict[str, list[Ran]], size: int, field: str, name: str) -> float:
    used = statistics.median(getattr(ran, field) for ran in runs[name])
    return float(used / (size / GIB))


async def _start(_shrink: int, _pairs: int) -> list[Result]:
    """From the start of the process to its answer to Hello, and its memory at the end of a Full."""
    text = b"Hello replicator 3 ext=1\n"
    hello = b"C%06d\n%b" % (len(text), text)
    program = str(Path(sys.executable).parent / "replicator-backend")

    def once() -> None:
        with subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(hello)
            process.stdin.flush()
            answer = process.stdout.read(8)
            taken.append(time.monotonic() - started)
            assert answer[:1] == b"C", answer
            process.kill()

    taken: list[float] = []
    for _ in range(_STARTS):
        started = time.monotonic()
        await trio.to_thread.run_sync(once)
    result = Result(
        "bacula/start", f"from the backend's start to its first answer, {_STARTS} times"
    )
    result.figures["seconds, median"] = statistics.median(taken)
    result.figures["seconds, worst"] = max(taken)
    result.ratios["median, seconds"] = (statistics.median(taken), START_S_MAX)
    return [result]


async def _memory(lab: Lab, job: str) -> int:
    """The most that a backend has had resident during a job, bytes."""
    seen = Memory()

    async def look(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            for pid in backends(lab.daemons.pid("lab-fd")):
                await watch(pid, seen)
            await trio.sleep(0.005)

    async with trio.open_nursery() as nursery:
        await nursery.start(look)
        await trio.to_thread.run_sync(_job, lab, job)
        nursery.cancel_scope.cancel()
    return seen.peak


async def full(_folder: Path, shrink: int, pairs: int) -> list[Result]:
    """A Full, and the backend's memory during one."""
    results = await trio.to_thread.run_sync(_full, shrink, pairs)
    size = 2 * GIB // shrink
    with _lab() as lab:
        _image(lab, "plugin", size)
        lab.start()
        peak = await _memory(lab, "plugin")
    results[0].figures["backend's memory, MiB"] = peak / MIB
    results[0].ratios["backend's memory, MiB"] = (peak / MIB, MEMORY_MAX / MIB)
    return results


async def start(_folder: Path, shrink: int, pairs: int) -> list[Result]:
    """The backend's start."""
    return await _start(shrink, pairs)


async def increment(_folder: Path, shrink: int, pairs: int) -> list[Result]:
    """An Incremental of a disk of QEMU's, whose changes are tracked, 1 % changed, against bpipe and `dd` on the same image.

    A quarter of the disk has data at the beginning: RAM must hold it, and all of what bpipe makes of it.
    """
    size = 8 * GIB // shrink
    taken: dict[str, list[float]] = {"plugin": [], "bpipe": []}
    with _lab() as lab:
        daemon = StorageDaemon(lab.folder.parent / "q", {"disk-0": size})
        daemon.root.mkdir()
        image = daemon.image("disk-0")
        await trio.to_thread.run_sync(noise, image, size // 4)
        await trio.to_thread.run_sync(os.truncate, image, size)
        await daemon.start()
        try:
            keys = {"source": "qemu", "vm": "plugin", "qemu_socket": str(daemon.qmp_socket)}
            lab.configure("plugin", keys | {"qemu_nbd_socket": str(daemon.nbd_socket)})
            lab.add_job("plugin", lab.plugin("plugin"))
            _bpipe(lab, "bpipe", image)
            await trio.to_thread.run_sync(lab.start)
            await trio.to_thread.run_sync(_job, lab, "plugin")
            for turn in range(pairs):
                await _change(daemon, size, turn)
                for name, level in _TURN:
                    ran = await trio.to_thread.run_sync(partial(_job, lab, name, level=level))
                    taken[name].append(ran.seconds)
                await trio.to_thread.run_sync(_drop, lab, "bpipe")
        finally:
            await daemon.stop()
    ours, theirs = (statistics.median(taken[name]) for name in ("plugin", "bpipe"))
    result = Result(
        "bacula/increment",
        f"1 % of {size >> 20} MiB changed, {pairs} turns",
        columns=("plugin", "bpipe"),
    )
    result.figures["seconds"] = [ours, theirs]
    result.floors["times as fast"] = (theirs / ours, INCREMENT_MIN)
    return [result]


async def _change(daemon: StorageDaemon, size: int, turn: int) -> None:
    """Change 1 % of a disk as a guest would, in blocks spread over all of it."""
    content, blocks = Content(100 + turn), size // BLOCK
    for index in range(turn, blocks, 100):
        await daemon.writer("disk-0").write(index * BLOCK, content.noise(BLOCK))


def _drop(lab: Lab, job: str) -> None:
    """Empty the volumes that hold only jobs of this name."""
    rows = lab.daemons.query(
        "select distinct VolumeName from Media join JobMedia using (MediaId) join Job using (JobId)"
        " where Job.Name = ? and MediaId not in"
        " (select MediaId from JobMedia join Job using (JobId) where Job.Name <> ?)",
        job,
        job,
    )
    for (name,) in rows:
        lab.daemons.console(f"delete volume={name} yes")
        (lab.daemons.volumes / name).unlink()


async def scale(_folder: Path, shrink: int, pairs: int) -> list[Result]:
    """Two VMs of two disks of a simulated cluster in one Job: more and more of them at once."""
    size = 512 * MIB // shrink
    rows: dict[str, list[float]] = {}
    disks = {"one": [size] * 2, "two": [size] * 2}
    with _lab() as lab:
        async with simulated(lab.folder.parent / "cluster", disks) as cluster:
            passfile = lab.folder / "passfile"
            passfile.touch(mode=0o600)
            passfile.write_text(f"password = {PASSWORD}\n")
            for vms, disks_at_once in ((1, 1), (1, 2), (2, 1), (2, 2)):
                name = f"v{vms}d{disks_at_once}"
                keys = {"concurrent_vms": str(vms), "concurrent_disks": str(disks_at_once)}
                lab.configure(name, _access(cluster, passfile) | keys)
                lab.add_job(name, lab.plugin(name, "vm=one,two"))
                rows[name] = []
            await trio.to_thread.run_sync(lab.start)
            for _ in range(pairs):
                for name, taken in rows.items():
                    taken.append((await trio.to_thread.run_sync(_job, lab, name)).seconds)
                    await trio.to_thread.run_sync(_purge, lab)
    seconds = [statistics.median(taken) for taken in rows.values()]
    result = Result(
        "bacula/scale",
        f"two VMs of two disks of {size >> 20} MiB over iSCSI, one Job, {pairs} turns",
        columns=[f"{name[1]} VM {name[3]} disk" for name in rows],
    )
    result.figures["seconds"] = seconds
    result.figures["MB/s"] = [4 * size / 1e6 / each for each in seconds]
    return [result]


def _access(cluster: Cluster, passfile: Path) -> dict[str, str]:
    """The keys of a configuration that reach a simulated cluster."""
    return {
        "prism_central": cluster.world["address"],
        "prism_ca_cert": str(cluster.folder / "ca.pem"),
        "user": "backup",
        "passfile": str(passfile),
        "cluster": "cluster-a",
        "prism_rate_rpm": "6000",
        "iscsi_initiator": INITIATOR,
    }


async def run(folder: Path, shrink: int, pairs: int, part: str | None = None) -> list[Result]:
    """All parts, or one."""
    parts = {"full": full, "increment": increment, "start": start, "scale": scale}
    results: list[Result] = []
    for name in PARTS if part is None else (part,):
        results += await parts[name](folder, shrink, pairs)
    return results


__all__ = ["PARTS", "run"]
