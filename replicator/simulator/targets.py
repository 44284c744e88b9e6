# SPDX-License-Identifier: AGPL-3.0-or-later
"""The iSCSI side: a real ``tgtd`` for every data services address and every CVM, started when it is first needed.

A login at the data services address is redirected to a CVM, where the disks are, as a cluster does it. The daemons die with
this process, however it ends.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from replicator.errors import ReplicatorError, UsageError

_START_TRIES = 200
_START_GAP_S = 0.02
_ADM_TIMEOUT_S = 20
#: Which of its control sockets a daemon answers on.
_CONTROL = 1
#: How many secrets one initiator can have on a CVM at a time.
_PORTS_MAX = 100
FOLDER_PREFIX = "replctl-sim-"
_NOBODYS = "iqn.2010-06.com.nutanix:nobody"


@dataclass(frozen=True, slots=True)
class Lun:
    """A disk to serve: its file, and its serial number."""

    path: Path
    serial: str


@dataclass(frozen=True, slots=True)
class Target:
    """A target with its disks and who may log in. ``secret`` proves the initiator, ``client_secret`` the target."""

    name: str
    luns: tuple[Lun, ...]
    initiators: tuple[str, ...]
    secret: str | None
    client_secret: str | None

    def __repr__(self) -> str:
        return f"Target({self.name!r})"


@dataclass(slots=True)
class _Account:
    """A name's password, and the targets that it opens."""

    secret: str = field(repr=False)
    bound: set[int]


class Daemon:
    """One ``tgtd`` on one address."""

    def __init__(self, program: str, address: str, port: int, folder: Path) -> None:
        self.address = address
        self.port = port
        self._folder = folder
        self._ids = itertools.count(1)
        self._accounts: dict[str, _Account] = {}
        self._env = {**os.environ, "TGT_IPC_SOCKET": str(folder / "ctl")}
        self.tids: dict[str, int] = {}
        setpriv = shutil.which("setpriv")
        # The daemon ends with the thread that starts it: so this is the main thread, and it does not wait for anything.
        wrapper = [setpriv, "--pdeathsig", "KILL"] if setpriv else []
        self.log = (folder / "log").open("wb")
        self._process = subprocess.Popen(
            [*wrapper, program, "-f", "-C", str(_CONTROL), "--iscsi", f"portal={address}:{port}"],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=self._env,
        )

    async def ready(self) -> None:
        """Wait until it answers. Raises ReplicatorError with what it said."""
        for _ in range(_START_TRIES):
            if self._process.poll() is not None:
                break
            if await trio.to_thread.run_sync(self._answers):
                return
            await trio.sleep(_START_GAP_S)
        said = (self._folder / "log").read_text(errors="replace").strip().splitlines()[-1:]
        raise ReplicatorError(f"tgtd on {self.address} does not start: {' '.join(said)}")

    def _answers(self) -> bool:
        done = self._run("--mode", "system", "--op", "show")
        return done.returncode == 0

    def _run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                ["tgtadm", "-C", str(_CONTROL), "--lld", "iscsi", *words],
                env=self._env,
                capture_output=True,
                timeout=_ADM_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # Not its own words: they hold the command, which may hold a secret.
            raise ReplicatorError(f"tgtd on {self.address} does not answer") from None

    def admin(self, *words: str) -> None:
        """Run tgtadm. Raises ReplicatorError with what it said; secrets are not in it."""
        done = self._run(*words)
        if done.returncode:
            raise ReplicatorError(
                f"tgtadm {' '.join(words[:4])} failed: {done.stderr.decode(errors='replace').strip()}"
            )

    def new(self, target: Target) -> int:
        """Make a target with its rights, no disks yet. Blocks."""
        tid = next(self._ids)
        self.admin(
            "--mode", "target", "--op", "new", "--tid", str(tid), "--targetname", target.name
        )
        self.tids[target.name] = tid
        for initiator in target.initiators:
            self.admin(
                "--mode", "target", "--op", "bind", "--tid", str(tid), "--initiator-name", initiator
            )  # fmt: skip
        if target.secret:
            for initiator in target.initiators:
                self._account(tid, initiator, target.secret, outgoing=False)
            if target.client_secret:
                self._account(tid, target.name, target.client_secret, outgoing=True)
        return tid

    def takes(self, target: Target) -> bool:
        """Whether the target's initiators have no other secret here: an account is the daemon's, with one password."""
        return all(
            self._accounts[user].secret == target.secret
            for user in target.initiators
            if target.secret and user in self._accounts and self._accounts[user].bound
        )

    def _account(self, tid: int, user: str, secret: str, *, outgoing: bool) -> None:
        account = self._accounts.get(user)
        if account is not None and account.secret != secret:
            self.admin("--mode", "account", "--op", "delete", "--user", user)
            account = None
        if account is None:
            self.admin("--mode", "account", "--op", "new", "--user", user, "--password", secret)
            self._accounts[user] = account = _Account(secret, set())
        account.bound.add(tid)
        words = ["--mode", "account", "--op", "bind", "--tid", str(tid), "--user", user]
        self.admin(*words, *(["--outgoing"] if outgoing else []))

    def add_luns(self, tid: int, luns: tuple[Lun, ...]) -> None:
        """Blocks."""
        for number, lun in enumerate(luns, 1):
            where = ["--tid", str(tid), "--lun", str(number)]
            self.admin(
                "--mode", "logicalunit", "--op", "new", *where,
                "--backing-store", str(lun.path), "--bstype", "rdwr",
            )  # fmt: skip
            serial = lun.serial.replace("-", "")
            params = f"vendor_id=NUTANIX,product_id=VDISK,thin_provisioning=1,scsi_sn={serial},scsi_id={serial}"
            self.admin("--mode", "logicalunit", "--op", "update", *where, "--params", params)

    def redirect(self, tid: int, address: str, port: int) -> None:
        """Send whoever logs in on to another portal. Blocks."""
        for name, value in (
            ("RedirectAddress", address),
            ("RedirectPort", str(port)),
            ("RedirectReason", "Temporary"),
        ):
            self.admin(
                "--mode", "target", "--op", "update", "--tid", str(tid), "--name", name, "--value", value
            )  # fmt: skip

    def drop(self, name: str) -> None:
        """Remove a target; its sessions end. Blocks."""
        tid = self.tids.pop(name, None)
        if tid is not None:
            self.admin("--mode", "target", "--op", "delete", "--tid", str(tid), "--force")
            for account in self._accounts.values():
                account.bound.discard(tid)

    def kill(self) -> None:
        """End the daemon."""
        self._process.kill()
        self._process.wait()
        self.log.close()


