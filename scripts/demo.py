# SPDX-License-Identifier: AGPL-3.0-or-later
"""The main job on real input: a running two-disk VM is seeded, kept current over a crash, and taken from an older point.

Everything that a user would run is run as they would run it: the commands with configuration files, each its own
process. What the demo itself does is play the VM's user (files written in the guest) and the auditor (fsck, SHA-256).
By default the VM runs on the first of two simulated Nutanix clusters and the receiver stands beside the second; with
`--source qemu` it is a VM of QEMU alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from replicator.nursery import flat_nursery  # noqa: E402 - the path above makes these importable
from tests.lab import guest  # noqa: E402
from tests.lab.console import Guest, GuestError, running_guest  # noqa: E402

MIB = 1 << 20
VM = "web"
TREE_FILES = 3000
NOISE_MIB = 64
#: The receiver is killed once this much of the push's file has landed.
KILL_AT = 36 * MIB
REPLCTL = Path(sys.executable).parent / "replctl"
# mke2fs and its relatives lie where an ordinary user's PATH may not lead.
PATHS = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


class DemoError(Exception):
    """Something was not as it must be; the message says what."""


def check(condition: object, otherwise: str) -> None:
    """Raise DemoError unless the condition holds."""
    if not condition:
        raise DemoError(otherwise)


@dataclass
class Report:
    """What happened, step by step."""

    say: Callable[[str], None]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: str, seconds: float, result: str, size: int | None = None) -> None:
        """One step is done."""
        self.rows.append(
            {"step": step, "seconds": round(seconds, 3), "bytes": size, "result": result}
        )
        self.say(f"{step}: {result} ({seconds:.1f} s)")


class Demo:
    """One run, in a folder of its own. ``nutanix``: the VM is on a simulated cluster."""

    def __init__(self, folder: Path, report: Report, *, nutanix: bool) -> None:
        self.folder = folder
        self.report = report
        self.nutanix = nutanix
        self.prism = folder / "prism"
        self.boot, self.data = folder / "boot.raw", folder / "data.raw"
        self.tree = folder / "tree"
        self.receiver_conf, self.source_conf = folder / "receiver.conf", folder / "source.conf"
        self.state = folder / "receiver"
        self.qmp = folder / "qmp"
        self.password = os.urandom(12).hex()
        self.expected: dict[str, str] = {}
        self.summary: dict[str, Any] = {}

    # What a user would run

    async def replctl(self, conf: Path, *words: str) -> Any:
        """Run a command to its end; its JSON, or DemoError with what it said."""
        done = await trio.run_process(
            [REPLCTL, "--config", conf, "--json", *words],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        if done.returncode != 0:
            raise DemoError(
                f"replctl {' '.join(words)} ended with {done.returncode}: {done.stderr.decode().strip()}"
            )
        return json.loads(done.stdout)

    @asynccontextmanager
    async def receiver(self) -> AsyncIterator[trio.Process]:
        """A receiver that has said that it is ready, as it would to systemd."""
        address = self.folder / "notify"
        address.unlink(missing_ok=True)
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            await ready.bind(str(address))
            with (self.folder / "receiver.log").open("ab") as log:
                process = await trio.lowlevel.open_process(
                    [REPLCTL, "--config", self.receiver_conf, "receiver"],
                    stderr=log,
                    env={**os.environ, "NOTIFY_SOCKET": str(address)},
                )
            try:
                with trio.move_on_after(30) as limit:
                    while b"READY=1" not in await ready.recv(4096):
                        pass
                if limit.cancelled_caught:
                    log_text = (self.folder / "receiver.log").read_text()
                    raise DemoError(f"the receiver is not ready: {log_text[-500:]}")
                yield process
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                with trio.move_on_after(20, shield=True) as ending:
                    await process.wait()
                if ending.cancelled_caught:
                    process.kill()

    # Preparation

    def write_configuration(self) -> None:
        """Both sides' configuration, with a fresh key."""
        token = os.urandom(32).hex()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = f"dr_auth_token = {token}\ndr_port = {port}\n"
        receiver = f"state_dir = {self.state}\ndr_listen = 127.0.0.1\ndr_restore_points = 5\n"
        source = f"state_dir = {self.folder / 'source'}\nvm = {VM}\ndr_host = 127.0.0.1\n"
        source += (
            self.prism_keys() if self.nutanix else f"source = qemu\nqemu_socket = {self.qmp}\n"
        )
        for path, text in ((self.receiver_conf, receiver), (self.source_conf, source)):
            path.touch(mode=0o600)
            path.write_text(common + text)

    def prism_keys(self) -> str:
        """What the source's configuration says of Prism. More requests a minute than by default: the demo is in a hurry."""
        world = json.loads((self.prism / "world.json").read_text())
        passfile = self.folder / "backup.pass"
        passfile.touch(mode=0o600)
        passfile.write_text(f"password = {self.password}\n")
        return (
            f"source = nutanix\nprism_central = {world['address']}\nprism_ca_cert = {self.prism / 'ca.pem'}\n"
            f"user = backup\npassfile = {passfile}\ncluster = cluster-a\nprism_rate_rpm = 600\n"
            "iscsi_initiator = iqn.2026-01.org.example:demo\n"
        )

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[None]:
        """Two simulated clusters, with the VM and its disks on the first; nothing where the VM is QEMU's alone."""
        if not self.nutanix:
            yield
            return
        disks = [{"image": str(path)} for path in (self.boot, self.data)]
        vm = {
            "name": VM,
            "disks": disks,
            "cdrom": True,
            "tools": False,
            "qmp": str(self.folder / "freeze"),
        }
        scenario = self.folder / "scenario.json"
        users = [{"name": "backup", "role": "Backup Admin", "password": self.password}]
        scenario.touch(mode=0o600)
        scenario.write_text(json.dumps({"vms": [vm], "users": users}))
        started = time.monotonic()
        words = ["simulate", "--dir", str(self.prism), "--scenario", str(scenario)]
        with (self.folder / "prism.log").open("wb") as log:
            process = await trio.lowlevel.open_process(
                [REPLCTL, *words], stdout=subprocess.PIPE, stderr=log
            )
        try:
            with trio.move_on_after(60):
                await process.stdout.receive_some() if process.stdout else None
            if process.poll() is not None:
                said = (self.folder / "prism.log").read_text()
                raise DemoError(f"the simulator does not start: {said[-500:]}")
            self.report.add(
                "start two simulated clusters", time.monotonic() - started, f"{VM} is on cluster-a"
            )
            yield
        finally:
            with trio.CancelScope(shield=True):
                if process.returncode is None:
                    process.terminate()
                with trio.move_on_after(20):
                    await process.wait()
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    def place_disks(self) -> None:
        """Where the VM's disks are: the cluster's files, if it is on one."""
        if self.nutanix:
            world = json.loads((self.prism / "world.json").read_text())
            (vm,) = world["vms"].values()
            files = [d["backing"] for d in vm["disks"] if not d["cdrom"]]
            self.boot, self.data = (self.prism / "disks" / f"{name}.raw" for name in files)

    def make_disks(self) -> None:
        """A disk that boots, and one with an ext4 file system full of files."""
        guest.boot_disk(self.boot)
        guest.make_tree(self.tree, TREE_FILES, seed=2026)
        guest.data_disk(self.data, self.tree, 1024 * MIB)
        self.expected = digests(self.tree)

    def qemu_disks(self) -> list[str]:
        """QEMU's arguments: both disks as named nodes, and the control socket."""
        words = ["-qmp", f"unix:{self.qmp},server=on,wait=off", "-name", VM]
        words += (
            ["-qmp", f"unix:{self.folder / 'freeze'},server=on,wait=off"] if self.nutanix else []
        )
        for node, path in (("system", self.boot), ("data", self.data)):
            file = f"file.driver=file,file.filename={path},file.discard=unmap"
            words += ["-blockdev", f"driver=raw,node-name={node},discard=unmap,{file}"]
            words += ["-device", f"virtio-blk-pci,drive={node}"]
        return words

    # The job

    async def run(self) -> None:
        """All of it. Raises DemoError, GuestError."""
        started = time.monotonic()
        await trio.to_thread.run_sync(self.make_disks)
        size = f"2 disks of 1 GiB, {len(self.expected)} files on ext4"
        self.report.add("make the VM's disks", time.monotonic() - started, size)
        async with self.cluster():
            self.place_disks()
            self.write_configuration()
            async with self.receiver() as first:
                started = time.monotonic()
                async with running_guest(self.qemu_disks()) as vm:
                    await vm.run("mount /dev/vdb /mnt")
                    self.report.add(
                        "boot the VM",
                        time.monotonic() - started,
                        "it runs, its data disk is mounted",
                    )
                    await self.check_health()
                    await self.seed_and_cycle(vm)
                    await self.cycle_over_a_crash(vm, first)
                await self.check_owned()
        # The source is gone, as on the day it is needed; the second receiver was ended by the crash test's block.
        async with self.receiver():
            await self.take_an_older_point()

    async def check_health(self) -> None:
        """What a new user of a cluster does first."""
        if not self.nutanix:
            return
        started = time.monotonic()
        health = await self.replctl(self.source_conf, "health-check")
        probes = len(health["probes"])
        self.report.add("health-check", time.monotonic() - started, f"{probes} probes, ready")

    async def check_owned(self) -> None:
        """All that is ours on the cluster afterwards: the snapshot that the next cycle starts from."""
        if not self.nutanix:
            return
        started = time.monotonic()
        owned = await self.replctl(self.source_conf, "owned")
        self.summary["owned"] = owned
        found = [each["kind"] for each in owned]
        check(len(found) == 1, f"{found} are left on the cluster")
        self.report.add(
            "what is ours on the cluster",
            time.monotonic() - started,
            "the reference snapshot alone",
        )

    async def push(self, step: str, command: str) -> dict[str, Any]:
        """A seed or a cycle, reported."""
        started = time.monotonic()
        result: dict[str, Any] = await self.replctl(self.source_conf, command)
        seconds = time.monotonic() - started
        self.report.add(step, seconds, f"recovery point {result['point']}", result["bytes_pushed"])
        return result

    async def seed_and_cycle(self, vm: Guest) -> None:
        """Point 1 is the seed; point 2 has new files, and is the one that the demo goes back to."""
        await self.push("seed", "seed")
        await vm.run("write_files /mnt/new 400 hello && rm -r /mnt/area-0 && sync")
        self.expected = {
            path: digest for path, digest in self.expected.items() if not path.startswith("area-0/")
        }
        for number in range(400):
            self.expected[f"new/file-{number}"] = hashlib.sha256(
                f"hello {number}\n".encode()
            ).hexdigest()
        await self.push("cycle: 400 files written, a folder removed", "push")

    async def cycle_over_a_crash(self, vm: Guest, receiver: trio.Process) -> None:
        """Point 3: the receiver is killed with -9 while it lands, and started again; the push goes on."""
        await vm.run(
            f"dd if=/dev/urandom of=/mnt/noise bs=1M count={NOISE_MIB} conv=fsync 2>/dev/null"
        )
        await vm.run("rm -r /mnt/new && sync")
        started = time.monotonic()
        outcome: dict[str, Any] = {}
        pushed = trio.Event()

        async def push() -> None:
            outcome.update(await self.replctl(self.source_conf, "push"))
            pushed.set()

        async with flat_nursery() as nursery:
            nursery.start_soon(push)
            landed = await self.landed(KILL_AT)
            receiver.kill()
            await receiver.wait()
            self.report.say(
                f"the receiver was killed with -9 after {landed / MIB:.0f} MiB of the push had landed"
            )
            async with self.receiver():
                await pushed.wait()
                seconds = time.monotonic() - started
                kept = outcome["resumed_bytes"]
                check(outcome["resumed"] and kept > 0, "the push did not go on where it was")
                self.report.add(
                    f"cycle: {NOISE_MIB} MiB written, kill -9 of the receiver in the middle",
                    seconds,
                    f"recovery point {outcome['point']}; went on at {kept / MIB:.0f} MiB, not over",
                    outcome["bytes_pushed"],
                )
                (status,) = await self.replctl(self.receiver_conf, "status")
                check(status["newest_point"] == 3, f"the newest point is {status['newest_point']}")
                self.summary["rpo_age_s"] = status["rpo_age_s"]
                self.report.add(
                    "RPO age after the last cycle", status["rpo_age_s"], "age of what would be lost"
                )

    async def landed(self, enough: int) -> int:
        """Wait until that much of point 3's push is in the receiver's files; the bytes found."""
        with trio.move_on_after(60):
            while True:
                partial = self.state.glob("vms/*/points/3.partial/*.phcbt")
                size = sum(path.stat().st_size for path in partial)
                if size >= enough:
                    return size
                await trio.sleep(0.002)
        raise DemoError("no push is landing")

    async def take_an_older_point(self) -> None:
        """Points verified; point 2 cloned, booted, checked; everything removed again."""
        points = await self.replctl(self.receiver_conf, "points", VM)
        check([point["point"] for point in points] == [1, 2, 3], f"points are {points}")
        self.summary["points"] = points
        for point in points:
            started = time.monotonic()
            verified = await self.replctl(
                self.receiver_conf, "verify", VM, "--point", str(point["point"])
            )
            seconds = time.monotonic() - started
            check(verified["good"], f"point {point['point']} is damaged: {verified['damages']}")
            self.report.add(
                f"verify point {point['point']}",
                seconds,
                f"root {point['root'][:16]}…",
                verified["bytes_read"],
            )
        started = time.monotonic()
        test = await self.replctl(self.receiver_conf, "failover", "test", VM, "--point", "2")
        check(test["booted"], f"the clone did not boot: {test['reason']}")
        self.summary["console_s"] = test["console_s"]
        line = test["console"]
        self.report.add(
            "failover test of point 2", time.monotonic() - started, f"clone booted: “{line}”"
        )
        self.report.add("time to first console line", test["console_s"], "from the start of QEMU")
        await self.audit(test)
        started = time.monotonic()
        await self.replctl(self.receiver_conf, "failover", "undo", VM)
        left = list(self.state.glob("vms/*/clones/*")) + list(self.state.glob("run/*"))
        check(not left, f"the undo left {left}")
        (status,) = await self.replctl(self.receiver_conf, "status")
        check(status["state"] == "protected", f"the VM is {status['state']}")
        self.report.add(
            "failover undo", time.monotonic() - started, "clone removed, nothing left over"
        )
        for side, conf in (("receiver", self.receiver_conf), ("source", self.source_conf)):
            await self.verify_log(side, conf)

    async def verify_log(self, side: str, conf: Path) -> None:
        """Every event of one side's log, against its tree and the head that the other side has signed."""
        started = time.monotonic()
        log = await self.replctl(conf, "log", "verify")
        check(log["signed_heads"] == 1, f"no head of the {side}'s log was signed: {log}")
        self.report.add(
            f"log verify on the {side}",
            time.monotonic() - started,
            f"{log['events']} events, head signed by the other side",
        )

    async def audit(self, test: dict[str, Any]) -> None:
        """The clone's data disk as an outsider sees it: fsck, then every file by its SHA-256."""
        started = time.monotonic()
        (overlay,) = (disk["overlay"] for disk in test["disks"] if disk["disk"] == "disk-1")
        copy, files = self.folder / "clone.raw", self.folder / "clone-files"
        await run("qemu-img", "convert", "-U", "-O", "raw", overlay, copy)
        # The VM was running: the file system's own journal is played back first, as at any boot.
        await run("e2fsck", "-p", copy)
        await run("e2fsck", "-fn", copy)
        self.report.add("fsck of the clone's data disk", time.monotonic() - started, "clean")
        started = time.monotonic()
        files.mkdir()
        await run("debugfs", "-R", f"rdump / {files}", copy)
        found = await trio.to_thread.run_sync(digests, files)
        check(
            found == self.expected,
            f"{len(found)} files, {len(self.expected)} expected; they differ",
        )
        seconds = time.monotonic() - started
        self.report.add(
            "files of point 2 by SHA-256",
            seconds,
            f"{len(found)} of {len(self.expected)} as written",
        )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


