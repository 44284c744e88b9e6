# SPDX-License-Identifier: AGPL-3.0-or-later
"""The QMP client against a scripted QEMU: what is refused, what is late, what comes between."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from replicator.sources.qmp import QmpError, QmpGoneError, open_qmp

GREETING: dict[str, Any] = {"QMP": {"version": {}, "capabilities": []}}
Respond = Callable[[dict[str, Any]], list[dict[str, Any] | bytes]]


@asynccontextmanager
async def scripted(
    respond: Respond, *, greeting: dict[str, Any] | None = GREETING
) -> AsyncIterator[Path]:
    """A QEMU that answers each command with what ``respond`` returns; bytes go as they are."""
    with tempfile.TemporaryDirectory(prefix="qm", dir="/tmp") as folder:
        path = Path(folder) / "q"
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await sock.bind(str(path))
        sock.listen(1)

        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                if greeting is not None:
                    await stream.send_all(json.dumps(greeting).encode() + b"\r\n")
                buffer = b""
                while piece := await stream.receive_some(4096):
                    buffer += piece
                    while b"\n" in buffer:
                        line, buffer = buffer.split(b"\n", 1)
                        command = json.loads(line)
                        answers: list[dict[str, Any] | bytes] = [
                            {"return": {}, "id": command["id"]}
                        ]
                        if command["execute"] != "qmp_capabilities":
                            answers = respond(command)
                        for answer in answers:
                            if not isinstance(answer, bytes):
                                answer = json.dumps(answer).encode() + b"\r\n"  # noqa: PLW2901
                            await stream.send_all(answer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, handle, [trio.SocketListener(sock)])
            yield path
            nursery.cancel_scope.cancel()


def returning(value: Any) -> Respond:
    return lambda command: [{"return": value, "id": command["id"]}]


async def test_arguments_and_answers_with_events_and_stale_replies_between() -> None:
    seen: list[dict[str, Any]] = []

    def respond(command: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        seen.append(command)
        event = {"event": "THING", "data": {"n": len(seen)}}
        return [event, {"return": "stale", "id": -1}, {"return": [1], "id": command["id"]}, event]

    async with scripted(respond) as path, open_qmp(path) as qmp:
        assert await qmp.execute("do-it", node_name="disk", size=5) == [1]
        assert await qmp.execute("again") == [1]
        assert seen[0]["execute"] == "do-it"
        assert seen[0]["arguments"] == {"node-name": "disk", "size": 5}
        wanted = await qmp.wait_event(lambda e: e["data"]["n"] == 2, 5)
        assert wanted == {"event": "THING", "data": {"n": 2}}


async def test_a_refusal_says_why() -> None:
    error = {"class": "DeviceNotFound", "desc": "Cannot find\n device=x"}
    async with (
        scripted(lambda command: [{"error": error, "id": command["id"]}]) as path,
        open_qmp(path) as qmp,
    ):
        with pytest.raises(QmpError, match="QEMU refused look: Cannot find device=x") as caught:
            await qmp.execute("look")
        assert caught.value.kind == "DeviceNotFound"


@pytest.mark.parametrize(
    ("sent", "words"),
    [(b"not json\n", "not JSON"), (b"[1]\n", "not a QMP message")],
)
async def test_nonsense(sent: bytes, words: str) -> None:
    async with scripted(lambda _command: [sent]) as path, open_qmp(path) as qmp:
        with pytest.raises(QmpError, match=words):
            await qmp.execute("look")


async def test_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicator.sources.qmp.LINE_LENGTH_MAX", 1000)
    async with scripted(lambda _command: [b"x" * 2000]) as path, open_qmp(path) as qmp:
        with pytest.raises(QmpError, match="more than 1000 bytes"):
            await qmp.execute("look")


async def test_something_else_at_the_socket() -> None:
    async with scripted(returning(1), greeting={"hello": 1}) as path:
        with pytest.raises(QmpError, match="does not speak QMP"):
            async with open_qmp(path):
                pass


async def test_a_busy_monitor_and_a_late_answer(autojump_clock: trio.testing.MockClock) -> None:
    assert autojump_clock.autojump_threshold == 0
    async with scripted(returning(1), greeting=None) as path:
        with pytest.raises(QmpError, match="is another program connected"):
            async with open_qmp(path):
                pass
    async with scripted(lambda _command: []) as path, open_qmp(path) as qmp:
        with pytest.raises(QmpError, match="did not answer look in 60 s"):
            await qmp.execute("look")
        assert await qmp.wait_event(lambda _event: True, 5) is None


async def test_a_cancelled_command_leaves_the_connection_usable() -> None:
    """Its answer comes later, and is not taken for the next command's."""
    held: list[dict[str, Any] | bytes] = []

    def respond(command: dict[str, Any]) -> list[dict[str, Any] | bytes]:
        held.append({"return": command["execute"], "id": command["id"]})
        return list(held) if len(held) > 1 else []

    async with scripted(respond) as path, open_qmp(path) as qmp:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qmp.execute, "slow")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await qmp.execute("next") == "next"


async def test_the_end_of_qemu() -> None:
    with pytest.raises(QmpGoneError, match="no QEMU at"):
        async with open_qmp(Path("/tmp/no-such-qmp")):
            pass
