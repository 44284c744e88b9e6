# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

import json
import logging
import os
import socket
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing

from replicator.control import server
from replicator.control.server import Answer, NotFoundError, serve_http
from replicator.errors import RefusedError, StateError, UsageError
from tests.limits import HANG_S


@pytest.fixture
def path() -> Iterator[Path]:
    with TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder) / "control.sock"


class Routes:
    """A handler with one route for each thing that may happen."""

    def __init__(self) -> None:
        self.closed = trio.Event()
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, method: str, target: str, body: dict[str, Any]) -> Answer:
        await trio.lowlevel.checkpoint()
        self.bodies.append(body)
        match target:
            case "/echo":
                return {"method": method, "body": body}
            case "/lines":
                return self._lines()
            case "/endless":
                return self._endless()
            case "/flood":
                return self._flood()
            case "/usage":
                raise UsageError("point: expected a number")
            case "/refused":
                raise RefusedError("the VM is promoted")
            case "/state":
                raise StateError("the disk is gone")
            case "/defect":
                raise KeyError("oops")
        raise NotFoundError(f"no such request: {method} {target}")

    async def _lines(self) -> AsyncGenerator[dict[str, Any], None]:
        yield {"step": 1}
        await trio.lowlevel.checkpoint()
        yield {"step": 2}
        raise RefusedError("no third step")

    async def _endless(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"export": "here"}
            await trio.sleep_forever()
        finally:
            self.closed.set()

    async def _flood(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {"line": "x" * 10_000}
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[Routes]:
    routes = Routes()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_http, path, routes)
        yield routes
        nursery.cancel_scope.cancel()


async def exchange(path: Path, request: bytes) -> tuple[int, list[dict[str, Any]]]:
    """Send bytes as they are; status and the JSON lines of the answer."""
    with trio.fail_after(HANG_S):
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(request)
            data = b""
            # The rest of a request that is too long is not read: then the end is a reset, after the answer.
            with suppress(trio.BrokenResourceError):
                while piece := await stream.receive_some():
                    data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line for line in body.split(b"\n") if line.startswith(b"{")]
    return int(head.split()[1]), [json.loads(line) for line in lines]


def mode_of(path: Path) -> int | None:
    """The access rights of what lies there, None if nothing does."""
    return stat.S_IMODE(path.lstat().st_mode) if path.exists() else None


def get(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def post(target: str, body: bytes) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_a_whole_answer(path: Path) -> None:
    async with serving(path):
        status, (answer,) = await exchange(path, post("/echo", b'{"point": 3}'))
        assert (status, answer) == (200, {"method": "POST", "body": {"point": 3}})
        status, (answer,) = await exchange(path, get("/echo"))
        assert (status, answer) == (200, {"method": "GET", "body": {}})


@pytest.mark.parametrize(
    ("target", "status", "exit_code"),
    [
        ("/usage", 400, 2),
        ("/refused", 409, 3),
        ("/state", 500, 1),
        ("/defect", 500, 1),
        ("/no", 404, 2),
    ],
)
async def test_an_error_carries_the_exit_code(
    path: Path, target: str, status: int, exit_code: int
) -> None:
    async with serving(path):
        got, (answer,) = await exchange(path, get(target))
        assert (got, answer["exit_code"]) == (status, exit_code)
        assert answer["error"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is no HTTP\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: soon\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (post("/echo", b"x" * (server._BODY_MAX + 1)), 413),
        (post("/echo", b"{"), 400),
        (post("/echo", b"[1]"), 400),
        (post("/echo", b"[" * 60_000), 400),
        (post("/echo", b"\xff"), 400),
    ],
    ids=[
        "no-http",
        "no-host",
        "bad-length",
        "long-head",
        "long-body",
        "cut-json",
        "no-object",
        "deep",
        "no-utf8",
    ],
)
async def test_a_bad_request_is_answered_and_reaches_no_handler(
    path: Path, request_: bytes, status: int
) -> None:
    async with serving(path) as routes:
        got, (answer,) = await exchange(path, request_)
        assert (got, answer["exit_code"]) == (status, 2)
        assert not routes.bodies
        assert (await exchange(path, get("/echo")))[0] == 200


async def test_head_cannot_be_answered_with_a_body_and_ends_nothing(path: Path) -> None:
    async with serving(path):
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(get("/no", "HEAD"))
            with trio.fail_after(HANG_S):
                while await stream.receive_some():
                    pass
        assert (await exchange(path, get("/echo")))[0] == 200


async def test_a_slow_request_is_told_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_REQUEST_S", 0.05)
    async with serving(path) as routes:
        status, (answer,) = await exchange(path, b"POST /echo HTTP/1.1\r\nHost: x\r\n")
        assert (status, answer["exit_code"]) == (408, 2)
        assert not routes.bodies


async def test_a_client_that_goes_before_its_request_is_no_failure(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(path):
        (await trio.open_unix_socket(str(path))).socket.close()
        assert (await exchange(path, get("/echo")))[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_error_in_mid_stream_is_the_last_line(path: Path) -> None:
    async with serving(path):
        status, lines = await exchange(path, get("/lines"))
    assert status == 200
    assert lines == [{"step": 1}, {"step": 2}, {"error": "no third step", "exit_code": 3}]


async def test_a_stream_ends_when_its_client_goes_away(path: Path) -> None:
    async with serving(path) as routes:
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(get("/endless"))
            with trio.fail_after(HANG_S):
                data = b""
                while b"here" not in data:
                    data += await stream.receive_some()
            assert not routes.closed.is_set()
        with trio.fail_after(HANG_S):
            await routes.closed.wait()


async def test_a_stream_ends_when_its_client_does_not_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(path) as routes, await trio.open_unix_socket(str(path)) as stream:
        monkeypatch.setattr(server, "_REQUEST_S", 0.05)
        await stream.send_all(get("/flood"))
        with trio.fail_after(HANG_S):
            await routes.closed.wait()


async def test_the_socket_is_its_owners_and_goes_with_the_server(path: Path) -> None:
    before = os.umask(0o022)
    os.umask(before)
    async with serving(path):
        assert mode_of(path) == 0o600
        after = os.umask(before)
        assert after == before
    assert mode_of(path) is None


async def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    assert mode_of(path) is not None
    async with serving(path):
        assert (await exchange(path, get("/echo")))[0] == 200


@pytest.mark.parametrize("full", [False, True], ids=["answers", "queue-full"])
async def test_a_socket_that_another_process_has_is_left_to_it(path: Path, full: bool) -> None:
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(str(path))
        other.listen(0)
        if full:  # of the backlog: a connection that is not taken
            client.connect(str(path))
        with pytest.raises(RefusedError, match="another process answers at the control socket"):
            await serve_http(path, Routes())
        assert mode_of(path) is not None


async def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    await trio.Path(path).write_text("precious")
    with pytest.raises(StateError, match="control socket"):
        await serve_http(path, Routes())
    assert await trio.Path(path).read_text() == "precious"


async def test_a_path_too_long_for_a_socket(path: Path) -> None:
    with pytest.raises(UsageError, match="107 bytes"):
        await serve_http(path.parent / ("x" * 108), Routes())
