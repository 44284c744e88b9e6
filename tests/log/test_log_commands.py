# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl log` and `replctl projections`: what they print, what they refuse, and what they leave alone."""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import trio

from eventstore.checkpoint import CheckpointKey
from eventstore.projection_rows import DATABASE, Parked, State, Track, store_state
from eventstore.segments import Segment, read_json_lines
from receiver.failover.clone import CloneManager
from receiver.service.control import ControlApi
from replicator.cli import logbook
from replicator.control.metrics import Live, Metrics
from replicator.control.server import serve_http
from replicator.domain.views import instant
from replicator.domain.vm import event_time_us
from replicator.log import open_log
from replicator.log.heads import load_key
from replicator.state_dir import open_state_dir
from tests.cli.conftest import KEY, Done, Replctl, source_values, write_config
from tests.limits import HANG_S
from tests.log.support import (
    WEB,
    Calendar,
    check_log,
    copy_log,
    events_by_vm,
    live,
    live_rows,
    opened,
    rebuilt,
    take_away,
    three_months,
)
from tests.sites import ReceiverSite, SourceSite, receiver_site, source_site

FIRST, SECOND = "000001-2026-01.segment", "000002-2026-02.segment"
EVENTS, OPEN_FIRST = 42, 22


def complaints(done: Done) -> list[str]:
    """What was said beside the answer, but for what the log tells of its work."""
    return [line for line in done.err.splitlines() if " INFO " not in line]


class Source:
    """`replctl` on a host with such a log."""

    def __init__(self, made: Path, folder: Path, replctl: Replctl) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.log = self.state / "events"
        self._replctl = replctl
        self.config = write_config(folder / "replicator.conf", source_values(folder))
        self.state.mkdir(mode=0o700)
        copy_log(made, self.log)

    def __call__(self, *words: str | Path | int) -> Done:
        return self._replctl("--config", self.config, *map(str, words))

    def json(self, *words: str | Path | int) -> Any:
        done = self._replctl("--config", self.config, "--json", *map(str, words))
        assert (done.code, complaints(done)) == (0, [])
        return done.json

    def fails(self, code: int, said: str, *words: str | Path | int) -> None:
        """One line, and with --json an object as well."""
        done = self(*words)
        assert (done.code, done.out) == (code, ""), done
        assert done.err.count("\n") == 1
        assert said in done.err, done.err
        done = self._replctl("--config", self.config, "--json", *map(str, words))
        assert done.code == code
        assert done.json == {"error": done.err[9:-1], "exit_code": code}

    def files(self) -> dict[str, int]:
        """What is there, apart from what opening a log leaves."""
        return {
            str(path.relative_to(self.folder)): path.stat().st_size
            for path in sorted(self.folder.rglob("*"))
            if path.name not in ("lock.mdb", "lock", "replicator.conf")
        }


@pytest.fixture
def source(made: Path, tmp_path: Path, replctl: Replctl) -> Source:
    return Source(made, tmp_path, replctl)


# verify


def test_verify(source: Source) -> None:
    with opened(source.log) as store:
        root = store.root_at(EVENTS).hex()
    assert source.json("log", "verify") == {
        "events": EVENTS,
        "root": root,
        "segments": [FIRST, SECOND],
        "away": [],
        "read": EVENTS,
        "signed_heads": 0,
    }
    done = source("log", "verify")
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        f"{EVENTS} events are what they were, root {root};"
        " 2 sealed, no head signed by the other side yet\n"
    )
    segment = source.log / "segments" / FIRST
    segment.rename(source.folder / FIRST)
    source.fails(1, f"{FIRST} is missing, and was not moved away", "log", "verify")
    (source.folder / FIRST).rename(segment)
    take_away(segment)
    done = source("log", "verify")
    assert done.code == 0
    assert done.out.endswith(f"{FIRST} is not here: its events were not looked at\n")


def test_verify_of_a_log_that_was_changed(source: Source) -> None:
    path = source.log / "segments" / SECOND
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = f"the log is damaged or was changed: {SECOND}, events 8 to 21: segment at byte"
    source.fails(1, said, "log", "verify")


# prove and check


