# SPDX-License-Identifier: AGPL-3.0-or-later
"""TLS with somebody on the line: what arrives is what was sent, as far as it arrives; all else is an error that blames the peer."""

from __future__ import annotations

import random
import ssl
from collections.abc import Callable
from typing import Any, Final

import pytest
import trio
import trio.testing

from replicator.errors import WireError
from replicator.wire.tls import secure_stream
from tests.wire.tls_lab import HOST, context, issue

PAYLOAD: Final = random.Random(3).randbytes(40_000)
#: Handshakes are some 2 KB from each side.
PLACES: Final = [*range(60), *range(60, 4000, 61), 20_000, 39_000]
Change = Callable[[bytes], bytes]
CHANGES: Final[dict[str, Change]] = {
    "flip": lambda data: bytes([data[0] ^ 0x10]) + data[1:],
    "insert": lambda data: b"\x16\x03\x03\x00\x01\x00" + data,
    "repeat": lambda data: data[:40] + data,
    "drop": lambda data: data[7:],
    "junk": lambda data: bytes(len(data)),
    "cut": lambda _: b"",
}


async def relay(source: Any, target: Any, place: int | None, change: Change) -> None:
    """Pass all bytes on; from byte ``place`` on they are changed, once."""
    passed = 0
    try:
        while data := await source.receive_some(65536):
            if place is not None and passed <= place < passed + len(data):
                at = place - passed
                changed = change(data[at:])
                await target.send_all(data[:at] + changed)
                if not changed:
                    break
            else:
                await target.send_all(data)
            passed += len(data)
        await target.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return


async def session(
    way: int, place: int | None, change: Change, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> tuple[bytes, list[BaseException]]:
    """What the receiver got of PAYLOAD, and the errors of the two sides."""
    near, source_end = trio.testing.memory_stream_pair()
    far, receiver_end = trio.testing.memory_stream_pair()
    got, errors = bytearray(), list[BaseException]()

    async def send() -> None:
        try:
            stream = await secure_stream(near, contexts[0], server_name=HOST, deadline_s=15)
            async with stream:
                await stream.send_all(PAYLOAD)
        except (WireError, trio.BrokenResourceError) as error:
            errors.append(error)
        finally:
            await trio.aclose_forcefully(near)

    async def receive() -> None:
        try:
            stream = await secure_stream(far, contexts[1], server_name=None, deadline_s=15)
            async with stream:
                while data := await stream.receive_some():
                    got.extend(data)
        except (WireError, trio.BrokenResourceError) as error:
            errors.append(error)
        finally:
            await trio.aclose_forcefully(far)

    with trio.fail_after(
        3600
    ):  # of a clock that nobody waits for: a changed length makes a side wait until its deadline
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            nursery.start_soon(relay, source_end, receiver_end, place if way == 0 else None, change)
            nursery.start_soon(relay, receiver_end, source_end, place if way == 1 else None, change)
    return bytes(got), errors


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("way", [0, 1], ids=["to the receiver", "to the source"])
async def test_what_is_changed_on_the_way_is_no_data(
    autojump_clock: trio.testing.MockClock, name: str, way: int
) -> None:
    del autojump_clock
    contexts = (
        context(issue("source.example"), server_side=False),
        context(issue(HOST, "dr.example"), server_side=True),
    )
    got, errors = await session(0, None, CHANGES[name], contexts)
    assert (got, errors) == (PAYLOAD, [])
    felt = 0
    for place in PLACES:
        got, errors = await session(way, place, CHANGES[name], contexts)
        assert PAYLOAD.startswith(got)
        if len(got) < len(PAYLOAD):
            assert errors
        felt += bool(errors)
    # Some places lie behind all that a side says.
    assert felt > len(PLACES) / 2
