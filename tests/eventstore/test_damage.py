# SPDX-License-Identifier: AGPL-3.0-or-later
"""Data files that were damaged or cut short: an error of the library's, never a crash, never a
wrong event.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
from eventsourcing.persistence import InternalError

from eventstore import LMDBApplicationRecorder, LMDBEnvironment, datafile
from tests.eventstore.damage_child import COUNT, PAGE_BYTES, build
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    build(os.fspath(folder / "whole"))
    return folder


def test_a_flipped_bit_anywhere_is_harmless_or_an_error(whole: Path) -> None:
    first = 0
    seen: list[list[str]] = []
    while True:
        child = subprocess.run(
            [sys.executable, "-m", "tests.eventstore.damage_child", os.fspath(whole), str(first)],
            cwd=ROOT,
            capture_output=True,
            timeout=HANG_S,
            check=False,
        )
        seen += [line.split(maxsplit=3) for line in child.stdout.decode().splitlines()]
        if child.returncode == 0:
            break
        # LMDB itself died of what no check of a record can see. Those are found by `verify`.
        assert child.returncode in {-signal.SIGABRT, -signal.SIGBUS, -signal.SIGSEGV}, child.stderr
        number, position, bit = (int(word) for word in seen.pop()[:3])
        refuses_when_verified(whole / "whole", whole / "crashed", position, bit)
        first = number + 1
        deaths = number - len(seen) + 1
        assert deaths <= 8
    assert [words for words in seen if words[3] == "wrong"] == []
    # One commit less, or an older root: nothing in that state is wrong. The first of the two only a
    # head of the tree that has left this machine can show.
    for words in seen:
        if words[3].startswith("hides"):
            place, flipped = int(words[1]), int(words[2])
            if place % PAGE_BYTES in range(144, 152) and place < 2 * PAGE_BYTES:
                assert words[3] == f"hides: {COUNT - 10} events are left"
            else:
                refuses_when_verified(whole / "whole", whole / "crashed", place, flipped)
    kinds = {words[3] for words in seen}
    assert {"harmless", "error InternalError"} <= kinds
    assert len(seen) > 3000


def refuses_when_verified(whole: Path, copy: Path, position: int, bit: int) -> None:
    data = bytearray((whole / "data.mdb").read_bytes())
    data[position] ^= 1 << bit
    copy.mkdir(exist_ok=True)
    (copy / "data.mdb").write_bytes(data)
    with pytest.raises(InternalError, match="is damaged"):
        LMDBEnvironment.open(copy, verify=True)


def test_a_sound_file_passes_when_verified(whole: Path, tmp_path: Path) -> None:
    with LMDBEnvironment.open(whole / "whole", verify=True) as opened:
        assert LMDBApplicationRecorder(opened, "app").verify() == COUNT
    with LMDBEnvironment.open(tmp_path / "new", verify=True):
        pass


def test_a_file_that_was_cut_short_is_refused_before_it_is_mapped(
    whole: Path, tmp_path: Path
) -> None:
    data = (whole / "whole" / "data.mdb").read_bytes()
    refused = 0
    lengths = (*range(1, len(data), 1777), len(data) - PAGE_BYTES, len(data) - 1)
    for length in lengths:
        (tmp_path / "data.mdb").write_bytes(data[:length])
        try:
            # Only if nothing but free pages was cut off is it read.
            with LMDBEnvironment.open(tmp_path, readonly=True) as opened:
                assert LMDBApplicationRecorder(opened, "app").verify() == COUNT
        except InternalError as error:
            refused += 1
            text = str(error)
            assert f"is cut short: {length} bytes of {len(data)}" in text or length < 2 * PAGE_BYTES
            with pytest.raises(InternalError):
                LMDBEnvironment.open(tmp_path)
        # It was left as it was.
        assert (tmp_path / "data.mdb").read_bytes() == data[:length]
    assert refused > len(lengths) * 0.9


def test_last_pages_that_were_freed_before_they_were_written_are_no_damage(
    whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "whole", tmp_path / "events")
    data = tmp_path / "events" / "data.mdb"
    # As LMDB leaves it when a commit frees the last pages that it took: counted, in the list of
    # free pages, and not in the file.
    with lmdb.Environment(os.fspath(tmp_path / "events"), max_dbs=64, map_size=1 << 21) as opened:
        with opened.begin(write=True) as txn:
            txn.put(b"big", bytes(40 * PAGE_BYTES))
        with opened.begin(write=True) as txn:
            txn.delete(b"big")
        last = opened.info()["last_pgno"]
    os.truncate(data, (last - 5) * PAGE_BYTES)
    with LMDBEnvironment.open(tmp_path / "events") as opened_again:
        recorder = LMDBApplicationRecorder(opened_again, "app", tree=True)
        assert recorder.verify() == COUNT


def test_meta_pages_are_read_again_while_a_writer_changes_them(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.pread
    left = [3]

    def torn(fd: int, length: int, offset: int) -> bytes:
        data = read(fd, length, offset)
        if left[0]:
            left[0] -= 1
            # The transaction of the first page, another one in each read.
            return data[:144] + bytes([left[0] * 4]) + data[145:]
        return data

    monkeypatch.setattr(os, "pread", torn)
    datafile.check_data_file(os.fspath(whole / "whole"))
    assert left == [0]