def proof_file(source: Source, *words: str | int) -> Path:
    done = source("log", "prove", *words)
    assert (done.code, done.err) == (0, "")
    assert source.json("log", "prove", *words).keys() == done.json.keys()
    path = source.folder / "proof.json"
    path.write_text(done.out)
    return path


def test_prove_and_check(source: Source, replctl: Replctl, tmp_path: Path) -> None:
    """A proof is checked on a host without log and configuration."""
    key = str(load_key(source.log).verifier)
    name = key.partition("+")[0]
    for words, shown in (
        (
            (1,),
            f"event 1 is in log {name} of {EVENTS} events: registered, 2026-01-20T00:00:03.000Z",
        ),
        ((EVENTS,), f"event {EVENTS} is in log {name} of {EVENTS} events"),
        (("--since", 7), f"log {name} of {EVENTS} events continues that of 7"),
        (("--since", 7, "--to", 21), f"log {name} of 21 events continues that of 7"),
        (("--since", 0, "--to", 0), f"log {name} of 0 events continues that of 0"),
    ):
        path = proof_file(source, *words)
        none = tmp_path / "none.conf"
        done = replctl("--config", none, "log", "check", path)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(shown)
        assert done.out.endswith(" (by the key in the proof itself)\n")
        told = done.out.removesuffix(" (by the key in the proof itself)\n")
        done = replctl("--json", "--config", none, "log", "check", path, "--key", key)
        assert (done.code, done.json) == (0, {"proven": told})
        other = str(CheckpointKey.generate(name).verifier)
        source.fails(1, "cannot be believed", "log", "check", path, "--key", other)


def test_head(source: Source) -> None:
    """What is kept of it elsewhere shows later that the log only grew."""
    key = str(load_key(source.log).verifier)
    head = source.json("log", "head")
    assert head.keys() == {"key", "size", "head", "peers"}
    assert (head["key"], head["size"], head["peers"]) == (key, EVENTS, [])
    root = base64.b64encode(bytes.fromhex(source.json("log", "verify")["root"])).decode()
    assert head["head"].splitlines()[:3] == [key.partition("+")[0], str(EVENTS), root]
    done = source("log", "head")
    assert done.out == f"key of this log: {key}\n\n{done.out.partition(chr(10) * 2)[2]}"


def test_a_log_that_is_gone_is_not_begun_anew(source: Source) -> None:
    (source.log / "data.mdb").write_bytes(b"")
    source.fails(1, "is gone, but its key or its segments are there", "log", "seal")
    (source.log / "data.mdb").unlink()
    source.fails(1, "is gone, but its key or its segments are there", "log", "accept", "web")
    assert not (source.log / "data.mdb").exists()


def test_usage(source: Source) -> None:
    days = source.json("usage", "web")
    assert days == sorted(days, key=lambda day: day["day"])
    fields = {"day", "seeds", "cycles", "bytes_pushed", "busy_s", "abandoned", "damages", "tests"}
    fields |= {"sampled", "missed"}
    assert all(day.keys() == fields for day in days)
    events = source.json("history", "web", "--since-id", 0)
    for kind, name in (("seed-committed", "seeds"), ("cycle-committed", "cycles")):
        assert sum(day[name] for day in days) == sum(e["kind"] == kind for e in events)
    done = source("usage", "web")
    assert len(done.out.splitlines()) == len(days) + 1
    source.fails(3, "no VM 'nobody' here (known: ", "usage", "nobody")


