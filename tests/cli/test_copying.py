# SPDX-License-Identifier: AGPL-3.0-or-later
"""An exported disk is the whole disk, sparse, or it is not there."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from receiver.export.nbd_server import serve_nbd
from replicator import durable
from replicator.cli.copying import check_target, copy_disk, partial_path
from replicator.cli.receiving import disk_name
from replicator.disk import DiskView, Extent
from replicator.errors import RefusedError, ReplicatorError, UsageError, WireError
from tests.cli.conftest import KEY, Replctl, write_config
from tests.cli.fake_receiver import CHUNKED, chunk, fake_receiver

SIZE = (6 << 20) + 512
DATA = {0: b"begin", (1 << 20) - 3: b"across", SIZE - 4: b"end."}


class View:
    """A disk with data in three places; reads are counted, and one may fail."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.content = bytearray(SIZE)
        for offset, data in DATA.items():
            self.content[offset : offset + len(data)] = data
        self.fails_at = fails_at
        self.read_bytes = 0

    @property
    def size(self) -> int:
        return SIZE

    async def extents(self, since: str | None = None) -> AsyncGenerator[Extent, None]:
        assert since is None
        yield Extent(0, 3 << 20)
        yield Extent(6 << 20, 512)

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.fails_at is not None and offset <= self.fails_at < offset + length:
            raise ReplicatorError("damaged here")
        self.read_bytes += length
        return bytes(self.content[offset : offset + length])


@asynccontextmanager
async def served(path: Path, view: DiskView) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_nbd, path, {"disk-0": view})
        yield
        nursery.cancel_scope.cancel()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def nothing(_: int) -> None:
    return


async def test_the_copy_is_the_disk_and_holes_stay_holes(tmp_path: Path) -> None:
    view, target = View(), tmp_path / "out.raw"
    told: list[int] = []
    async with served(tmp_path / "n.sock", view):
        read = await copy_disk(
            tmp_path / "n.sock", "disk-0", SIZE, target, force=False, report=told.append
        )
    assert target.read_bytes() == view.content
    # What the disk says is a hole is not read; what reads as zeros is not written.
    assert read == view.read_bytes == (3 << 20) + 512
    assert target.stat().st_blocks * 512 < 3 << 20
    assert told[-1] == SIZE
    assert not partial_path(target).exists()


async def test_a_disk_of_another_size_than_was_said_is_not_taken(tmp_path: Path) -> None:
    async with served(tmp_path / "n.sock", View()):
        with pytest.raises(WireError, match=f"said 512 bytes and serves {SIZE}"):
            await copy_disk(
                tmp_path / "n.sock", "disk-0", 512, tmp_path / "o", force=False, report=nothing
            )
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["create", "truncate", "write", "fsync", "rename"])
async def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(at: str, path: str) -> None:
        if at == step and "out.raw" in path:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "observe", full)
    async with served(tmp_path / "n.sock", View()):
        with pytest.raises(
            ReplicatorError, match=r"^cannot write .*out\.raw.*: No space left on device$"
        ):
            await copy_disk(
                tmp_path / "n.sock",
                "disk-0",
                SIZE,
                tmp_path / "out.raw",
                force=False,
                report=nothing,
            )
    assert names(tmp_path) == []


async def test_a_read_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with served(tmp_path / "n.sock", View(fails_at=(1 << 20) + 7)):
        with pytest.raises(ReplicatorError):
            await copy_disk(
                tmp_path / "n.sock", "disk-0", SIZE, tmp_path / "o", force=False, report=nothing
            )
    assert names(tmp_path) == []


async def test_a_cancelled_copy_leaves_nothing(tmp_path: Path) -> None:
    async with served(tmp_path / "n.sock", View()):
        with trio.CancelScope() as scope:
            await copy_disk(
                tmp_path / "n.sock",
                "disk-0",
                SIZE,
                tmp_path / "o",
                force=False,
                report=lambda _: scope.cancel(),
            )
        assert scope.cancelled_caught
    assert names(tmp_path) == []


