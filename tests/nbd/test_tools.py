# SPDX-License-Identifier: AGPL-3.0-or-later
"""The programs that will read from our server, and the servers that our client will read from."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from replicator.disk import Extent
from replicator.nbd.client import open_nbd
from replicator.nbd.protocol import BASE_ALLOCATION, STATE_ZERO, NbdError
from tests.lab_qemu import require
from tests.limits import HANG_S
from tests.nbd.views import MemoryView, served

MIB = 1 << 20
CONTENT = random.Random(2).randbytes(MIB) + bytes(2 * MIB) + random.Random(3).randbytes(MIB)
EXTENTS = [Extent(0, MIB), Extent(3 * MIB, MIB)]


async def run(*command: str) -> str:
    done = await trio.run_process(
        [require(command[0]), *command[1:]], check=False, capture_stdout=True, capture_stderr=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


async def test_qemu_and_libnbd_read_from_our_server(tmp_path: Path) -> None:
    raw, copy = tmp_path / "raw", tmp_path / "copy"
    raw.write_bytes(CONTENT)
    async with served({"d": MemoryView(CONTENT, EXTENTS), "e": MemoryView(b"e")}) as server:
        uri = server.uri("d")
        info = json.loads(await run("qemu-img", "info", "--output=json", uri))
        assert info["virtual-size"] == len(CONTENT)
        assert "identical" in await run(
            "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(raw)
        )
        await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(copy))
        assert "identical" in await run("qemu-img", "compare", str(copy), str(raw))
        await run("nbdcopy", uri, str(copy))
        assert copy.read_bytes() == CONTENT
        exports = json.loads(await run("nbdinfo", "--list", "--json", uri))["exports"]
        assert [export["export-name"] for export in exports] == ["d", "e"]
        mapped = json.loads(await run("nbdinfo", "--map", "--json", uri))
        found = [(e["offset"], e["length"], e["type"]) for e in mapped]
        assert found == [(0, MIB, 0), (MIB, 2 * MIB, 3), (3 * MIB, MIB, 0)]
        assert server.errors == []


async def test_an_overlay_on_our_server_takes_writes(tmp_path: Path) -> None:
    overlay, raw = str(tmp_path / "overlay.qcow2"), tmp_path / "raw"
    changed = bytearray(CONTENT)
    changed[MIB + 4096 : MIB + 8192] = b"\x07" * 4096
    raw.write_bytes(changed)
    async with served({"d": MemoryView(CONTENT, EXTENTS)}) as server:
        uri = server.uri("d")
        await run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", uri, overlay)
        await run("qemu-io", "-c", f"write -P 7 {MIB + 4096} 4096", overlay)
        assert "identical" in await run("qemu-img", "compare", overlay, str(raw))


@asynccontextmanager
async def listening(*command: str, path: Path) -> AsyncIterator[None]:
    """A server program, from the moment that its socket answers."""
    process = subprocess.Popen([require(command[0]), *command[1:]])  # noqa: ASYNC220
    try:
        with trio.fail_after(HANG_S):
            while True:
                assert process.poll() is None, f"{command[0]} ended at its start"
                try:
                    await (await trio.open_unix_socket(path)).aclose()
                except OSError:
                    await trio.sleep(0.005)
                else:
                    break
        yield
    finally:
        process.kill()
        process.wait()


async def test_our_client_writes_to_qemu_nbd() -> None:
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as folder:
        path, image = Path(folder) / "s", Path(folder) / "image"
        image.write_bytes(bytes(4 * MIB))
        server = ["qemu-nbd", "-f", "raw", "-k", str(path), "-x", "d", "-t", "-e", "4"]
        async with (
            listening(*server, "--discard=unmap", str(image), path=path),
            open_nbd(path, "d", contexts=[BASE_ALLOCATION]) as client,
        ):
            assert not client.read_only
            async with trio.open_nursery() as nursery:
                for index in range(32):
                    data = bytes([index + 1]) * 65536
                    nursery.start_soon(client.write, index * 65536, data)
            await client.zero(65536, 65536)
            await client.trim(2 * 65536, 65536)
            await client.write(3 * 65536 + 7, b"odd", fua=True)
            await client.flush()
            assert await client.read(3 * 65536 + 6, 5) == b"\x04odd\x04"
            held = await client.read(0, client.size)
            statuses = await client.block_status(0, client.size, BASE_ALLOCATION)
            assert any(s.flags & STATE_ZERO and s.offset <= 65536 for s in statuses)
        expected = bytearray(b"".join(bytes([i + 1]) * 65536 for i in range(32)) + bytes(2 * MIB))
        expected[65536 : 3 * 65536] = bytes(2 * 65536)
        expected[3 * 65536 + 7 : 3 * 65536 + 10] = b"odd"
        assert held == expected == image.read_bytes()


async def test_a_medium_error_from_nbdkit_names_the_range() -> None:
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as folder:
        path, trigger = Path(folder) / "s", Path(folder) / "trigger"
        error = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
        server = ["nbdkit", "-f", "-U", str(path), "--filter=error", "memory", "1M", *error]
        async with listening(*server, path=path), open_nbd(path, "") as client:
            assert await client.read(0, 512) == bytes(512)
            trigger.touch()
            with pytest.raises(NbdError, match="READ of 512 bytes at 1024: EIO"):
                await client.read(1024, 512)
            trigger.unlink()
            assert await client.read(1024, 512) == bytes(512)


async def test_blocks_larger_than_a_byte_are_read_around() -> None:
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp") as folder:
        path = Path(folder) / "s"
        sizes = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K"]
        options = [
            "--filter=blocksize-policy",
            "pattern",
            "1M",
            *sizes,
            "blocksize-error-policy=error",
        ]
        async with (
            listening("nbdkit", "-f", "-U", str(path), *options, path=path),
            open_nbd(path, "") as client,
        ):
            # nbdkit's pattern: each 8 bytes hold their own offset.
            expected = b"".join(at.to_bytes(8, "big") for at in range(0, MIB, 8))
            assert await client.read(0, MIB) == expected
            for offset, length in ((1, 1), (4095, 2), (65535, 70_000), (MIB - 1, 1)):
                assert await client.read(offset, length) == expected[offset : offset + length]