def test_prove_an_event_by_its_vm(source: Source) -> None:
    with opened(source.log) as store:
        events = check_log(store)
    for vm, own in events_by_vm(events).items():
        for event in (own[0], own[len(own) // 2], own[-1]):
            number = events.index(event) + 1
            by_id = source.json("log", "prove", event.originator_version, "--vm", vm)
            assert by_id["event"] == number
            assert by_id["record"] == source.json("log", "prove", number)["record"]


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (2, "give an EVENT", ()),
        (2, "give an EVENT", (1, "--since", 1)),
        (2, "give an EVENT", ("--vm", "web")),
        (2, "give an EVENT", ("--since", 1, "--vm", "web")),
        (2, "give an EVENT", (1, "--to", 2)),
        (2, "give an EVENT", (1, "--to", 0)),
        (2, "is not in the range", (0,)),
        (2, "is not a valid integer", ("x",)),
        (2, "is not in the range", ("--since", -1)),
        (3, f"the log has no event 43: it ends at {EVENTS}", (43,)),
        (3, "the log has no event 99999999999999999999", ("9" * 20,)),
        (3, "sizes must be in order", ("--since", 43)),
        (3, "sizes must be in order", ("--since", 5, "--to", 4)),
        (3, "sizes must be in order", ("--since", "9" * 30)),
        (3, "no VM 'nobody' here", (1, "--vm", "nobody")),
        (3, "VM web has no event 99", (99, "--vm", "web")),
        (3, "VM web has no event 99999999999999999999", ("9" * 20, "--vm", "web")),
    ],
)
def test_what_cannot_be_proven(
    source: Source, code: int, said: str, words: tuple[str | int, ...]
) -> None:
    source.fails(code, said, "log", "prove", *words)


def test_a_proof_needs_the_key_and_the_segment(source: Source) -> None:
    take_away(source.log / "segments" / FIRST)
    source.fails(3, f"are in {FIRST}, which is not in", "log", "prove", 3)
    (source.log / "log.key").unlink()
    source.fails(1, "log.key: No such file", "log", "prove", 30)
    assert not (source.log / "log.key").exists()


def test_what_is_no_proof(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source.folder / "proof.json"
    for text in (b"", b"\0\xff", b"[" * 100_000, b"{}", b'{"event": 1}'):
        path.write_bytes(text)
        source.fails(2, "this is no proof", "log", "check", path)
    monkeypatch.setattr(logbook, "_PROOF_BYTES_MAX", 100)
    path.write_bytes(b" " * 101)
    source.fails(2, "this is no proof: it is too long", "log", "check", path)
    source.fails(2, "No such file", "log", "check", source.folder / "nothing")


def test_a_proof_that_does_not_hold(source: Source) -> None:
    path = proof_file(source, 30)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"record": whole["record"][:-8]}))
    source.fails(1, "the proof does not hold", "log", "check", path)
    path.write_text(json.dumps(whole))
    source.fails(2, "the log's key cannot be read", "log", "check", path, "--key", "garbage")
    source.fails(2, "the log's key cannot be read", "log", "check", path, "--key", "")


# segments and seal


def test_segments(source: Source) -> None:
    found = source.json("log", "segments")
    assert [(p["number"], p["first"], p["last"], p["state"], p["file"]) for p in found] == [
        (1, 1, 7, "sealed", FIRST),
        (2, 8, 21, "sealed", SECOND),
        (3, OPEN_FIRST, EVENTS, "open", None),
    ]
    assert [p["label"] for p in found] == ["000001-2026-01", "000002-2026-02", "000003-2026-03"]
    sizes = [(source.log / "segments" / name).stat().st_size for name in (FIRST, SECOND)]
    assert [p["bytes"] for p in found] == [*sizes, None]
    assert found[0]["opened_at"].startswith("2026-01-20T00:00:")
    segment = source.log / "segments" / FIRST
    segment.rename(source.folder / FIRST)
    assert source.json("log", "segments")[0]["state"] == "missing"
    (source.folder / FIRST).rename(segment)
    take_away(segment)
    found = source.json("log", "segments")
    assert (found[0]["state"], found[0]["file"], found[0]["bytes"]) == ("away", FIRST, None)
    done = source("log", "segments")
    assert (done.code, done.err) == (0, "")
    head, *lines = [line.split() for line in done.out.splitlines()]
    assert head == ["period", "opened", "events", "state", "size"]
    assert [(line[0], line[2], line[3]) for line in lines] == [
        ("000001-2026-01", "1-7", "away"),
        ("000002-2026-02", "8-21", "sealed"),
        ("000003-2026-03", "22-42", "open"),
    ]


