# SPDX-License-Identifier: AGPL-3.0-or-later
"""What every contender of the transport benchmark is: something that takes a disk's content to another place."""

from __future__ import annotations

import secrets
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from bench.images import Image
from bench.meter import Meter

#: The VM, and the user of TLS-PSK.
VM = "bench"


@dataclass(frozen=True, slots=True)
class Lab:
    """What contenders share: where they work, and what they prove themselves with.

    ``certificates``: ca.pem, and NAME.pem, NAME.key, NAME.both (both in one) of source and receiver, each for its own
    name and 127.0.0.1, the source's for the VM ``bench`` too. ``psk``: keys.psk, as GnuTLS has it, of the user ``bench``.
    """

    folder: Path
    certificates: Path
    psk: Path


def make_lab(folder: Path) -> Lab:
    """A lab in an empty folder."""
    lab = Lab(folder, folder / "certificates", folder / "psk")
    for each in (lab.certificates, lab.psk):
        each.mkdir(mode=0o700)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(lab.certificates / "ca.pem"))
    for name, names in (("source", ("source", VM)), ("receiver", ("receiver",))):
        own = authority.issue_cert(*names, "127.0.0.1", common_name=name)
        chain = b"".join(blob.bytes() for blob in own.cert_chain_pems)
        key = own.private_key_pem.bytes()
        for suffix, content in (("pem", chain), ("key", key), ("both", key + chain)):
            _write_private(lab.certificates / f"{name}.{suffix}", content)
    _write_private(lab.psk / "keys.psk", f"{VM}:{secrets.token_hex(32)}\n".encode())
    return lab


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


class Pair(ABC):
    """A source and a target that have been set up, with daemons that run. Used by one task."""

    async def arm(self) -> None:  # noqa: B027 - most have nothing to do
        """What has to be repeated before each seed or cycle so that the other side waits for it; no part of its time."""

    @abstractmethod
    async def seed(self, meter: Meter) -> None:
        """Take the whole image over; returns when it is durable. Steps on the way are marked on ``meter``."""

    @abstractmethod
    async def check(self) -> None:
        """Raise ProgramError unless the target holds what the source does."""

    async def write(self, offsets: Sequence[int], pieces: Sequence[bytes]) -> None:
        """Change the source's disk, durable."""
        raise NotImplementedError

    async def warm(self) -> None:  # noqa: B027 - most read what has changed, which was written just now
        """Have in the page cache what the next cycle will read."""

    async def cycle(self, meter: Meter) -> None:
        """Take over what changed since the seed or the last cycle; returns when it is durable."""
        raise NotImplementedError

    async def settle(self) -> None:  # noqa: B027 - most have nothing to do
        """What is left to do after a cycle and is no part of its time."""


class Contender(ABC):
    """One way to do it. ``detail``: how it was run, for the reader."""

    name: str
    detail: str

    @asynccontextmanager
    async def prepared(self, lab: Lab, image: Image) -> AsyncIterator[None]:
        """What is kept for all pairs of one image."""
        del lab, image
        yield

    @abstractmethod
    def pair(
        self, lab: Lab, image: Image, *, cycles: bool = False
    ) -> AbstractAsyncContextManager[Pair]:
        """A pair in a folder of its own, gone at the end. ``cycles``: the source's disk is a copy that may be written to."""


def free_port() -> int:
    """A TCP port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ["VM", "Contender", "Lab", "Pair", "free_port", "make_lab"]
