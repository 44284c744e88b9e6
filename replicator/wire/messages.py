# SPDX-License-Identifier: AGPL-3.0-or-later
"""The messages of the push protocol (docs/wire.md, section 4) and their bounds.

A control message is MessagePack of one tagged struct; data is binary. Everything from the peer is checked here, before
anything is done with it.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal
from uuid import UUID

import msgspec

from replicator.domain.model import PushKind
from replicator.errors import WireError
from replicator.wire.framing import MessageLimits

#: Kinds of message on the stream.
CONTROL = 1
DATA = 2
#: The largest piece of a delta stream in one data message, bytes: a record of 1 MiB and its digests fit.
DATA_MAX = (1 << 20) + (64 << 10)
DISKS_MAX = 256
_DATA_HEAD = struct.Struct(">HQ")
DATA_HEAD_SIZE = _DATA_HEAD.size
LIMITS = MessageLimits({CONTROL: 256 << 10, DATA: DATA_HEAD_SIZE + DATA_MAX}, control_bytes_max=0)

VmId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
VmName = Annotated[
    str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f/]+\Z")
]
PushId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
DiskName = Annotated[str, msgspec.Meta(pattern=r"^disk-[0-9]{1,4}\Z")]
Root = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Position = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Epoch = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Reason = Annotated[str, msgspec.Meta(max_length=2000)]
Micros = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
LogKey = Annotated[str, msgspec.Meta(min_length=1, max_length=400)]
HeadText = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Proof = Annotated[tuple[Root, ...], msgspec.Meta(max_length=128)]

#: Pages of a map that are asked for at once, and those that fit into one answer.
PAGES_ASKED_MAX = 256
PAGES_SENT_MAX = 24
PageIndex = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Page = Annotated[bytes, msgspec.Meta(max_length=8192)]
DiskSize = Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
Identity = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]

RefusalCode = Literal[
    "wrong-parent", "stale-epoch", "unknown-vm", "wrong-key", "state", "busy", "shrink",
    "root-mismatch", "no-room", "bad-request", "damaged-stream", "log-broken", "failed",
]  # fmt: skip


class PointRef(msgspec.Struct, frozen=True):
    """A point by number, content and the push that brought it."""

    number: Number
    root: Root
    push_id: PushId


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all control messages."""


class Query(Message, frozen=True):
    """Source: what do you have of this VM?"""

    vm: VmId
    name: VmName


class VmState(Message, frozen=True):
    """Receiver: what it has. ``push_id`` is an unfinished push that could be gone on with."""

    newest: PointRef | None
    epoch: Epoch
    push_id: PushId | None


class OpenDisk(msgspec.Struct, frozen=True):
    """One disk of a push. ``since`` equal to the push's point: the stream has no base. ``have`` is where the source can go on."""

    disk: DiskName
    identity: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    size: Annotated[int, msgspec.Meta(ge=1, le=1 << 50)]
    since: Number
    have: Position


class Open(Message, frozen=True):
    """Source: a push begins or goes on."""

    vm: VmId
    name: VmName
    epoch: Epoch
    push_id: PushId
    kind: PushKind
    point: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
    parent: Number
    parent_root: Root | None
    taken_at_us: Micros
    disks: Annotated[tuple[OpenDisk, ...], msgspec.Meta(min_length=1, max_length=DISKS_MAX)]


class Ready(Message, frozen=True):
    """Receiver: send each disk's stream from here."""

    push_id: PushId
    positions: Annotated[tuple[Position, ...], msgspec.Meta(max_length=DISKS_MAX)]


class Ack(Message, frozen=True):
    """Receiver: this disk's stream is durable up to ``position``."""

    disk: Annotated[int, msgspec.Meta(ge=0, lt=DISKS_MAX)]
    position: Position


class Landed(Message, frozen=True):
    """Receiver: this disk's stream has come, and is checked, up to ``position``; it would not survive a power cut yet.

    It bounds what is on its way and promises nothing.
    """

    disk: Annotated[int, msgspec.Meta(ge=0, lt=DISKS_MAX)]
    position: Position


class FinalDisk(msgspec.Struct, frozen=True):
    """What a disk must be after the push: its image root, and the root of the stream that brought it there."""

    root: Root
    stream_root: Root


class Finish(Message, frozen=True):
    """Source: everything is sent; commit.

    ``sampled``: grains that were read although change tracking calls them unchanged, and were. ``compared``: every disk was
    read in full.
    """

    push_id: PushId
    root: Root
    disks: Annotated[tuple[FinalDisk, ...], msgspec.Meta(min_length=1, max_length=DISKS_MAX)]
    duration_us: Micros
    sampled: Number = 0
    compared: bool = False


class Committed(Message, frozen=True):
    """Receiver: the point exists, durably. Also the answer to an Open of a push that is committed already."""

    push_id: PushId
    point: Number
    root: Root
    committed_at_us: Micros
    bytes_pushed: Position


class Compare(Message, frozen=True):
    """Source: show me the head of your log. ``seen``: how many events of it this side has seen already."""

    vm: VmId
    name: VmName
    seen: Number


class ReceiverHead(Message, frozen=True):
    """Receiver: the head of its log, signed, proven to continue ``Compare.seen``; and how much it has seen of the source's."""

    key: LogKey
    head: HeadText
    proof: Proof
    seen: Number