def test_seal_on_a_source(source: Source) -> None:
    """The month of that log is long over: it is closed by the first to open it, and that is said as well."""
    sealed = source.json("log", "seal")
    third = "000003-2026-03.segment"
    assert [(p["file"], p["state"], p["first"], p["last"]) for p in sealed] == [
        (third, "sealed", OPEN_FIRST, EVENTS)
    ]
    with opened(source.log) as store:
        assert live_rows(store) == [43, 44, 45]
        check_log(store)
    assert source.json("log", "seal") == []
    done = source("log", "seal")
    assert (done.code, done.err) == (0, "")
    assert done.out == "nothing to seal: there is no event since the last time\n"


async def test_seal_says_what_it_sealed(source: Source, calendar: Calendar) -> None:
    for _ in range(3):
        calendar.next_month()
    async with open_log(source.log, clock=calendar) as log:
        await log.close_period()
        await log.seal()
        await live(log, WEB, random.Random(1), 2)
    done = await trio.to_thread.run_sync(source, "log", "seal")
    assert (done.code, complaints(done)) == (0, [])
    assert done.out.startswith("000004-2026-04.segment: events 43 to 47, ")
    assert done.out.count("\n") == 1


def test_seal_while_another_uses_the_state_directory(source: Source) -> None:
    before = source.files()
    with open_state_dir(source.state):
        source.fails(3, f"another replctl (pid {os.getpid()}) is using", "log", "seal")
        source.fails(3, "another replctl", "log", "accept", "web")
        # What only reads does not mind.
        assert source("log", "verify").code == 0
        assert source("log", "segments").code == 0
    assert source.files() == before


def test_a_seal_that_cannot_be_written(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir(source.log / "segments"))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        done = source("log", "seal")
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1].startswith("replctl: segment ")
    assert done.err.endswith(": No space left on device\n")
    assert sorted(os.listdir(source.log / "segments")) == before
    assert [p["number"] for p in source.json("log", "seal")] == [3]


# export and import


@pytest.mark.parametrize("name", [FIRST, "000001-2026-01", "1"])
def test_export(source: Source, name: str) -> None:
    target = source.folder / "copy.segment"
    before = source.files()
    shown = source.json("log", "export", name, "--to", target)
    assert (shown["number"], shown["state"], shown["file"]) == (1, "sealed", FIRST)
    assert target.read_bytes() == (source.log / "segments" / FIRST).read_bytes()
    assert source.files() == before | {"copy.segment": target.stat().st_size}
    target.unlink()
    done = source("log", "export", name, "--to", target)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"events 1 to 7 are in {target}\n"


def test_export_as_lines(source: Source) -> None:
    target = source.folder / "out.jsonl"
    assert source("log", "export", 2, "--to", target).code == 0
    with Segment.open(source.log / "segments" / SECOND) as segment, target.open("rb") as file:
        assert list(read_json_lines(file)) == list(segment.records())
    first = json.loads(target.read_text().splitlines()[0])
    assert (first["nid"], first["topic"]) == (8, "replctl:vm.period-opened")
    assert first["fields"]["balance"][1] == "web"
    source.fails(
        2, "--move keeps the sealed segment", "log", "export", 1, "--to", "x.jsonl", "--move"
    )


def test_moved_away_and_brought_back(source: Source) -> None:
    before = source.files()
    target = source.folder / "away"
    shown = source.json("log", "export", 1, "--to", target, "--move")
    assert (shown["state"], shown["bytes"]) == ("away", None)
    assert not (source.log / "segments" / FIRST).exists()
    source.fails(3, f"are in {FIRST}, which is not in", "history", "web", "--since-id", 0)
    source.fails(3, "bring it back with replctl log import", "log", "export", 1, "--to", "x")
    assert source.json("history", "mail")
    shown = source.json("log", "import", target)
    assert (shown["file"], shown["state"]) == (FIRST, "sealed")
    assert len(source.json("history", "web", "--since-id", 0)) == 21
    assert target.stat().st_mode & 0o777 == 0o600
    target.rename(source.folder / "again")
    source.fails(3, f"{FIRST} is here already", "log", "import", source.folder / "again")
    (source.folder / "again").unlink()
    assert source.files() == before
    shutil.move(source.log / "segments" / FIRST, target)
    done = source("log", "import", target)
    assert done.out == f"{FIRST} is back: events 1 to 7\n"


