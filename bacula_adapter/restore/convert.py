# SPDX-License-Identifier: AGPL-3.0-or-later
"""Raw images to the formats of other platforms and back, by qemu-img, checked against the raw image.

The raw image is whole before a conversion begins: qemu-img cannot write these formats from a stream, because their tables
stand before the data that they describe.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from replicator import durable
from replicator.errors import DamageError, RefusedError, StateError
from replicator.nursery import flat_nursery

_logger = logging.getLogger(__name__)

_PROGRESS = re.compile(rb"\((\d{1,3})(?:\.\d+)?/100%\)")
#: Larger images say how far they are.
_TALKATIVE: Final = 1 << 30
_STEP_PERCENT: Final = 25
_ERROR_MAX: Final = 4096
_OUTPUT_MAX: Final = 1 << 20
_TIB: Final = 1 << 40
#: util-linux is on every Linux.
_GUARD: Final = ("prlimit", f"--as={1 << 30}", "--cpu=60", "--")


@dataclass(frozen=True, slots=True)
class Format:
    """A format: qemu-img's driver and options for it, the most bytes of a disk, whether qemu-img can check it."""

    driver: str
    options: str = ""
    size_max: int = 1 << 50
    checked: bool = True
    unordered: bool = False


#: By ``target_format``. The variants are those that the platform takes as they are.
FORMATS: Final = {
    # Proxmox VE, KVM
    "qcow2": Format("qcow2", "compat=1.1", unordered=True),
    # vSphere: one file, read by ovftool, vmkfstools and the upload to a datastore
    "vmdk": Format("vmdk", "subformat=monolithicSparse,adapter_type=lsilogic", 2 * _TIB),
    # Hyper-V, generation 1. Without force_size the disk would grow to whole cylinders
    "vhd": Format("vpc", "subformat=dynamic,force_size=on", 2040 << 30, checked=False),
    # Hyper-V, generation 2
    "vhdx": Format("vhdx", "subformat=dynamic", 64 * _TIB, unordered=True),
}


def find_qemu_img() -> str:
    """The program. Raises RefusedError that names the package."""
    found = shutil.which("qemu-img")
    if found is None:
        raise RefusedError("qemu-img is not installed: install the package qemu-utils")
    return found


def check_size(name: str, size: int) -> None:
    """Raise RefusedError if a disk of ``size`` bytes cannot be had in the format."""
    most = FORMATS[name].size_max
    if size > most:
        raise RefusedError(
            f"target_format: {name} holds at most {most >> 30} GiB, the disk has {-(-size >> 30)} GiB; choose vhdx, qcow2 or raw"
        )


async def convert(source: Path, target: Path, name: str, *, title: str, size: int) -> None:
    """Make ``target`` in the format ``name`` from a raw image, durable and compared with it byte for byte.

    Raises StateError, or DamageError if the result is not the same. Cancelled, qemu-img is ended; ``target`` may be there.
    """
    form = FORMATS[name]
    command = ["convert", "-p", "-f", "raw", "-O", form.driver, "-m", "8"]
    if form.unordered:
        command.append("-W")
    if form.options:
        command += ["-o", form.options]
    await run([*command, str(source), str(target)], said=_teller(f"{title}: {name}", size))
    if form.checked:
        await run(["check", "-q", "-f", form.driver, str(target)])
    await compare(source, target, form.driver, title=title, size=size)
    await trio.to_thread.run_sync(_sync, target)


async def compare(raw: Path, other: Path, driver: str, *, title: str, size: int) -> None:
    """Raise DamageError unless the images hold the same; zeros after the end of the shorter one count as the same."""
    said = _teller(f"{title}: comparison", size)
    status, text = await _run(
        ["compare", "-p", "-f", "raw", "-F", driver, str(raw), str(other)], said
    )
    if status == 1:
        raise DamageError(f"{title}: the converted image differs from what was restored: {text}")
    if status:
        raise StateError(f"qemu-img compare: {text}")


