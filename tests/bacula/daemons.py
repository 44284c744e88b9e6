# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Director, a Storage daemon and File daemons of the distribution in one folder, on an address of loopback of their own.

For tests and for ``scripts/bacula-lab``. Any user can run them; what is in the folder outlives the processes. Knows nothing
of what is backed up: ``bacula_lab.py`` and the tests write Jobs into ``etc/jobs.d``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
ROOT_SCRIPT = CHECKOUT / "scripts" / "bacula-root"
#: Where the distribution has the Director's tables.
SCHEMA = "/usr/share/dbconfig-common/data/bacula-director-sqlite3/install/sqlite3"
#: Below what the kernel gives away by itself.
DIRECTOR_PORT, STORAGE_PORT, CLIENT_PORT = 29101, 29102, 29110
START_S = 30.0
JOBS_AT_ONCE = 24


class LabError(Exception):
    """A daemon or the console did not do as it must; the message says what was seen."""


@dataclass(frozen=True, slots=True)
class Client:
    """A File daemon. ``lines`` go into its FileDaemon resource (``PKI Encryption = Yes``)."""

    name: str = "lab-fd"
    lines: tuple[str, ...] = ()


@dataclass
class Daemons:
    """The daemons of a folder. ``debian13``: those of the Debian 13 root (``scripts/bacula-root``), not this system's."""

    folder: Path
    clients: Sequence[Client] = (Client(),)
    debian13: bool = False
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _facts: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all daemons, the Director last: what it talks to is there before it."""
        return ["sd", *(client.name for client in self.clients), "dir"]

    @property
    def address(self) -> str:
        """Where all of them listen."""
        return self._facts["address"]

    @property
    def plugins(self) -> Path:
        """The plugin directory of the File daemons."""
        return self.folder / "plugins"

    @property
    def volumes(self) -> Path:
        """Where the Storage daemon has its volumes."""
        return self.folder / "volumes"

    @property
    def restored(self) -> Path:
        """Where the restore job puts files unless told otherwise."""
        return self.folder / "restored"

    @property
    def database(self) -> Path:
        """The catalogue."""
        return self.folder / "run" / "dir" / "bacula.db"

    def port(self, name: str) -> int:
        """The port of a daemon."""
        if name == "dir":
            return DIRECTOR_PORT
        if name == "sd":
            return STORAGE_PORT
        return CLIENT_PORT + [client.name for client in self.clients].index(name)

    def config(self, name: str) -> Path:
        """The configuration file of a daemon, or of ``bconsole``."""
        return self.folder / "etc" / f"{name}.conf"

    # Files

    def prepare(self) -> None:
        """Write what is missing; configurations are written anew. What is in the catalogue stays."""
        for part in ("etc/jobs.d", "run/dir", "run/sd", "volumes", "log", "restored", "plugins"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        for client in self.clients:
            (self.folder / "run" / client.name).mkdir(exist_ok=True)
        self.folder.chmod(0o700)
        facts = self.folder / "etc" / "lab.json"
        if facts.exists():
            self._facts = json.loads(facts.read_text())
        else:
            self._facts = {"address": _free_address(), "password": secrets.token_hex(16)}
            _write(facts, json.dumps(self._facts))
        _write(self.config("dir"), self._director())
        _write(self.config("sd"), self._storage())
        for client in self.clients:
            _write(self.config(client.name), self._client(client))
        _write(self.config("bconsole"), self._console())
        # The Director reads a pipe that must give something.
        self.jobs("none", "# Jobs are in the files beside this one.\n")
        if not self.database.exists():
            self._make_database()

    def jobs(self, name: str, text: str) -> None:
        """Resources of the Director in a file of their own; a running Director takes them with ``reload``."""
        _write(self.folder / "etc" / "jobs.d" / f"{name}.conf", text)

    def forget(self) -> None:
        """Remove everything. The daemons must be stopped."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_database(self) -> None:
        schema = SCHEMA
        if self.debian13:
            schema = f"{CHECKOUT}/.cache/bacula-root{SCHEMA}"
        new = self.database.with_suffix(".new")
        new.unlink(missing_ok=True)
        connection = sqlite3.connect(new)
        connection.executescript(Path(schema).read_text("utf-8"))
        connection.close()
        new.rename(self.database)

    def _director(self) -> str:
        password, folder = self._facts["password"], self.folder
        clients = "".join(
            f"""
Client {{
  Name = {client.name}
  Address = {self.address}
  FDPort = {self.port(client.name)}
  Catalog = Cat
  Password = "{password}"
  AutoPrune = no
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
}}
"""
            for client in self.clients
        )
        first = self.clients[0].name
        return f"""
Director {{
  Name = lab-dir
  DirAddress = {self.address}
  DirPort = {DIRECTOR_PORT}
  QueryFile = "/dev/null"
  WorkingDirectory = "{folder}/run/dir"
  PidDirectory = "{folder}/run/dir"
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
  Password = "{password}"
  Messages = Daemon
}}
Catalog {{
  Name = Cat
  dbname = "bacula"; dbuser = ""; dbpassword = ""
}}
{clients}
Storage {{
  Name = lab-sd
  Address = {self.address}
  SDPort = {STORAGE_PORT}
  Password = "{password}"
  Device = FileDev
  Media Type = File
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
}}
Storage {{
  Name = lab-sd-2
  Address = {self.address}
  SDPort = {STORAGE_PORT}
  Password = "{password}"
  Device = FileDev2
  Media Type = File
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
}}
Pool {{
  Name = P
  Pool Type = Backup
  Label Format = "Vol-"
  Maximum Volumes = 50
  AutoPrune = no
  Recycle = no
  Next Pool = Consolidated
}}
Pool {{
  Name = Consolidated
  Pool Type = Backup
  Storage = lab-sd-2
  Label Format = "Full-"
  Maximum Volumes = 50
  AutoPrune = no
  Recycle = no
}}
JobDefs {{
  Name = JD
  Type = Backup
  Level = Full
  Client = {first}
  Storage = lab-sd
  Pool = P
  Messages = Std
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
}}
Job {{
  Name = restore
  Type = Restore
  Client = {first}
  Storage = lab-sd
  Pool = P
  FileSet = None
  Messages = Std
  Where = "{self.restored}"
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
}}
FileSet {{
  Name = None
  Include {{
    Options {{
      signature = SHA1
    }}
    File = "{folder}/etc"
  }}
}}
Messages {{
  Name = Std
  append = "{folder}/log/job.log" = all, !skipped
  console = all, !skipped, !saved
  catalog = all
}}
Messages {{
  Name = Daemon
  append = "{folder}/log/daemon.log" = all, !skipped
}}
@|"sh -c 'cat {folder}/etc/jobs.d/*.conf'"
"""

    def _storage(self) -> str:
        devices = "".join(
            f"""
Device {{
  Name = {name}
  Media Type = File
  Archive Device = "{self.volumes}"
  LabelMedia = yes
  Random Access = yes
  AutomaticMount = yes
  RemovableMedia = no
  AlwaysOpen = no
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
}}
"""
            for name in ("FileDev", "FileDev2")
        )
        return f"""
Storage {{
  Name = lab-sd
  SDAddress = {self.address}
  SDPort = {STORAGE_PORT}
  WorkingDirectory = "{self.folder}/run/sd"
  PidDirectory = "{self.folder}/run/sd"
  Maximum Concurrent Jobs = {JOBS_AT_ONCE * 2}
}}
Director {{
  Name = lab-dir
  Password = "{self._facts["password"]}"
}}
{devices}
Messages {{
  Name = Std
  director = lab-dir = all
}}
"""

    def _client(self, client: Client) -> str:
        work = self.folder / "run" / client.name
        lines = "\n  ".join(client.lines)
        return f"""
FileDaemon {{
  Name = {client.name}
  FDAddress = {self.address}
  FDPort = {self.port(client.name)}
  WorkingDirectory = "{work}"
  PidDirectory = "{work}"
  Plugin Directory = "{self.plugins}"
  Maximum Concurrent Jobs = {JOBS_AT_ONCE}
  {lines}
}}
Director {{
  Name = lab-dir
  Password = "{self._facts["password"]}"
}}
Messages {{
  Name = Std
  director = lab-dir = all, !skipped, !restored
}}
"""

    def _console(self) -> str:
        return f"""
Director {{
  Name = lab-dir
  Address = {self.address}
  DIRport = {DIRECTOR_PORT}
  Password = "{self._facts["password"]}"
}}
"""

    # Processes

    def argv(self, program: str, *words: str) -> list[str]:
        """How a program of the daemons' own system is run."""
        prefix = [str(ROOT_SCRIPT), "exec"] if self.debian13 else []
        return [*prefix, program, *words]

    def environment(self) -> dict[str, str]:
        """The environment of these programs: English, nothing of Python's, and the folder visible in the other root."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "LC_", "LANG"))
        }
        kept["LC_ALL"] = "C.UTF-8"
        inside = any(parent in {CHECKOUT, Path("/tmp")} for parent in self.folder.parents)
        return kept if inside else kept | {"REPLCTL_BIND": str(self.folder)}

    def start(self) -> None:
        """Start what does not run, and wait until it listens. Raises LabError with what a daemon said."""
        missing = [name for name in self.names if not self.pid(name)]
        for name in missing:
            self.start_one(name)

    def start_one(self, name: str, environment: dict[str, str] | None = None) -> None:
        """Start a daemon and wait until it listens; ``environment`` is added to its own."""
        program = f"/usr/sbin/bacula-{name if name in {'dir', 'sd'} else 'fd'}"
        conf = str(self.config(name))
        out = self.folder / "log" / f"{name}.out"
        with out.open("ab") as log:
            process = subprocess.Popen(
                self.argv(program, "-f", "-P", "-c", conf),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment() | (environment or {}),
                start_new_session=True,
            )
        self._children[name] = process
        (self.folder / "run" / f"{name}.pid").write_text(f"{process.pid}\n")
        # Never by connecting: each attempt leaves a "Security Alert" in the messages of the next job.
        limit = time.monotonic() + START_S
        while not _listens(self.address, self.port(name)):
            if process.poll() is not None or time.monotonic() > limit:
                self.stop()
                raise LabError(f"bacula-{name} does not start: {out.read_text()[-1500:]}")
            time.sleep(0.02)

    def pid(self, name: str) -> int:
        """The pid of a running daemon of this folder; 0 if it does not run."""
        try:
            pid = int((self.folder / "run" / f"{name}.pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return 0
        return pid if str(self.config(name)).encode() in words.split(b"\0") else 0

    def stop(self) -> None:
        """Stop all daemons; one that does not end in time is killed."""
        for name in reversed(self.names):
            pid = self.pid(name)
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        for name in reversed(self.names):
            self.stop_one(name)

    def stop_one(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a daemon a signal and wait for its end; nothing if it does not run."""
        pid = self.pid(name)
        if pid:
            watched = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(watched, select.POLLIN)
            try:
                for each in (how, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(watched, each)
                    if poll.poll(10_000):
                        break
            finally:
                os.close(watched)
        child = self._children.pop(name, None)
        if child is not None:
            child.wait()
        (self.folder / "run" / f"{name}.pid").unlink(missing_ok=True)

    # Talking

    def console(self, *lines: str, limit_s: float = 240) -> str:
        """What ``bconsole`` answers to these lines. Its exit status says nothing of jobs. Raises LabError if it hangs."""
        argv = self.argv("/usr/sbin/bconsole", "-c", str(self.config("bconsole")))
        text = "".join(f"{line}\n" for line in lines)
        try:
            done = subprocess.run(
                argv,
                input=text,
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
                env=self.environment(),
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode(errors="replace") if error.stdout else ""
            raise LabError(f"bconsole still waits after {limit_s} s at: {said[-1500:]}") from None
        if done.returncode != 0:
            raise LabError(f"bconsole: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done.stdout

    def query(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the catalogue."""
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30)
        try:
            return connection.execute(statement, values).fetchall()
        finally:
            connection.close()


def _write(path: Path, text: str) -> None:
    """A private file, whole or not at all: there are passwords in it."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(text, "utf-8")
    new.rename(path)


def _listens(address: str, port: int) -> bool:
    wanted = f"{_hex(address)}:{port:04X} 00000000:0000 0A"
    return wanted in Path("/proc/net/tcp").read_text()


def _hex(address: str) -> str:
    return bytes(reversed([int(part) for part in address.split(".")])).hex().upper()


def _free_address() -> str:
    """An address of loopback that nobody listens on: a lab's ports are the same everywhere, and never in each other's way."""
    while True:
        parts = [
            127,
            100 + secrets.randbelow(100),
            secrets.randbelow(256),
            1 + secrets.randbelow(254),
        ]
        address = ".".join(map(str, parts))
        if f"{_hex(address)}:" not in Path("/proc/net/tcp").read_text():
            return address


__all__ = ["CHECKOUT", "Client", "Daemons", "LabError"]
