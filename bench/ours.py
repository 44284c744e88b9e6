# SPDX-License-Identifier: AGPL-3.0-or-later
"""The product as a contender: a receiver and a source that run, as `replctl receiver` and `replctl run` do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from bench.contender import VM, Contender, Lab, Pair
from bench.images import Image
from bench.meter import Meter, Spent
from bench.peers_qemu import serve_disk
from bench.proc import read_status
from bench.programs import ProgramError, same, sync_file
from bench.site import Site, site
from tests.lab_qemu import StorageDaemon, storage_daemon

_DISK: Final = "disk-0"

Channel = Literal["HMAC", "AEAD", "mTLS"]

#: When the recovery point was durable at the receiver and recorded at the source.
COMMITTED: Final = "point"


@dataclass(slots=True)
class OurPair(Pair):
    """A source and a receiver. ``bytes_pushed``: of the last push."""

    site: Site
    image: Path
    daemon: StorageDaemon | None
    command: bool
    bytes_pushed: int = 0
    peaks: list[int] = field(default_factory=list)

    async def seed(self, meter: Meter) -> None:
        """Until the replica is written; the recovery point is marked."""
        if not self.command:
            await self.cycle(meter)
            return
        pushed = await self.site.push("seed")
        meter.mark(COMMITTED)
        self.bytes_pushed = pushed.bytes_pushed
        await self.site.applied(pushed.point)

    async def check(self) -> None:
        """The replica is plain: it can be compared as any file."""
        replicas = list(self.site.folder.glob(f"receiver/vms/*/replica/{_DISK}.raw"))
        if len(replicas) != 1:
            raise ProgramError(f"{len(replicas)} replicas")
        await same(self.image, replicas[0])

    async def write(self, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
        """Through the daemon, which tracks what changes."""
        assert self.daemon is not None
        for offset, piece in zip(offsets, pieces, strict=True):
            await self.daemon.writer(_DISK).write(offset, piece)
        await sync_file(self.daemon.image(_DISK))

    async def cycle(self, meter: Meter) -> None:
        """From the request on, until the replica is written; the recovery point is marked."""
        began_us = time.time_ns() // 1000
        pushed = await self.site.request()
        # Its processor time is taken a little later, when the source has settled everything.
        spent = meter.mark(COMMITTED)
        wall_s = (pushed.committed_at_us - began_us) / 1e6
        meter.marks[COMMITTED] = Spent(wall_s, spent.cpu_s, spent.machine_s)
        self.bytes_pushed = pushed.bytes_pushed
        await self.site.applied(pushed.point)

    def resident(self, what: Literal["VmHWM", "VmRSS"]) -> tuple[int, int]:
        """Bytes of source and receiver: the peak until now, or now."""
        assert self.site.source is not None
        source, receiver = self.site.source.pid, self.site.receiver.pid
        return read_status(source)[what], read_status(receiver)[what]


class Ours(Contender):
    """``command``: seeds by `replctl seed`, whose start is part of the time, instead of a source that runs.
    ``samples``: cycles read some of what has not changed too, as they do unless verify_sample_mib is 0.
    """

    def __init__(
        self, channel: Channel, compression: str, *, command: bool = False, samples: bool = True
    ) -> None:
        self.channel = channel
        self.compression = compression
        self._command = command
        self._samples = samples
        self.name = f"ours, {channel}, zstd {compression}"
        self.detail = "replctl receiver and a source that runs, over TCP"
        if command:
            self.name += ", command"
            self.detail = "replctl seed from its start on, to a receiver that runs"
        self.name += "" if samples else ", no samples"

    @asynccontextmanager
    async def pair(
        self, lab: Lab, image: Image, *, cycles: bool = False, copy: bool = True
    ) -> AsyncIterator[OurPair]:
        """See ``Contender``. Without ``copy`` cycles write to the image itself."""
        sides = {"dr_compression": self.compression}
        receiver: dict[str, str] = {}
        if self.channel == "mTLS":
            sides |= _certificate(lab, "source")
            receiver |= _certificate(lab, "receiver")
        else:
            receiver["dr_cipher"] = "none" if self.channel == "HMAC" else "aes-256-gcm"
            sides |= receiver
        with tempfile.TemporaryDirectory(dir=lab.folder) as name:
            async with AsyncExitStack() as stack:
                daemon, source = None, image.path
                if cycles:
                    daemon = await stack.enter_async_context(storage_daemon({}))
                    await serve_disk(daemon, image, copy=copy)
                    source = daemon.image(_DISK)
                options = {**sides, **_options(daemon, source)}
                if not self._samples:
                    options["verify_sample_mib"] = "0"
                folder = Path(name) / "site"
                both = await stack.enter_async_context(site(folder, options, receiver))
                if not self._command:
                    await stack.enter_async_context(both.running())
                yield OurPair(both, source, daemon, self._command)


def _options(daemon: StorageDaemon | None, image: Path) -> Mapping[str, str]:
    if daemon is None:
        return {"source": "image", "image_disks": f"{_DISK}={image}"}
    return {
        "source": "qemu",
        "qemu_socket": str(daemon.qmp_socket),
        "qemu_nbd_socket": str(daemon.nbd_socket),
    }


def _certificate(lab: Lab, name: str) -> dict[str, str]:
    return {
        "dr_auth_cert": str(lab.certificates / f"{name}.pem"),
        "dr_auth_key": str(lab.certificates / f"{name}.key"),
        "dr_ca_cert": str(lab.certificates / "ca.pem"),
    }


__all__ = ["COMMITTED", "VM", "Channel", "OurPair", "Ours"]