async def to_raw(source: Path, driver: str, target: Path, *, title: str, size: int) -> None:
    """Make a raw image of one in another format, whose header was checked before; compared, durable. Raises as ``convert``."""
    command = ["convert", "-p", "-f", driver, "-O", "raw", "-m", "8", "-S", "64k"]
    await run([*command, str(source), str(target)], said=_teller(f"{title}: reading", size))
    await compare(target, source, driver, title=title, size=size)
    await trio.to_thread.run_sync(_sync, target)


def _sync(path: Path) -> None:
    with durable.DurableFile(path) as file:
        file.sync()


def _teller(title: str, size: int) -> Callable[[bytes | bytearray], None]:
    """Says how far qemu-img is, for images where that takes a while."""
    told = 0

    def take(piece: bytes | bytearray) -> None:
        nonlocal told
        found = _PROGRESS.findall(piece)
        percent = int(found[-1]) if found else 0
        if size >= _TALKATIVE and percent >= told + _STEP_PERCENT and percent < 100:
            told = percent // _STEP_PERCENT * _STEP_PERCENT
            _logger.info("%s: %d %%", title, told)

    return take


async def run(
    arguments: Sequence[str], said: Callable[[bytes | bytearray], None] | None = None
) -> None:
    """Run qemu-img. Raises StateError with what it says."""
    status, text = await _run(arguments, said)
    if status:
        raise StateError(f"qemu-img {arguments[0]}: {text}")


async def guarded(arguments: Sequence[str]) -> tuple[int, bytes, str]:
    """Status, output (at most 1 MiB) and last line of error of qemu-img, which is held to limits of memory and time: for files
    whose headers nobody has looked at yet.
    """
    taken = bytearray()

    def take(piece: bytes | bytearray) -> None:
        if len(taken) + len(piece) > _OUTPUT_MAX:
            raise StateError(f"qemu-img {arguments[0]}: it says too much")
        taken.extend(piece)

    status, text = await _run(arguments, take, _GUARD)
    return status, bytes(taken), text


async def _run(
    arguments: Sequence[str],
    said: Callable[[bytes | bytearray], None] | None = None,
    before: Sequence[str] = (),
) -> tuple[int, str]:
    """Status and a line of explanation. Output is handed over as it comes; errors are kept, a bounded part of them."""
    command = [*before, find_qemu_img(), *arguments]
    errors, words = bytearray(), bytearray()

    def keep(piece: bytes | bytearray) -> None:
        errors.extend(piece)
        del errors[:-_ERROR_MAX]

    def hear(piece: bytes | bytearray) -> None:
        words.extend(piece)
        del words[:-_ERROR_MAX]
        if said is not None:
            said(piece)

    async with _process(command) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        async with flat_nursery() as nursery:
            nursery.start_soon(_read, process.stdout, hear)
            nursery.start_soon(_read, process.stderr, keep)
        status = await process.wait()
    text = _last_line(errors) or _last_line(words) or f"status {status}"
    return status, text


def _last_line(said: bytearray) -> str:
    """The last line that is no progress, without characters that a terminal would act on."""
    lines = said.decode("utf-8", "replace").replace("\r", "\n").splitlines()
    found = [line for line in map(str.strip, lines) if line and not line.endswith("/100%)")]
    return "".join(c if c.isprintable() else " " for c in found[-1]) if found else ""


@asynccontextmanager
async def _process(command: list[str]) -> AsyncIterator[trio.Process]:
    """A process that is not there any more when the block ends."""
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                await trio.aclose_forcefully(stream)


async def _read(stream: trio.abc.ReceiveStream, take: Callable[[bytes | bytearray], None]) -> None:
    async for piece in stream:
        take(piece)


__all__ = [
    "FORMATS",
    "Format",
    "check_size",
    "compare",
    "convert",
    "find_qemu_img",
    "guarded",
    "run",
    "to_raw",
]