class SourceHead(Message, frozen=True):
    """Source: the head of its log, proven to continue ``ReceiverHead.seen``; and the receiver's head, signed by the source
    too, unless it is not believed.
    """

    key: LogKey
    head: HeadText
    proof: Proof
    signed: HeadText | None


class Signed(Message, frozen=True):
    """Receiver: the source's head, signed by the receiver too."""

    head: HeadText


class Describe(Message, frozen=True):
    """Source: say all about the newest point that you have."""

    vm: VmId
    name: VmName


class DiskMap(msgspec.Struct, frozen=True):
    """One disk of a point, and the shape of the map of its digests (docs/image-root.md)."""

    disk: DiskName
    identity: Identity
    size: DiskSize
    root: Root
    since: Number
    grain: Annotated[int, msgspec.Meta(ge=4096, le=1 << 20)]
    algorithm: Literal[1, 2]


class Described(Message, frozen=True):
    """Receiver: its newest point, whole. Fields as those of a point in the log."""

    number: Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]
    parent: Number
    push_id: PushId
    kind: PushKind
    epoch: Epoch
    taken_at_us: Micros
    committed_at_us: Micros
    duration_us: Micros
    bytes_pushed: Position
    root: Root
    sampled: Number
    compared: bool
    disks: Annotated[tuple[DiskMap, ...], msgspec.Meta(min_length=1, max_length=DISKS_MAX)]


class AskPages(Message, frozen=True):
    """Source: these pages of the map of the newest point's disk, which must have this root."""

    vm: VmId
    name: VmName
    disk: DiskName
    root: Root
    level: Annotated[int, msgspec.Meta(ge=0, lt=5)]
    indexes: Annotated[
        tuple[PageIndex, ...], msgspec.Meta(min_length=1, max_length=PAGES_ASKED_MAX)
    ]


class Pages(Message, frozen=True):
    """Receiver: the next of the pages asked for, in that order, each without the zeros that it ends with."""

    pages: Annotated[tuple[Page, ...], msgspec.Meta(min_length=1, max_length=PAGES_SENT_MAX)]


class PagesEnd(Message, frozen=True):
    """Receiver: these were all."""


class Doubt(Message, frozen=True):
    """Source: change tracking missed a change here, so points since the last one that was read in full may lack changes.

    ``point``: the newest one when it was found.
    """

    vm: VmId
    name: VmName
    disk: DiskName
    offset: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
    point: Number


class Abandon(Message, frozen=True):
    """Source: forget this push."""

    vm: VmId
    push_id: PushId
    reason: Reason


class Refused(Message, frozen=True):
    """Receiver: no, and why. What it has stands in it, so that the source can choose what to do."""

    code: RefusalCode
    reason: Reason
    newest: PointRef | None
    epoch: Epoch


class Ping(Message, frozen=True):
    """Source: still here."""


class Pong(Message, frozen=True):
    """Receiver: still here. Sent in answer to Ping, and unasked while it works."""


FromSource = (
    Query | Open | Finish | Abandon | Compare | SourceHead | Ping | Describe | AskPages | Doubt
)
FromReceiver = (
    VmState
    | Ready
    | Ack
    | Landed
    | Committed
    | Refused
    | ReceiverHead
    | Signed
    | Pong
    | Described
    | Pages
    | PagesEnd
)

#: What msgspec raises for bytes that are no message; text that is not UTF-8 and nesting are not its own errors.
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_from_source: msgspec.msgpack.Decoder[FromSource] = msgspec.msgpack.Decoder(FromSource)
_from_receiver: msgspec.msgpack.Decoder[FromReceiver] = msgspec.msgpack.Decoder(FromReceiver)


class Data(msgspec.Struct, frozen=True):
    """A piece of disk number ``disk``'s delta stream, at ``offset`` of that stream."""

    disk: int
    offset: int
    payload: memoryview | bytes


def is_vm_name(name: str) -> bool:
    """Whether a VM may be called this: what the other side would refuse is better refused here."""
    try:
        msgspec.convert(name, VmName)
    except msgspec.ValidationError:
        return False
    return True


def encode(message: Message) -> bytes:
    """The body of a control message."""
    return _encoder.encode(message)


def data_head(disk: int, offset: int) -> bytes:
    """What stands before the bytes of a data message."""
    return _DATA_HEAD.pack(disk, offset)


def decode_data(body: bytes | bytearray | memoryview) -> Data:
    """A data message's body. Raises WireError."""
    if not DATA_HEAD_SIZE < len(body) <= DATA_HEAD_SIZE + DATA_MAX:
        raise WireError(f"data message of {len(body)} bytes")
    disk, offset = _DATA_HEAD.unpack_from(body)
    return Data(disk, offset, memoryview(body)[DATA_HEAD_SIZE:])


def decode_from_source(body: bytes | bytearray | memoryview) -> FromSource:
    """A control message that a receiver may get. Raises WireError."""
    try:
        return _from_source.decode(body)
    except _UNDECODABLE as error:
        raise WireError(f"bad message from the source: {error}") from None


def decode_from_receiver(body: bytes | bytearray | memoryview) -> FromReceiver:
    """A control message that a source may get. Raises WireError."""
    try:
        return _from_receiver.decode(body)
    except _UNDECODABLE as error:
        raise WireError(f"bad message from the receiver: {error}") from None


def vm_uuid(text: VmId) -> UUID:
    """The UUID of a checked VM id."""
    return UUID(text)