def test_what_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    check_target(target, force=False)
    partial_path(target).write_text("")
    with pytest.raises(UsageError, match="left of an export, or one is running"):
        check_target(target, force=False)
    target.write_text("mine")
    with pytest.raises(UsageError, match="it exists; --force replaces it"):
        check_target(target, force=False)
    check_target(target, force=True)
    assert target.read_text() == "mine"
    with pytest.raises(UsageError, match="is not a directory"):
        check_target(target / "x", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_only_a_regular_file_is_ever_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    partial_path(tmp_path / "new").symlink_to("file")
    before = sorted(names(tmp_path))
    cases = {
        "link": "link is a symbolic link",
        "dangling": "dangling is a symbolic link",
        "pipe": "pipe is a pipe",
        "folder": "folder is a directory",
        "new": "new.partial is a symbolic link",
    }
    for name, reason in cases.items():
        with pytest.raises(UsageError, match=f"{reason}; only a regular file can be replaced"):
            check_target(tmp_path / name, force=force)
    with pytest.raises(UsageError, match="/dev/null is a device or a socket; only"):
        check_target(Path("/dev/null"), force=force)
    assert sorted(names(tmp_path)) == before


@pytest.mark.parametrize("text", ["0", "disk-0", "disk-00"])
def test_a_disk_is_named_in_full_or_by_number(text: str) -> None:
    assert disk_name(text) == "disk-0"


@pytest.mark.parametrize(
    "text", ["", "a", "disk-", "disk-0/..", "-1", "12345", "\N{ARABIC-INDIC DIGIT ONE}"]
)
def test_what_names_no_disk(text: str) -> None:
    with pytest.raises(UsageError, match="--disk"):
        disk_name(text)


async def test_the_command_exports_while_its_request_is_open(
    tmp_path: Path, replctl: Replctl
) -> None:
    values = {"dr_auth_token": KEY, "control_socket": tmp_path / "c.sock", "state_dir": tmp_path}
    config = write_config(tmp_path / "replicator.conf", values)
    (tmp_path / "out.raw").write_text("old")
    line = b'{"export": {"socket": "%s", "name": "disk-0", "size": %d, "point": 4, "root": "ab"}}\n'

    async def export(stream: trio.SocketStream) -> None:
        """The export is there until the client hangs up, and no longer."""
        async with served(tmp_path / "n.sock", View()):
            await stream.send_all(CHUNKED + chunk(line % (bytes(tmp_path / "n.sock"), SIZE)))
            assert await stream.receive_some(1) == b""

    words = ("export", "web", "--point", "4", "--disk", "0", "--to", tmp_path / "out.raw")
    async with fake_receiver(tmp_path / "c.sock", export) as fake:
        refused = await trio.to_thread.run_sync(lambda: replctl("--config", config, *words))
        assert (refused.code, fake.requests) == (2, [])
        done = await trio.to_thread.run_sync(
            lambda: replctl("--json", "--config", config, *words, "--force")
        )
    assert done.json == {
        "vm": "web",
        "point": 4,
        "disk": "disk-0",
        "file": str(tmp_path / "out.raw"),
        "size": SIZE,
        "bytes_read": (3 << 20) + 512,
        "root": "ab",
    }
    assert (tmp_path / "out.raw").read_bytes() == View().content
    assert fake.requests == [("POST", "/v1/vms/web/export", {"point": 4, "disk": "disk-0"})]


async def test_a_second_copy_to_the_same_file_is_refused_even_by_force(tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    refused: list[RefusedError] = []

    async def second() -> None:
        try:
            await copy_disk(tmp_path / "n.sock", "disk-0", SIZE, target, force=True, report=nothing)
        except RefusedError as error:
            refused.append(error)

    async with served(tmp_path / "n.sock", View()), trio.open_nursery() as nursery:

        def start_second(_: int) -> None:
            if not refused and not nursery.child_tasks:
                nursery.start_soon(second)

        await copy_disk(
            tmp_path / "n.sock", "disk-0", SIZE, target, force=False, report=start_second
        )
        while not refused:
            await trio.lowlevel.checkpoint()
    assert "another export is writing" in str(refused[0])
    assert target.read_bytes() == View().content
    # One that is over, however it ended, is in nobody's way.
    partial_path(target).write_bytes(b"left over")
    async with served(tmp_path / "n.sock", View()):
        await copy_disk(tmp_path / "n.sock", "disk-0", SIZE, target, force=True, report=nothing)
    assert names(tmp_path) == ["out.raw"]