def test_a_good_copy_takes_the_place_of_a_damaged_segment(source: Source) -> None:
    segment = source.log / "segments" / FIRST
    good = source.folder / "good"
    shutil.copy(segment, good)
    segment.write_bytes(segment.read_bytes()[:-1])
    source.fails(1, f"{FIRST}, events 1 to 7: segment at byte", "history", "web", "--since-id", 0)
    assert source.json("log", "import", good)["state"] == "sealed"
    assert segment.read_bytes() == good.read_bytes()
    assert source("log", "verify").code == 0


def test_an_export_never_replaces_a_file(source: Source) -> None:
    target = source.folder / "there"
    target.write_text("precious")
    before = source.files()
    source.fails(3, "exists already", "log", "export", 1, "--to", target, "--move")
    assert source.files() == before
    target.unlink()
    # What one that was killed has left is in nobody's way.
    left = source.folder / ".there.1.building"
    left.write_text("half")
    assert source("log", "export", 1, "--to", target).code == 0
    assert left.read_text() == "half"


@pytest.mark.parametrize("target", ["none/x", "replicator.conf/x", "x" * 300, "none/x.jsonl"])
def test_an_export_to_where_nothing_can_be(source: Source, target: str) -> None:
    before = source.files()
    source.fails(1, "", "log", "export", 1, "--to", source.folder / target)
    assert source.files() == before


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
@pytest.mark.parametrize("name", ["x", "x.jsonl"])
def test_an_export_to_a_full_disk_leaves_nothing(
    source: Source, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    before = source.files()
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        source.fails(1, "x: No space left" if name == "x" else "No space", "log", "export", 1,
                     "--to", source.folder / name)  # fmt: skip
    assert source.files() == before


def fail_at(patch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        real = Path.open

        def open_full(self: Path, mode: str = "r") -> Any:
            file = real(self, mode)
            if "x" not in mode:
                return file
            file.close()
            # As a disk does that has no room: nothing is taken.
            return _Full(str(self))

        patch.setattr(Path, "open", open_full)
    else:
        patch.setattr(os, step, full)


class _Full:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def write(self, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_an_import_to_a_full_disk_leaves_nothing(
    source: Source, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    away = source.folder / "away"
    shutil.move(source.log / "segments" / FIRST, away)
    before = source.files()
    with monkeypatch.context() as patch:
        fail_at(patch, step)
        source.fails(1, "No space left on device", "log", "import", away)
    assert source.files() == before
    # What a crash left is no obstacle.
    (source.log / "segments" / f".{FIRST}.1.building").write_text("half")
    fd = os.open(source.log / "segments", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        source.fails(3, "another import is under way", "log", "import", away)
    finally:
        os.close(fd)
    assert source("log", "import", away).code == 0
    assert sorted(os.listdir(source.log / "segments")) == [FIRST, SECOND]


def test_export_of_what_there_is_not(source: Source) -> None:
    said = "no sealed segment '{}' here (sealed: 000001-2026-01, 000002-2026-02)"
    for name in ("3", "000003-2026-03", "x", "../events/data.mdb"):
        source.fails(3, said.format(name), "log", "export", name, "--to", source.folder / "x")
    source.fails(2, "Missing option '--to'", "log", "export", "1")


def test_export_of_a_damaged_segment(source: Source) -> None:
    path = source.log / "segments" / FIRST
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = source.files()
    source.fails(1, "segment at byte", "log", "export", 1, "--to", source.folder / "x", "--move")
    shutil.copy(source.log / "segments" / SECOND, path)
    before = source.files()
    said = f"{FIRST}, events 1 to 7: segment at byte 0: it holds events 8 to 21 of another"
    source.fails(1, said, "log", "export", 1, "--to", source.folder / "x", "--move")
    assert source.files() == before
    # Whatever reads it says so, instead of finding nothing in it.
    source.fails(1, said, "history", "web", "--since-id", 0)
    source.fails(1, said, "log", "prove", 3)
    source.fails(1, said, "status", "--at", "2026-01-20T00:00:05Z")


def test_import_of_what_is_none_of_this_logs(
    source: Source, made: Path, calendar: Calendar
) -> None:
    garbage = source.folder / "garbage"
    garbage.write_bytes(random.Random(1).randbytes(5000))
    empty = source.folder / "empty"
    empty.write_bytes(b"")
    other = source.folder / "other"
    calendar.next_month()
    trio.run(three_months, other, calendar)
    foreign = other / "segments" / "000001-2026-02.segment"
    damaged = source.folder / "damaged"
    data = bytearray((source.log / "segments" / FIRST).read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    shutil.move(source.log / "segments" / FIRST, source.folder / "away")
    before = source.files()
    for code, said, path in (
        (1, "segment", garbage),
        (1, "this is no segment", empty),
        (1, "is not what this log sealed as", foreign),
        (1, "segment at byte", damaged),
        (1, "segment", source.log / "data.mdb"),
        (1, "no file", Path("/dev/null")),
        (2, "does not exist", source.folder / "nothing"),
        (2, "is a directory", source.folder),
    ):
        source.fails(code, said, "log", "import", path)
    third = made.parent / "third"
    if not third.exists():
        copy_log(made, third)
        trio.run(_seal, third)
    source.fails(3, "this log has sealed no segment of events 22 to 42", "log", "import",
                 third / "segments" / "000003-2026-03.segment")  # fmt: skip
    assert source.files() == before


async def _seal(folder: Path) -> None:
    async with open_log(folder) as log:
        await log.close_period()
        await log.seal()


# accept and projections


def test_accept(source: Source) -> None:
    source.fails(3, "no VM 'nobody' here", "log", "accept", "nobody")
    source.fails(3, "VM web: nothing is wrong with the other side's log", "log", "accept", "web")

    async def break_it() -> None:
        async with open_log(source.log) as log, log.change(WEB) as vm:
            vm.break_peer("it began anew")

    for json_ in (True, False):
        trio.run(break_it)
        (web,) = [vm for vm in source.json("status") if vm["vm"] == "web"]
        assert "it began anew; if that was you, run replctl log accept web" in web["warnings"]
        if json_:
            assert source.json("log", "accept", "web") == {"vm": "web", "accepted": True}
        else:
            done = source("log", "accept", str(WEB))
            assert (done.code, done.err) == (0, "")
            assert done.out == (
                f"{WEB}: the other side's log is believed from what it shows next\n"
            )
        (web,) = [vm for vm in source.json("status") if vm["vm"] == "web"]
        assert not any("began anew" in warning for warning in web["warnings"])


def test_projections(source: Source) -> None:
    found = source.json("projections", "list")
    assert [(p["name"], p["state"], p["lag"], p["position"], p["head"]) for p in found] == [
        ("usage", "live", 0, EVENTS, EVENTS),
        ("vms", "live", 0, EVENTS, EVENTS),
    ]
    assert {p["rebuilt"] for p in found} == {p["error"] for p in found} == {None}
    done = source("projections", "list")
    assert (done.code, done.err) == (0, "")
    head, *lines = [line.split() for line in done.out.splitlines()]
    assert head == ["projection", "state", "position", "lag", "rebuilt"]
    assert lines == [["usage", "live", "42", "0", "-"], ["vms", "live", "42", "0", "-"]]

    assert source.json("projections", "rebuild", "usage") == {"name": "usage", "requested": True}
    source.fails(3, "'usage' is being rebuilt already", "projections", "rebuild", "usage")
    assert source.json("projections", "list")[0]["state"] == "rebuilding"
    done = source("projections", "rebuild", "vms")
    assert (done.code, done.err) == (0, "")
    assert (
        done.out == "vms is made anew by the process that runs here, or by the next that starts\n"
    )
    assert source.json("projections", "resume", "vms") == {"name": "vms", "resumed": True}
    done = source("projections", "resume", "usage")
    assert (done.code, done.out) == (0, "usage tries again\n")
    for what in ("rebuild", "resume"):
        source.fails(3, "there is no projection 'nothing'", "projections", what, "nothing")
        source.fails(2, "projection name", "projections", what, "a b")
        source.fails(2, "projection name", "projections", what, "")

    async def start() -> None:
        async with open_log(source.log) as log:
            with trio.fail_after(HANG_S):
                for name in ("usage", "vms"):
                    await rebuilt(log, name)

    trio.run(start)
    assert {p["state"] for p in source.json("projections", "list")} == {"live"}


def test_a_projection_that_is_parked(source: Source) -> None:
    with opened(source.log, readonly=False) as store:
        database = store.environment.database(DATABASE)
        parked = Parked(9, "replctl:vm.registered", "ValueError: \x1b[2J", 10)
        state = State(Track(1, 1, 8, True, parked))
        store.environment.write(lambda txn: store_state(txn, database, "usage", state))
    (usage, _) = source.json("projections", "list")
    assert (usage["state"], usage["event"], usage["topic"], usage["tries"], usage["lag"]) == (
        "parked", 9, "replctl:vm.registered", 10, EVENTS - 8,
    )  # fmt: skip
    done = source("projections", "list")
    assert "usage is parked at event 9: ValueError: " in done.out
    assert "\x1b" not in done.out
    source.json("projections", "resume", "usage")
    assert source.json("projections", "list")[0]["state"] == "live"


def test_a_projection_is_not_made_anew_from_a_part_of_the_log(source: Source) -> None:
    """What only the segment knows would be gone from it, and nobody would be told."""
    path = source.log / "segments" / FIRST
    path.rename(source.folder / "away")
    before = source.json("projections", "list")
    source.fails(3, "bring it back with replctl log import", "projections", "rebuild", "usage")
    assert source.json("projections", "list") == before
    (source.folder / "away").rename(path)
    assert source("projections", "rebuild", "usage").code == 0


EVERY = [
    ("log", "verify"),
    ("log", "prove", "1"),
    ("log", "segments"),
    ("log", "seal"),
    ("log", "export", "1", "--to", "x"),
    ("log", "import", "replicator.conf"),
    ("log", "accept", "web"),
    ("projections", "list"),
    ("projections", "rebuild", "vms"),
    ("projections", "resume", "vms"),
]


@pytest.mark.parametrize("words", EVERY)
def test_where_there_is_no_log(
    source: Source, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.folder)
    shutil.rmtree(source.log)
    before = source.files()
    source.fails(3, f"there is no log in {source.state} yet", *words)
    assert source.files() == before


@pytest.mark.parametrize("words", [words for words in EVERY if words[1] != "import"])
def test_where_the_log_is_none(source: Source, words: tuple[str, ...]) -> None:
    """Damaged beyond opening: one line, and it is left as it is."""
    (source.log / "data.mdb").write_bytes(b"not LMDB" * 1000)
    before = source.files()
    source.fails(1, "", *words)
    assert source.files() == before


# Times that are past


def test_status_and_history_of_earlier_times(source: Source) -> None:
    with opened(source.log) as store:
        own = events_by_vm(check_log(store))[str(WEB)]
    at = [instant(event_time_us(event)) for event in own]
    # mail never came to a point, and it is not the VM of this configuration.
    assert [vm["vm"] for vm in source.json("status", "--at", at[-1])] == ["db", "web"]
    assert [vm["vm"] for vm in source.json("status", "--at", at[3])] == ["web"]
    assert source.json("status", "--at", "2026-01-01") == []
    whole = source.json("history", "web")
    assert [event["id"] for event in whole] == list(range(1, len(own) + 1))
    assert source.json("history", "web", "--since", at[4], "--until", at[9]) == whole[4:10]
    assert source.json("history", "web", "--until", at[9]) == whole[:10]
    done = source("history", "web", "--since", at[4], "--limit", 2)
    assert done.code == 0
    assert "--since-id 6 goes on with them" in done.err
    for wrong in ("yesterday", "2026-13-01", "", "9999-12-31T23:59:59-12:00", "1969-01-01"):
        source.fails(2, "", "status", "--at", wrong)
        source.fails(2, "", "history", "web", "--since", wrong)


# Beside a receiver


@asynccontextmanager
async def receiving(
    folder: Path, replctl: Replctl
) -> AsyncIterator[tuple[ReceiverSite, SourceSite, Callable[..., Any]]]:
    """A receiver that has taken two cycles, holds its state directory and answers; and `replctl` on its host."""
    disk = folder / "disk.raw"
    await trio.Path(disk).write_bytes(random.Random(1).randbytes(200_000))
    state = folder / "rx"
    socket = folder / "c.sock"
    config = write_config(
        folder / "rx.conf",
        {"dr_auth_token": KEY, "source": "image", "state_dir": state, "control_socket": socket},
    )

    async def run(*words: str | Path) -> Done:
        return await trio.to_thread.run_sync(lambda: replctl("--config", config, *words))

    with open_state_dir(state):
        async with (
            receiver_site(state, control_socket=str(socket)) as rx,
            source_site(folder / "sx", rx.port, {"disk-0": disk}) as sx,
            trio.open_nursery() as nursery,
        ):
            for number in range(2):
                sx.write("disk-0", number, b"changed")
                await sx.push()
            await rx.settled()
            clones = CloneManager(rx.config, rx.log, rx.stores, nursery)
            control = ControlApi(rx.log, rx.stores, clones, folder, Metrics(rx.log, Live()))
            await nursery.start(serve_http, socket, control.handle)
            yield rx, sx, run
            nursery.cancel_scope.cancel()


async def test_every_command_beside_a_receiver_that_runs(tmp_path: Path, replctl: Replctl) -> None:
    async with receiving(tmp_path, replctl) as (rx, sx, run):
        done = await run("--json", "log", "verify")
        assert done.json["signed_heads"] == 1
        head = done.json["events"]
        done = await run("--json", "log", "seal")
        assert (done.code, complaints(done)) == (0, [])
        (sealed,) = done.json
        assert (sealed["first"], sealed["last"], sealed["state"]) == (1, head, "sealed")
        done = await run("log", "seal")
        assert done.out.startswith("nothing to seal")
        done = await run("--json", "log", "segments")
        assert [p["state"] for p in done.json] == ["sealed", "open"]
        done = await run("--json", "log", "prove", "1", "--vm", "web")
        assert done.json["event"] == 1
        done = await run("--json", "log", "accept", "web")
        assert (done.code, done.json["exit_code"]) == (3, 3)
        assert "nothing is wrong" in done.err
        done = await run("--json", "log", "accept", "nobody")
        assert done.code == 3
        away = tmp_path / "away"
        assert (await run("log", "export", "1", "--to", away, "--move")).code == 0
        done = await run("history", "web", "--since-id", "0")
        assert done.code == 3
        assert "bring it back with replctl log import" in done.err.splitlines()[-1]
        assert (await run("--json", "status", "--at", "2020-01-01")).json == []
        # Neither pushes nor the exchange of heads need it.
        sx.write("disk-0", 9, b"more")
        await sx.push()
        assert (await run("--json", "log", "verify")).json["signed_heads"] == 1
        assert (await run("log", "import", away)).code == 0
        done = await run("--json", "history", "web", "--since-id", "0")
        assert [e["id"] for e in done.json] == list(range(1, len(done.json) + 1))
        done = await run("--json", "projections", "rebuild", "usage")
        assert done.code == 0
        with trio.fail_after(HANG_S):
            await rebuilt(rx.log, "usage")
        segments = await trio.to_thread.run_sync(os.listdir, rx.log.store.archive.folder)
        assert len(segments) == 1


async def test_a_receiver_that_died_leaves_its_socket(tmp_path: Path, replctl: Replctl) -> None:
    """The command does by itself what no receiver does on request."""
    async with receiving(tmp_path, replctl) as (_, _, run):
        pass
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        (tmp_path / "c.sock").unlink(missing_ok=True)
        await sock.bind(str(tmp_path / "c.sock"))
    done = await run("--json", "log", "seal")
    assert (done.code, len(done.json)) == (0, 1)


async def test_a_receiver_that_starts_and_does_not_answer_yet(
    tmp_path: Path, replctl: Replctl
) -> None:
    async with receiving(tmp_path, replctl) as (_, _, run):
        pass
    (tmp_path / "c.sock").unlink(missing_ok=True)
    with open_state_dir(tmp_path / "rx"):
        done = await run("log", "seal")
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert "another replctl" in done.err
