# SPDX-License-Identifier: AGPL-3.0-or-later
"""For each decoder of ``decoders.py``: bytes that a correct peer sends, from which hostile ones are made."""

from __future__ import annotations

import functools
import random
from typing import Final
from uuid import UUID

from bacula_adapter.backend.packets import encode
from replicator.domain.model import PushKind
from replicator.phcbt import Algorithm, StreamHeader, StreamWriter, encode_chunk
from replicator.wire import messages as m
from replicator.wire.frames import FrameSealer
from tests.hostile.decoders import FRAME_KEY, client, server

VM: Final = UUID("5f0c7c3e-6f2b-4f7e-9a55-0d2f4c1b8a01")
GRAIN: Final = 4096
PUSH: Final = "1" * 16
_ROOT: Final = bytes(range(32))


def stream(
    algorithm: Algorithm = Algorithm.XXH3_128, level: int | None = 1, grains: int = 40
) -> bytes:
    """A stream with text, noise, zeros and a last grain that is short."""
    size = grains * GRAIN + 100
    header = StreamHeader(algorithm, GRAIN, 4 * GRAIN, size, VM, 0, 1, bytes(32), "disk-0")
    writer, noise = StreamWriter(header), random.Random(5)
    pieces: list[bytes | memoryview] = [writer.start()]
    for at in range(0, size, header.chunk):
        length = min(header.chunk, size - at)
        kind = at // header.chunk % 3
        plain = [bytes(length), noise.randbytes(length), b"text " * (length // 5 + 1)][kind][
            :length
        ]
        for record in encode_chunk(header, at, plain, level):
            pieces += writer.add(record)
    pieces.append(writer.finish())
    return b"".join(pieces)


def indexed_stream() -> bytes:
    """A stream long enough to hold an index: 1024 records of one grain."""
    size = 1030 * GRAIN
    header = StreamHeader(Algorithm.XXH3_128, GRAIN, GRAIN, size, VM, 3, 4, b"\7" * 32, "disk-0")
    writer = StreamWriter(header)
    pieces: list[bytes | memoryview] = [writer.start()]
    for at in range(0, size, GRAIN):
        for record in encode_chunk(header, at, (b"%d " % at * GRAIN)[:GRAIN], 1):
            pieces += writer.add(record)
    pieces.append(writer.finish())
    return b"".join(pieces)


def message(kind: int, body: bytes) -> bytes:
    """One message as it stands on the stream."""
    return len(body).to_bytes(4) + bytes([kind]) + body


def control(*said: m.Message) -> bytes:
    """Control messages."""
    return b"".join(message(m.CONTROL, m.encode(each)) for each in said)


def opened(disks: int = 1) -> m.Open:
    """The Open of a seed."""
    each = tuple(m.OpenDisk(f"disk-{n}", f"id-{n}", 1 << 20, 1, 0) for n in range(disks))
    return m.Open(str(VM), "web", 1, PUSH, PushKind.SEED, 1, 0, None, 1, each)


def source_session() -> bytes:
    """A whole push, with a sign of life and what comes after it."""
    data = stream()
    pieces = [
        message(m.DATA, m.data_head(0, at) + data[at : at + 20_000])
        for at in range(0, len(data), 20_000)
    ]
    return (
        control(m.Query(str(VM), "web"), m.Ping(), opened())
        + b"".join(pieces)
        + control(m.Finish(PUSH, _ROOT, (m.FinalDisk(_ROOT, _ROOT),), 5))
        + control(m.Query(str(VM), "web"), m.Abandon(str(VM), PUSH, "a test"))
        + control(m.Compare(str(VM), "web", 7))
    )


def receiver_answers() -> list[m.Message]:
    """One of each that a receiver says in the order of the protocol's table."""
    return [
        m.Pong(),
        m.VmState(m.PointRef(3, _ROOT, PUSH), 2, PUSH),
        m.VmState(None, 1, None),
        m.Refused("busy", "another push of this VM is landing", m.PointRef(3, _ROOT, PUSH), 2),
        m.Ready(PUSH, (0, 1 << 40)),
        m.Ack(0, 1 << 20),
        m.Committed(PUSH, 4, _ROOT, 9, 1 << 30),
        m.ReceiverHead("key+1+x", "head", (_ROOT, _ROOT), 8),
        m.Signed("head"),
        m.Landed(0, 1 << 21),
        described(),
        m.Pages((b"digest" * 20, b"", bytes(range(256)) * 32)),
        m.PagesEnd(),
    ]


def source_messages() -> list[m.Message]:
    """One of each that a source says."""
    return [
        m.Query(str(VM), "web"),
        opened(3),
        m.Finish(PUSH, _ROOT, (m.FinalDisk(_ROOT, _ROOT),), 5),
        m.Abandon(str(VM), PUSH, "a test"),
        m.Compare(str(VM), "web", 7),
        m.SourceHead("key+1+x", "head", (_ROOT,), None),
        m.Describe(str(VM), "web"),
        m.AskPages(str(VM), "web", "disk-0", _ROOT, 1, (0, 5, 1 << 40)),
        m.Doubt(str(VM), "web", "disk-0", 1 << 30, 4),
        m.Ping(),
    ]


def described() -> m.Described:
    """A point of two disks."""
    disks = tuple(m.DiskMap(f"disk-{n}", f"id-{n}", 1 << 30, _ROOT, 1, GRAIN, 1) for n in range(2))
    return m.Described(4, 3, PUSH, PushKind.CYCLE, 1, 7, 8, 9, 1 << 20, _ROOT, 100, False, disks)


def sealed(payloads: list[bytes], *, encrypted: bool) -> bytes:
    """Frames and the close of a direction."""
    sealer = FrameSealer(FRAME_KEY, sealed=encrypted)
    return b"".join([*(bytes(sealer.seal(each)) for each in payloads), bytes(sealer.seal_close())])


def _begin(kind: str, start: str) -> list[tuple[str, bytes]]:
    lines = [
        "Hello replicator 3 ext=1",
        "Job",
        "Name=Job.2026-11-25_10.00.00_03",
        f"Type={kind}",
        "",
        "Params",
    ]
    return [
        ("C" if text else "F", text.encode()) for text in [*lines, "PluginString=vm=web", "", start]
    ]


def _packets(said: list[tuple[str, bytes]]) -> bytes:
    return b"".join(encode(status, payload) for status, payload in said)


def plugin_backup() -> bytes:
    """What Bacula's plugin says in a backup."""
    end = [("C", b"CHECKFILE:@image/web/x"), ("C", b"RESULT T"), ("C", b"END"), ("T", b"")]
    return _packets([*_begin("B", "BackupStart"), *end])


def plugin_restore() -> bytes:
    """What it says in a restore: an object, two files."""
    attributes = [
        ("C", b"STAT:F 9 0 0 100600 1 1"),
        ("C", b"TSTAMP:1 2 3"),
        ("F", b""),
        ("C", b"DATA"),
    ]
    return _packets(
        [
            *_begin("R", "RestoreStart"),
            *[("C", b"RESTOREOBJ:x"), ("C", b"RESTOREOBJ_JOBID:1"), ("C", b"RESTOREOBJ_TYPE:25")],
            *[("C", b"RESTOREOBJ_LEN:3"), ("D", b"abc"), ("F", b"")],
            *[("C", b"FNAME:/r/a"), *attributes, ("B", bytes(8) + b"abc"), ("E", b"")],
            *[("C", b"FNAME:/r/b"), *attributes, ("D", b"x" * 5000), ("F", b"")],
            *[("C", b"FINISH"), ("C", b"RESULT T"), ("C", b"END"), ("T", b"")],
        ]
    )


@functools.cache
def valid() -> dict[str, list[bytes]]:
    """Bytes for each decoder, by its name."""
    source, receiver = client(), server()
    hello = source.start()
    answer = receiver.receive_data(hello)
    proof = source.receive_data(answer)
    payloads = [b"first", b"x" * 5000, bytes(300), b"last"]
    answers = [control(*receiver_answers()[:2]), control(*receiver_answers())]
    return {
        "as_server": [hello + proof + b"frames follow"],
        "as_client": [answer + b"frames follow"],
        "readable_frames": [sealed(payloads, encrypted=False)],
        "sealed_frames": [sealed(payloads, encrypted=True)],
        "frames_in_place": [sealed(payloads, encrypted=True)],
        "messages": [source_session(), *answers],
        "session_of_source": [source_session()],
        "session_of_receiver": answers,
        "stream": [stream(), stream(Algorithm.BLAKE3_256, None, 9)],
        "plugin": [plugin_backup(), plugin_restore()],
    }