class Targets:
    """Every daemon of a simulator, and which volume group is served by which."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._daemons: dict[tuple[str, int], Daemon] = {}
        self._served: dict[str, list[tuple[Daemon, Target]]] = {}
        self._folder: Path | None = None
        self._lock = trio.Lock()

    @property
    def folder(self) -> Path | None:
        """Where the daemons' sockets and logs are: apart from the state, because a socket's name must be short."""
        return self._folder

    async def serve(self, group: str, targets: list[Target], portal: str, cvms: list[str]) -> None:
        """Serve a volume group's targets from now on, in place of what was served of it."""
        async with self._lock:
            await self._remove(group)
            served = self._served.setdefault(group, [])
            for number, target in enumerate(targets):
                door = await self._daemon(portal, self.port)
                if not cvms:
                    served.append((door, target))
                    tid = await trio.to_thread.run_sync(door.new, target)
                    await trio.to_thread.run_sync(door.add_luns, tid, target.luns)
                    continue
                # A login is sent on before anybody proves anything: the door needs no secrets.
                sign = replace(target, luns=(), secret=None, client_secret=None)
                served.append((door, sign))
                tid = await trio.to_thread.run_sync(door.new, sign)
                home = await self._home(cvms[number % len(cvms)], target)
                served.append((home, target))
                home_tid = await trio.to_thread.run_sync(home.new, target)
                await trio.to_thread.run_sync(home.add_luns, home_tid, target.luns)
                await trio.to_thread.run_sync(door.redirect, tid, home.address, home.port)

    async def _home(self, cvm: str, target: Target) -> Daemon:
        """Where a target can be on a CVM: on a port of its own, if its initiator has another secret on the usual one."""
        for port in range(self.port, self.port + _PORTS_MAX):
            daemon = await self._daemon(cvm, port)
            if daemon.takes(target):
                return daemon
        raise ReplicatorError(f"an initiator has more than {_PORTS_MAX} secrets on {cvm}")

    async def remove(self, group: str) -> None:
        """Serve it no more."""
        async with self._lock:
            await self._remove(group)

    async def _remove(self, group: str) -> None:
        for daemon, target in self._served.pop(group, []):
            await trio.to_thread.run_sync(daemon.drop, target.name)

    async def open_portal(self, address: str) -> None:
        """See that a data services address answers, also while nothing is attached."""
        async with self._lock:
            await self._daemon(address, self.port)

    async def _daemon(self, address: str, port: int) -> Daemon:
        daemon = self._daemons.get((address, port))
        if daemon is None:
            program = shutil.which("tgtd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
            if program is None:
                raise UsageError("tgtd is missing: install the package tgt")
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
            folder = self._folder / str(len(self._daemons))
            folder.mkdir()
            daemon = Daemon(program, address, port, folder)
            self._daemons[address, port] = daemon
            await daemon.ready()
            # Without any target, tgtd cuts a discovery off; with one that nobody may see, the answer is an empty list.
            await trio.to_thread.run_sync(daemon.new, Target(_NOBODYS, (), (), None, None))
        return daemon

    def close(self) -> None:
        """End every daemon, at once."""
        for daemon in self._daemons.values():
            daemon.kill()
        self._daemons.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
