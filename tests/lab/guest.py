# SPDX-License-Identifier: AGPL-3.0-or-later
"""Disk images of a small virtual machine, made without root and without mounting anything.

The boot disk holds what a real one holds: a partition table, a FAT partition from which SeaBIOS and
syslinux start a Debian kernel, and an ext4 partition. The guest's user space is busybox and
`init.sh` in the initramfs; it prints READY_LINE on the serial console and takes commands there.

All functions block. What is expensive is kept in `.cache/lab`, under a name that changes with all
that it was made from; images are handed out as copies.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

#: First line on the console once the guest takes commands.
READY_LINE = "replctl-guest: ready"

MIB = 1 << 20
BOOT_DISK_BYTES = 1024 * MIB
SECTOR_BYTES = 512
#: The boot partition: starts at 1 MiB, as every partitioning tool has it.
FAT_START_SECTOR = 2048
FAT_SECTORS = 24 * MIB // SECTOR_BYTES
EXT4_START_SECTOR = FAT_START_SECTOR + FAT_SECTORS
#: The last MiB stays free, as it does where a partition table's copy may come to stand.
EXT4_SECTORS = (BOOT_DISK_BYTES - MIB) // SECTOR_BYTES - EXT4_START_SECTOR

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off"
SYSLINUX_CONFIG = f"""\
DEFAULT guest
PROMPT 0
LABEL guest
KERNEL vmlinuz
INITRD initrd.gz
APPEND {KERNEL_ARGUMENTS}
"""

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache" / "lab"
BUSYBOX = Path("/bin/busybox")
MBR_CODE = Path("/usr/lib/syslinux/mbr/mbr.bin")


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What a guest boots from, for `qemu -kernel … -initrd …` too: faster than through a disk."""

    kernel: Path
    initramfs: Path


def boot_files() -> BootFiles:
    """Kernel and initramfs of the guest, made if they are not in the cache."""
    folder = _cached("boot", _make_boot_files)
    return BootFiles(folder / "vmlinuz", folder / "initrd.gz")


def boot_disk(path: Path) -> None:
    """Make a sparse raw disk of 1 GiB (about 20 MiB used) at ``path`` that boots by itself."""
    copy_sparse(_cached("disk", _make_boot_disk) / "boot.raw", path)