async def run(*command: str | Path) -> None:
    """Run a program; DemoError with what it said if it fails."""
    done = await trio.run_process(
        [*command], capture_stdout=True, capture_stderr=True, check=False, env=PATHS
    )
    # e2fsck -p ends with 1 if it played the journal back.
    if done.returncode > (command[:2] == ("e2fsck", "-p")):
        raise DemoError(
            f"{command[0]} ended with {done.returncode}: {(done.stdout + done.stderr).decode().strip()}"
        )


def show(report: Report, total: float) -> None:
    """The table."""
    table = Table(title=f"replctl: what happened, in {total:.0f} s")
    for name in ("step", "seconds", "bytes", "result"):
        table.add_column(name, justify="right" if name in ("seconds", "bytes") else "left")
    for row in report.rows:
        size = f"{row['bytes']:,}" if row["bytes"] is not None else ""
        table.add_row(row["step"], f"{row['seconds']:.2f}", size, row["result"])
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> int:
    """The demo's exit code: 0 if everything was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print the steps as JSON instead of a table"
    )
    parser.add_argument("--keep", action="store_true", help="keep the demo's folder")
    parser.add_argument(
        "--source",
        choices=("nutanix", "qemu"),
        default="nutanix",
        help="where the VM is: on a simulated Nutanix cluster, or in QEMU alone",
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="replctl-demo-"))
    report = Report(lambda text: print(text, file=sys.stderr, flush=True))
    demo = Demo(folder, report, nutanix=options.source == "nutanix")
    started = time.monotonic()
    try:
        trio.run(demo.run)
    except (
        DemoError,
        GuestError,
        subprocess.CalledProcessError,
        OSError,
        trio.TooSlowError,
    ) as error:
        print(f"demo failed: {str(error) or type(error).__name__}; see {folder}", file=sys.stderr)
        return 1
    total = time.monotonic() - started
    if options.json:
        print(json.dumps({"seconds": round(total, 1), "steps": report.rows, **demo.summary}))
    else:
        show(report, total)
    if not options.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
