# SPDX-License-Identifier: AGPL-3.0-or-later
"""The limit of a seed on this machine: what each step of it costs by itself, one thread, nothing in between.

No program that takes these steps can take less processor time; with all processors busy all the time it takes the sum
of the costs divided by their number.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash
import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from bench.images import BLOCK, MIB, Image

_ZEROS: Final = bytes(MIB)
_KEY: Final = bytes(range(32))
#: The two ways to write: steps of the first, and the second.
CACHED: Final = ("write", "fsync")
DIRECT: Final = "write past the cache"
_SECTOR: Final = 4096
#: Sent at once in the loopback's measurement: what its buffers hold.
_PIECE: Final = 128 << 10


@dataclass(slots=True)
class Model:
    """``cpu_s``: processor seconds of each step, for a whole image, in their order. It is written twice, through the page
    cache and past it; the dearer way is none of the sum. ``direct_wall_s``: of the second way, one write after the other.
    """

    cpu_s: dict[str, float] = field(default_factory=dict)
    direct_wall_s: float = 0

    @property
    def sum_s(self) -> float:
        """Processor seconds of all steps."""
        cached = sum(self.cpu_s.get(step, 0) for step in CACHED)
        return sum(self.cpu_s.values()) - max(cached, self.cpu_s.get(DIRECT, 0))

    @property
    def limit_s(self) -> float:
        """The least time that all of them take on all processors."""
        return self.sum_s / (os.cpu_count() or 1)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count what the block takes."""
        started = time.thread_time()
        yield
        self.cpu_s[name] = self.cpu_s.get(name, 0) + time.thread_time() - started


def measure(image: Image, target: Path, level: int | None) -> Model:
    """Take an image through all steps, chunk by chunk; ``level``: of zstd, None: without. Blocks."""
    model = Model()
    steps = _Steps(model, level)
    direct = os.open(
        target.with_suffix(".direct"), os.O_CREAT | os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, 0o600
    )
    with image.path.open("rb", buffering=0) as source, target.open("wb", buffering=0) as sink:
        for offset, length in _data(source.fileno(), image.size):
            steps.take(source.fileno(), offset, length, sink.fileno(), direct)
        with model.step("fsync"):
            os.fsync(sink.fileno())
        with model.step(DIRECT):
            os.fsync(direct)
    os.close(direct)
    target.unlink()
    target.with_suffix(".direct").unlink()
    steps.close()
    return model


def _data(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the file holds data, in chunks of 1 MiB at most."""
    offset = 0
    while offset < size:
        try:
            begin = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError:  # no data any more
            return
        offset = os.lseek(fd, begin, os.SEEK_HOLE)
        for start in range(begin, offset, MIB):
            yield start, min(MIB, offset - start)


class _Steps:
    """One chunk after the other; all buffers are used again, as a program should."""

    def __init__(self, model: Model, level: int | None) -> None:
        self._model = model
        self._zstd = None if level is None else zstandard.ZstdCompressor(level=level)
        self._unzstd = zstandard.ZstdDecompressor()
        self._plain = bytearray(MIB)
        self._sealed, self._received = bytearray(2 * MIB), bytearray(2 * MIB)
        self._opened = mmap.mmap(-1, 2 * MIB)  # as direct writes need it, on a page's border
        self._cipher = algorithms.AES256(_KEY)
        self._number = 0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._out = socket.create_connection(listener.getsockname())
            self._in = listener.accept()[0]
        self._out.setblocking(False)

    def close(self) -> None:
        """Hang up."""
        self._out.close()
        self._in.close()

    def take(self, fd: int, offset: int, length: int, sink: int, direct: int) -> None:
        """One chunk, from the source to both ways of writing."""
        step, plain = self._model.step, memoryview(self._plain)[:length]
        with step("read"):
            os.preadv(fd, [plain], offset)
        with step("zero test"):
            kept = self._not_zero(length)
        if not kept:
            return
        with step("digest"):
            for begin, end in kept:
                _digest(plain[begin:end])
        packed = list[bytes]()
        if self._zstd is not None:
            with step("zstd"):
                packed = [self._zstd.compress(plain[begin:end]) for begin, end in kept]
        whole = len(kept) == 1 and not packed
        payload = plain[slice(*kept[0])] if whole else b"".join(packed or self._pieces(kept))
        self._number += 1
        nonce = self._number.to_bytes(12, "big")
        size = len(payload)
        with step("seal"):
            encryptor = Cipher(self._cipher, modes.GCM(nonce)).encryptor()
            encryptor.update_into(payload, self._sealed)
            encryptor.finalize()
        with step("send and receive"):
            self._loop(size)
        with step("open"):
            decryptor = Cipher(self._cipher, modes.GCM(nonce)).decryptor()
            decryptor.update_into(memoryview(self._received)[:size], memoryview(self._opened))
            decryptor.finalize_with_tag(encryptor.tag)
        if packed:
            with step("zstd -d"):
                for each in packed:
                    self._unzstd.decompress(each)
        with step("digest again"):
            for begin, end in kept:
                _digest(plain[begin:end])
        with step("write"):
            os.write(sink, memoryview(self._opened)[:size])
        started = time.perf_counter()
        with step(DIRECT):
            os.write(direct, memoryview(self._opened)[: -(-size // _SECTOR) * _SECTOR])
        self._model.direct_wall_s += time.perf_counter() - started

    def _not_zero(self, length: int) -> list[tuple[int, int]]:
        """The ranges of the chunk that are not zeros, in whole blocks."""
        if self._plain == _ZEROS if length == MIB else self._plain.startswith(_ZEROS[:length]):
            return []
        zeros, found = _ZEROS[:BLOCK], list[tuple[int, int]]()
        for begin in range(0, length, BLOCK):
            end = min(begin + BLOCK, length)
            if self._plain.startswith(zeros[: end - begin], begin):
                continue
            if found and found[-1][1] == begin:
                found[-1] = (found[-1][0], end)
            else:
                found.append((begin, end))
        return found

    def _pieces(self, kept: list[tuple[int, int]]) -> list[memoryview]:
        return [memoryview(self._plain)[begin:end] for begin, end in kept]

    def _loop(self, size: int) -> None:
        sealed, received = memoryview(self._sealed), memoryview(self._received)
        sent = got = 0
        while got < size:
            if sent < size:
                with suppress(BlockingIOError):
                    sent += self._out.send(sealed[sent : min(sent + _PIECE, size)])
            while got < sent:
                got += self._in.recv_into(received[got:sent])


def _digest(piece: memoryview) -> None:
    for begin in range(0, len(piece), BLOCK):
        xxhash.xxh3_128_digest(piece[begin : begin + BLOCK])


__all__ = ["DIRECT", "Model", "measure"]
