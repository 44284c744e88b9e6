# SPDX-License-Identifier: AGPL-3.0-or-later
"""A lab with the product in it: our plugin and backend in its File daemons, VMs of plain images, FileSets and Jobs.

``scripts/bacula-lab`` gives it to people, ``conftest.py`` to tests. The Jobs are those that docs/bacula.md shows.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bacula.daemons import CHECKOUT, Client, Daemons, LabError
from tests.bacula.director import Director

MIB = 1 << 20
PLUGIN = CHECKOUT / ".cache" / "fd_plugin" / "replicator-fd.so"
#: A File daemon that encrypts, beside the one that does not.
PKI_CLIENT = "pki-fd"
#: What a disk's pages of text say: a volume in plain text shows it.
PATTERN = b"plain text of a disk of the lab. "

_BACKEND = """#!/bin/sh
# Made by the lab: the checkout's backend, as a package would have put it beside the plugin.
{command} "$@"
"""


@dataclass
class Vm:
    """A VM of plain images. ``folder`` holds ``disk-N.raw``."""

    name: str
    folder: Path
    sizes: tuple[int, ...] = (32 * MIB, 16 * MIB)

    @property
    def disks(self) -> dict[str, Path]:
        """Images by the name of the disk."""
        return {f"disk-{n}": self.folder / f"disk-{n}.raw" for n in range(len(self.sizes))}

    def make(self) -> None:
        """Make images that are missing: random bytes, text, and holes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, (disk, path) in enumerate(self.disks.items()):
            if not path.exists():
                noise = random.Random(f"{self.name}/{disk}")
                new = path.with_suffix(".new")
                with new.open("wb") as file:
                    file.truncate(self.sizes[number])
                    for offset in range(0, self.sizes[number], 4 * MIB):
                        file.seek(offset)
                        file.write(noise.randbytes(MIB // 2))
                        file.write(PATTERN * (65536 // len(PATTERN)))
                new.rename(path)

    def write(self, disk: str, offset: int, data: bytes) -> None:
        """Change a disk, as the VM would."""
        with self.disks[disk].open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def content(self) -> dict[str, bytes]:
        """What the disks hold now."""
        return {disk: path.read_bytes() for disk, path in self.disks.items()}

    def sums(self) -> dict[str, str]:
        """SHA-256 of the disks."""
        return {disk: file_sum(path) for disk, path in self.disks.items()}


@dataclass
class Lab:
    """Daemons with the product. ``prepare``, then ``start``; ``stop`` at the end."""

    folder: Path
    debian13: bool = False
    pki: bool = False
    vms: dict[str, Vm] = field(default_factory=dict)
    daemons: Daemons = field(init=False)
    director: Director = field(init=False)

    def __post_init__(self) -> None:
        clients = [Client()]
        if self.pki:
            pair = self.folder / "etc" / "pki.pem"
            keys = ("PKI Signatures = Yes", "PKI Encryption = Yes", f'PKI Keypair = "{pair}"')
            clients.append(Client(PKI_CLIENT, keys))
        self.daemons = Daemons(self.folder, clients, debian13=self.debian13)
        self.director = Director(self.daemons)

    @property
    def state(self) -> Path:
        """``state_dir`` of the backends."""
        return self.folder / "state"

    @property
    def restored(self) -> Path:
        """Where restores go unless told otherwise."""
        return self.daemons.restored

    @property
    def pki_key(self) -> Path:
        """Key and certificate of the File daemon that encrypts."""
        return self.folder / "etc" / "pki.pem"

    def prepare(self) -> None:
        """Write what is missing. Raises LabError if the plugin was not built."""
        self.daemons.prepare()
        if self.pki and not self.pki_key.exists():
            _make_key(self.pki_key)
        self.install()
        (self.folder / "etc" / "replicator").mkdir(exist_ok=True)

    def install(self) -> None:
        """The plugin, a copy because Bacula follows no symbolic link, and the backend beside it."""
        if not PLUGIN.exists():
            raise LabError(f"{PLUGIN} is missing: run scripts/build-plugin")
        target = self.daemons.plugins / PLUGIN.name
        if not target.exists() or target.read_bytes() != PLUGIN.read_bytes():
            # Never into a file that a running daemon has mapped.
            new = target.with_suffix(".new")
            shutil.copyfile(PLUGIN, new)
            new.chmod(0o755)
            new.rename(target)
        self.set_backend()

    def set_backend(self, command: str = "") -> None:
        """Put a backend beside the plugin: shell text to which the plugin's arguments are added; the product's own unless given."""
        if not command and self.debian13:
            command = (
                f"PYTHONPATH=/opt/site-packages:{CHECKOUT} exec python3 -c"
                " 'import sys; from bacula_adapter.backend_command import main; sys.exit(main())'"
            )
        command = command or f"exec {CHECKOUT}/.venv/bin/replicator-backend"
        path = self.daemons.plugins / "replicator-backend"
        new = path.with_suffix(".new")
        new.write_text(_BACKEND.format(command=command))
        new.chmod(0o755)
        new.rename(path)

    def start(self) -> None:
        """Start the daemons that do not run."""
        self.daemons.start()

    def stop(self) -> None:
        """Stop them."""
        self.daemons.stop()

    def vm(self, name: str, *sizes: int) -> Vm:
        """A VM of the lab, made if need be, with its configuration ``etc/replicator/NAME.conf``."""
        vm = Vm(name, self.folder / "vms" / name, *((sizes,) if sizes else ()))
        vm.make()
        self.vms[name] = vm
        images = ",".join(f"{disk}={path}" for disk, path in vm.disks.items())
        self.configure(name, {"source": "image", "vm": name, "image_disks": images})
        return vm

    def configure(self, name: str, keys: Mapping[str, str]) -> Path:
        """A configuration for the backend, with the lab's state directory."""
        path = self.folder / "etc" / "replicator" / f"{name}.conf"
        all_keys = {
            "state_dir": str(self.state),
            "debug_log": str(self.folder / "log" / "backend.log"),
            **keys,
        }
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text("".join(f"{key} = {value}\n" for key, value in all_keys.items()))
        return path

    def plugin(self, config: str, *words: str) -> str:
        """A plugin string with one of ``configure``'s."""
        path = self.folder / "etc" / "replicator" / f"{config}.conf"
        return " ".join(["replicator:", f"config={path}", *words])

    def add_job(
        self,
        name: str,
        *plugins: str,
        options: str = "signature = SHA1",
        lines: Sequence[str] = (),
        fileset: Sequence[str] = (),
    ) -> None:
        """A Job with a FileSet of its own, an Include block for each plugin string; ``reload`` or ``start`` comes after it."""
        self.daemons.jobs(
            name, job_text(name, *plugins, options=options, lines=lines, fileset=fileset)
        )


def job_text(
    name: str,
    *plugins: str,
    options: str = "signature = SHA1",
    lines: Sequence[str] = (),
    fileset: Sequence[str] = (),
) -> str:
    """A FileSet and a Job, as a Director's configuration has them."""
    blocks = "".join(
        f"""  Include {{
    Options {{
      {option_lines(options)}
    }}
    Plugin = "{_escaped(plugin)}"
  }}
"""
        for plugin in plugins
    )
    more = "".join(f"  {line}\n" for line in fileset)
    job = "".join(f"  {line}\n" for line in lines)
    return f"""FileSet {{
  Name = {name}-files
{more}{blocks}}}
Job {{
  Name = {name}
  JobDefs = JD
  FileSet = {name}-files
{job}}}
"""


def option_lines(options: str) -> str:
    """Options, separated by semicolons, as lines."""
    return "\n      ".join(part.strip() for part in options.split(";"))


def file_sum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _escaped(plugin: str) -> str:
    return plugin.replace("\\", "\\\\").replace('"', '\\"')


def _make_key(path: Path) -> None:
    """A key and a certificate of its own, in one file."""
    key, certificate = path.with_suffix(".key"), path.with_suffix(".crt")
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-subj", "/CN=lab"]
    subprocess.run(
        ["openssl", *words, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(key.read_bytes() + certificate.read_bytes())
    key.unlink()
    certificate.unlink()
    new.rename(path)


__all__ = ["MIB", "PATTERN", "PKI_CLIENT", "PLUGIN", "Lab", "Vm", "file_sum", "job_text"]