def make_tree(folder: Path, count: int, seed: int) -> None:
    """Fill a new ``folder`` with ``count`` files, the same for the same ``seed``.

    Sizes run from nothing to 256 KiB, most of them small, as in a home directory; about half hold
    text, which compresses, and half noise, which does not.
    """
    chance = random.Random(seed)
    words = [f"{chance.getrandbits(40):x}" for _ in range(512)]
    folder.mkdir(parents=True)
    for number in range(count):
        place = folder / f"area-{chance.randrange(12)}" / f"group-{chance.randrange(24)}"
        place.mkdir(parents=True, exist_ok=True)
        length = int(256 * 1024 * chance.random() ** 6)
        text = " ".join(chance.choices(words, k=length // 8 + 1)).encode()[:length]
        content = chance.randbytes(length) if number % 2 else text
        (place / f"file-{number}").write_bytes(content)


def data_disk(path: Path, tree: Path, size: int) -> None:
    """Make a sparse raw disk of ``size`` bytes: one ext4 file system holding what is in ``tree``.

    Raises CalledProcessError if it does not fit.
    """
    _make_ext4(path, offset=0, size=size, tree=tree)


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a disk image so that zeros take no space in the copy."""
    _run("cp", "--sparse=always", "--reflink=auto", "--", source, target)


def _make_boot_files(folder: Path) -> None:
    wanted = {f"{name}.ko": f"modules/{name}.ko" for name in MODULES}
    files: dict[str, bytes] = {}
    for name, content in _unpack_kernel():
        base = name.rsplit("/", 1)[-1]
        if base.startswith("vmlinuz-"):
            (folder / "vmlinuz").write_bytes(content)
        elif base in wanted:
            files[wanted.pop(base)] = content
    if wanted or not (folder / "vmlinuz").exists():
        raise RuntimeError(f"{_kernel_package().name} lacks the kernel or {sorted(wanted)}")
    files["init"] = (HERE / "init.sh").read_bytes()
    files["bin/busybox"] = BUSYBOX.read_bytes()
    applets = _run(BUSYBOX, "--list").split()
    (folder / "initrd.gz").write_bytes(gzip.compress(_cpio(files, applets), 6, mtime=0))


def _unpack_kernel() -> Iterable[tuple[str, bytes]]:
    """Names and contents of those files in the kernel's package that a guest may need."""
    command = ["dpkg-deb", "--fsys-tarfile", os.fspath(_kernel_package())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and ("/vmlinuz-" in member.name or "/virtio" in member.name):
                    file: IO[bytes] | None = archive.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
    if unpacking.returncode:
        raise subprocess.CalledProcessError(unpacking.returncode, command)


def _kernel_package() -> Path:
    """The package of Debian's cloud kernel, which scripts/setup puts in place."""
    found = sorted((CACHE / "packages").glob("linux-image-*.deb"))
    if not found:
        raise RuntimeError(f"there is no kernel package in {CACHE / 'packages'}: run scripts/setup")
    return found[-1]


def _cpio(files: dict[str, bytes], applets: Iterable[str]) -> bytes:
    """An initramfs of ``files``, links in /bin for busybox's ``applets``, and /dev/console.

    Written here and not by cpio(1), which can put in device nodes only where it finds them, and
    they can be made only by root. The format is the kernel's: initramfs buffer format, "newc".
    """
    folders = {"dev", "proc", "sys", "mnt", "tmp", *(name.rpartition("/")[0] for name in files)}
    entries = [(name, 0o040755, b"", (0, 0)) for name in sorted(folders - {""})]
    entries.append(("dev/console", 0o020600, b"", (5, 1)))
    entries += [(name, 0o100755, content, (0, 0)) for name, content in sorted(files.items())]
    entries += [
        (f"bin/{name}", 0o120777, b"busybox", (0, 0)) for name in applets if name != "busybox"
    ]
    entries.append(("TRAILER!!!", 0, b"", (0, 0)))
    archive = bytearray()
    for inode, (name, mode, content, (major, minor)) in enumerate(entries, start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _make_boot_disk(folder: Path) -> None:
    disk = folder / "boot.raw"
    files = boot_files()
    with disk.open("wb") as file:
        file.truncate(BOOT_DISK_BYTES)
    table = (
        "label: dos\nlabel-id: 0x7265706c\n"
        f"start={FAT_START_SECTOR}, size={FAT_SECTORS}, type=c, bootable\n"
        f"start={EXT4_START_SECTOR}, size={EXT4_SECTORS}, type=83\n"
    )
    _run("sfdisk", "--quiet", disk, text=table)
    with disk.open("r+b") as file:
        code = MBR_CODE.read_bytes()
        assert len(code) <= 440, "the boot code would overwrite the partition table"
        file.write(code)
    _make_fat(disk, files)
    tree = folder / "tree"
    make_tree(tree / "srv", count=200, seed=1)
    offset, size = EXT4_START_SECTOR * SECTOR_BYTES, EXT4_SECTORS * SECTOR_BYTES
    _make_ext4(disk, offset=offset, size=size, tree=tree)
    shutil.rmtree(tree)


def _make_fat(disk: Path, files: BootFiles) -> None:
    offset = FAT_START_SECTOR * SECTOR_BYTES
    # The boot sector finds its own files by the number of sectors that lie before the partition.
    place = ["--offset", FAT_START_SECTOR, "-h", FAT_START_SECTOR]
    kib = FAT_SECTORS * SECTOR_BYTES // 1024
    _run("mkfs.vfat", "-F", 16, "-n", "BOOT", "-i", "7265706c", *place, disk, kib)
    config = disk.with_name("syslinux.cfg")
    config.write_text(SYSLINUX_CONFIG, "ascii")
    _run("mcopy", "-i", f"{disk}@@{offset}", files.kernel, files.initramfs, config, "::")
    config.unlink()
    _run("syslinux", "--install", "--offset", offset, disk)


def _make_ext4(disk: Path, *, offset: int, size: int, tree: Path) -> None:
    # Nothing is left for the guest's kernel to initialise behind the test's back, and the owner of
    # the tree on this machine is of no interest there.
    options = f"offset={offset},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
    with disk.open("ab") as file:
        file.truncate(max(file.tell(), offset + size))
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-E", options, "-d", tree, disk, f"{size // 1024}k")


def _run(*command: object, text: str | None = None) -> str:
    """Run a program to its end and return its output; raises CalledProcessError."""
    # mtools would check the geometry of a disk from an age that had one.
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C"}
    environment["PATH"] = environment.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    words = [str(word) for word in command]
    done = subprocess.run(
        words, input=text, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        # The reason belongs to the error: CalledProcessError by itself does not show it.
        raise subprocess.CalledProcessError(
            done.returncode, [*words, f"({done.stderr.strip()})"], done.stdout, done.stderr
        )
    return done.stdout


def _cached(kind: str, make: Callable[[Path], None]) -> Path:
    """The folder of that kind in the cache, made as a whole or not at all."""
    folder = CACHE / f"{kind}-{_key()}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix=".making-") as scratch:
            making = Path(scratch) / kind
            making.mkdir()
            make(making)
            try:
                making.rename(folder)
            except OSError:
                # Another process made the same in the meantime: one is as good as the other.
                if not folder.exists():
                    raise
    return folder


@functools.cache
def _key() -> str:
    """Changes with everything that goes into an image."""
    digest = hashlib.sha256(_kernel_package().name.encode())
    for path in (HERE / "guest.py", HERE / "init.sh", BUSYBOX, MBR_CODE):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
