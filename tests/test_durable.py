# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every change of a file announces itself before it happens, and does all of what it says."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from replicator import durable
from replicator.durable import DurableFile

Steps = list[tuple[str, str]]


class Killed(BaseException):
    """What a crash test raises in place of the process's death."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    seen: Steps = []
    monkeypatch.setattr(durable, "observe", lambda step, path: seen.append((step, Path(path).name)))
    return seen


def kill(step: str, path: str) -> None:
    raise Killed(step, path)


def test_each_step_is_announced_with_its_path(tmp_path: Path, steps: Steps) -> None:
    with DurableFile(tmp_path / "a", create=True) as file:
        file.write_at(b"x" * 10, 0)
        file.truncate(5000)
        file.punch(0, 4096)
        file.sync()
    durable.make_dir(tmp_path / "dir")
    durable.rename(tmp_path / "a", tmp_path / "dir" / "b")
    durable.unlink(tmp_path / "dir" / "b")
    durable.remove_dir(tmp_path / "dir")
    root = tmp_path.name
    assert steps == [
        ("create", "a"),
        ("write", "a"),
        ("truncate", "a"),
        ("punch", "a"),
        ("fsync", "a"),
        ("mkdir", "dir"),
        ("fsync", root),
        ("rename", "a"),
        ("fsync", "dir"),
        ("fsync", root),
        ("unlink", "b"),
        ("rmdir", "dir"),
    ]


@pytest.mark.parametrize(
    ("step", "act"),
    [
        ("create", lambda root, _: DurableFile(root / "new", create=True)),
        ("write", lambda _, file: file.write_at(b"other", 0)),
        ("truncate", lambda _, file: file.truncate(1)),
        ("punch", lambda _, file: file.punch(0, 8192)),
        ("mkdir", lambda root, _: durable.make_dir(root / "new")),
        ("rename", lambda root, _: durable.rename(root / "file", root / "new")),
        ("unlink", lambda root, _: durable.unlink(root / "file")),
        ("rmdir", lambda root, _: durable.remove_dir(root / "empty")),
        ("create", lambda root, _: durable.write_file(root / "new", b"data")),
    ],
)
def test_a_kill_at_a_step_leaves_it_undone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    act: Callable[[Path, DurableFile], None],
) -> None:
    content = os.urandom(8192)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "empty").mkdir()
    with DurableFile(tmp_path / "file") as file:
        monkeypatch.setattr(durable, "observe", kill)
        with pytest.raises(Killed) as caught:
            act(tmp_path, file)
    assert caught.value.args[0] == step
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]
    assert (tmp_path / "file").read_bytes() == content


def test_syncs_are_announced_before_they_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(durable, "observe", lambda step, _: order.append(step))
    monkeypatch.setattr(os, "fdatasync", lambda _: order.append("fdatasync"))
    monkeypatch.setattr(os, "fsync", lambda _: order.append("fsync of the folder"))
    with DurableFile(tmp_path / "file", create=True) as file:
        file.sync()
    durable.sync_dir(tmp_path)
    assert order == ["create", "fsync", "fdatasync", "fsync", "fsync of the folder"]


def test_write_at_goes_on_after_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, view[:3], at))
    with DurableFile(tmp_path / "file", create=True) as file:
        file.write_at(memoryview(b"0123456789"), 2)
        assert file.size == 12
        assert file.read_at(100, 0) == b"\0\x000123456789"


def test_a_write_of_nothing_is_an_error_and_not_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with (
        DurableFile(tmp_path / "file", create=True) as file,
        pytest.raises(OSError, match="nothing was written"),
    ):
        file.write_at(b"x", 0)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_what_cannot_be_written_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Who reads that the disk is full has to know which."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    with DurableFile(path, create=True) as file:
        monkeypatch.setattr(os, call, full)
        act = partial(file.write_at, b"x", 0) if call == "pwrite" else file.sync
        with pytest.raises(OSError, match="No space left on device") as caught:
            act()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)


def test_read_at_goes_on_after_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: real(fd, min(length, 3), at))
    with DurableFile(tmp_path / "file") as file:
        assert file.read_at(7, 1) == b"1234567"
        assert file.read_at(7, 8) == b"89"
        assert file.read_at(7, 10) == b""


def test_write_at_counts_bytes_whatever_the_item_size(tmp_path: Path) -> None:
    with DurableFile(tmp_path / "file", create=True) as file:
        file.write_at(memoryview(bytes(range(16))).cast("Q"), 0)
        assert file.read_at(16, 0) == bytes(range(16))


def test_punch_gives_the_space_back_and_keeps_the_rest(tmp_path: Path) -> None:
    megabyte = 1 << 20
    with DurableFile(tmp_path / "file", create=True) as file:
        file.write_at(b"\xff" * 3 * megabyte, 0)
        file.sync()
        before = os.fstat(file.fd).st_blocks
        file.punch(megabyte, megabyte)
        assert os.fstat(file.fd).st_blocks <= before - megabyte // 512 // 2
        assert not file.has_data(megabyte, megabyte)
        assert file.has_data(megabyte, megabyte + 1)
        assert not file.has_data(4 * megabyte, 1)
        file.punch(10 * megabyte, megabyte)
        assert file.size == 3 * megabyte
    assert (tmp_path / "file").read_bytes() == (
        b"\xff" * megabyte + bytes(megabyte) + b"\xff" * megabyte
    )


def test_punch_writes_zeros_where_there_are_no_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_punch_hole", lambda *_: False)
    length = (3 << 20) + 5
    with DurableFile(tmp_path / "file", create=True) as file:
        file.write_at(b"\xff" * length, 0)
        file.punch(1, 2 << 20)
        # Not beyond the end: the size stays, as it does with a hole.
        file.punch(length - 1, 100)
    expected = b"\xff" + bytes(2 << 20) + b"\xff" * ((1 << 20) + 3) + b"\0"
    assert (tmp_path / "file").read_bytes() == expected


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([errno.EOPNOTSUPP], False), ([errno.ENOSYS], False), ([errno.EINTR, 0], True)],
)
def test_punch_hole_reads_the_kernel_s_answer(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], expected: bool
) -> None:
    answers = iter(codes)
    code = 0

    class Libc:
        @staticmethod
        def fallocate(*_: int) -> int:
            nonlocal code
            code = next(answers)
            return -1 if code else 0

    monkeypatch.setattr(durable, "_libc", Libc)
    monkeypatch.setattr("ctypes.get_errno", lambda: code)
    assert durable._punch_hole(3, 0, 1) is expected


def test_punch_names_the_file_in_its_error(tmp_path: Path) -> None:
    with DurableFile(tmp_path / "file", create=True) as file:
        os.close(file.fd)
        file.fd = os.open(tmp_path / "file", os.O_RDONLY)
        with pytest.raises(OSError, match="file") as caught:
            file.punch(0, 4096)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(ValueError, match="punch of 0 bytes"):
            file.punch(0, 0)


def test_exclusive_creation_never_opens_what_is_there(tmp_path: Path) -> None:
    with DurableFile(tmp_path / "file", create=True, exclusive=True):
        pass
    with pytest.raises(FileExistsError):
        DurableFile(tmp_path / "file", create=True, exclusive=True)
    with pytest.raises(FileNotFoundError):
        DurableFile(tmp_path / "absent")
    with pytest.raises(ValueError, match="exclusive"):
        DurableFile(tmp_path / "file", exclusive=True)


def test_files_and_folders_are_private(tmp_path: Path) -> None:
    durable.make_dir(tmp_path / "dir")
    durable.write_file(tmp_path / "dir" / "file", b"x")
    assert (tmp_path / "dir").stat().st_mode & 0o077 == 0
    assert (tmp_path / "dir" / "file").stat().st_mode & 0o077 == 0


def test_closing_twice_does_nothing(tmp_path: Path) -> None:
    file = DurableFile(tmp_path / "file", create=True)
    file.close()
    file.close()
    with pytest.raises(OSError, match="descriptor"):
        file.write_at(b"x", 0)
    with pytest.raises(OSError, match="descriptor"):
        file.has_data(0, 1)


def test_make_dir_syncs_again_what_a_crash_may_have_left_unsynced(
    tmp_path: Path, steps: Steps
) -> None:
    (tmp_path / "dir").mkdir()
    durable.make_dir(tmp_path / "dir")
    assert steps == [("fsync", tmp_path.name)]


def test_make_dir_leaves_a_parent_alone_that_it_may_not_write(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dir").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    durable.make_dir(tmp_path / "dir")
    assert steps == []


def test_make_dir_is_content_where_another_thread_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dir"

    def observe(what: str, _: str) -> None:
        if what == "mkdir":
            path.mkdir()

    monkeypatch.setattr(durable, "observe", observe)
    durable.make_dir(path)
    assert path.is_dir()


def test_make_dir_does_not_take_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "dir").write_bytes(b"")
    with pytest.raises(FileExistsError):
        durable.make_dir(tmp_path / "dir")


def test_removing_what_is_not_there_is_done_already(tmp_path: Path) -> None:
    durable.unlink(tmp_path / "absent")
    durable.remove_dir(tmp_path / "absent")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_bytes(b"")
    with pytest.raises(OSError, match="not empty"):
        durable.remove_dir(tmp_path / "dir")


def test_write_file_is_old_or_new_at_every_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old content")
    last = 0
    for last in range(1, 50):
        left = last

        def count_down(step: str, where: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed(step, where)

        monkeypatch.setattr(durable, "observe", count_down)
        try:
            durable.write_file(path, b"new")
        except Killed:
            assert path.read_bytes() in (b"old content", b"new")
            assert set(os.listdir(tmp_path)) <= {"file", "file.new"}
        else:
            break
    # create, truncate, write, fsync, rename, fsync of the folder, and then no seventh step.
    assert last == 7
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
