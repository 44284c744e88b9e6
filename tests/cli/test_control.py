# SPDX-License-Identifier: AGPL-3.0-or-later
"""The client of the control socket against a receiver that answers well, badly, or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from replicator.cli import control
from replicator.cli.control import ControlClient, vm_path
from replicator.errors import RefusedError, ReplicatorError, UsageError, WireError
from tests.cli.conftest import KEY, Replctl, write_config
from tests.cli.fake_receiver import CHUNKED, answers, chunk, fake_receiver, lines, says
from tests.limits import HANG_S


async def collect(client: ControlClient) -> list[dict[str, Any]]:
    async with client.stream("/v1/x", {"point": None}) as items:
        return [item async for item in items]


async def test_an_object_is_fetched(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with fake_receiver(path, answers({"vms": []})) as fake:
        assert await ControlClient(path).get("/v1/status") == {"vms": []}
    assert fake.requests == [("GET", "/v1/status", None)]


async def test_lines_arrive_whole_however_they_were_cut(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    items = [{"progress": {"done": 1, "total": 2}}, {"step": "größer\n"}, {"result": {}}]
    async with fake_receiver(path, lines(*items)) as fake:
        assert await collect(ControlClient(path)) == items
    assert fake.requests == [("POST", "/v1/x", {"point": None})]


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        (1, 500, ReplicatorError),
        (2, 400, UsageError),
        (3, 409, RefusedError),
        (9, 500, ReplicatorError),
    ],
)
async def test_an_error_is_raised_as_what_it_was(
    tmp_path: Path, code: int, status: int, kind: type[ReplicatorError]
) -> None:
    path = tmp_path / "c.sock"
    answer = {"error": "no such point", "exit_code": code}
    for reply in (answers(answer, status), lines({"step": "x"}, answer)):
        async with fake_receiver(path, reply):
            with pytest.raises(kind, match=r"^no such point$") as caught:
                await collect(ControlClient(path))
        assert type(caught.value) is kind
        path.unlink()


async def test_a_name_cannot_become_another_request(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with fake_receiver(path, answers({})) as fake:
        await ControlClient(path).get(vm_path("a/../b?x=1 \r\nü", "points"))
    assert fake.requests[0][1] == "/v1/vms/a%2F..%2Fb%3Fx%3D1%20%0D%0A%C3%BC/points"


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "hung up|broke off"),
        (b"220 mail.example ESMTP\r\n\r\n", "broke off"),
        (OK + b"content-length: 9\r\n\r\n{}", "broke off"),
        (OK + b"content-length: 4\r\n\r\noops", "not JSON"),
        (OK + b"content-length: 2\r\n\r\n[]", "not a JSON object"),
        (OK + b"content-length: 1\r\n\r\n\xff", "not JSON"),
        (CHUNKED + chunk(b'{"step": "x"}\n'), "broke off"),
        (CHUNKED + chunk(b'{"step": "x"}') + b"0\r\n\r\n", "ends inside a line"),
        (CHUNKED + chunk(b"nonsense\n") + b"0\r\n\r\n", "not JSON"),
        (CHUNKED + chunk(b'{"error": 7}\n') + b"0\r\n\r\n", "without a reason"),
        (b"HTTP/1.1 404 X\r\ncontent-length: 2\r\n\r\n{}", "without a reason"),
    ],
)
async def test_an_answer_that_is_none_is_said_to_be_so(
    tmp_path: Path, raw: bytes, expected: str
) -> None:
    path = tmp_path / "c.sock"
    client = ControlClient(path)
    async with fake_receiver(path, says(raw)):
        with pytest.raises(WireError, match=expected):
            await (collect(client) if raw.startswith(CHUNKED) else client.get("/v1/status"))


async def test_a_line_and_a_body_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LINE_LENGTH_MAX", 20)
    monkeypatch.setattr(control, "BODY_LENGTH_MAX", 20)
    path = tmp_path / "c.sock"
    for item, fits in (({"step": "01234567"}, True), ({"step": "012345678"}, False)):
        async with fake_receiver(path, lines(item)):
            if fits:
                assert await collect(ControlClient(path)) == [item]
            else:
                with pytest.raises(WireError, match="a line longer than 20 bytes"):
                    await collect(ControlClient(path))
        path.unlink()
        async with fake_receiver(path, answers(item)):
            if fits:
                assert await ControlClient(path).get("/") == item
            else:
                with pytest.raises(WireError, match="longer than 20 bytes"):
                    await ControlClient(path).get("/")
        path.unlink()


async def test_a_receiver_that_never_answers_is_given_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "c.sock"

    async def silent(_: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with fake_receiver(path, silent):
        with pytest.raises(ReplicatorError, match="did not answer within 60 s"):
            await ControlClient(path).get("/v1/status")
    assert autojump_clock.current_time() >= control.ANSWER_S


async def test_leaving_the_stream_hangs_up(tmp_path: Path) -> None:
    """That is how the receiver learns that an export is not needed any more."""
    path = tmp_path / "c.sock"

    async def endless(stream: trio.SocketStream) -> None:
        await stream.send_all(CHUNKED)
        while True:
            await stream.send_all(chunk(b'{"step": "x"}\n'))

    async with fake_receiver(path, endless) as fake:
        async with ControlClient(path).stream("/v1/x", {}) as items:
            async for _ in items:
                break
        with trio.fail_after(HANG_S):
            await fake.hung_up.wait()


async def test_no_receiver(tmp_path: Path) -> None:
    stale = tmp_path / "stale.sock"
    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(stale))
    for path in (tmp_path / "none.sock", stale):
        expected = rf"no receiver listens at {path} .*start it with replctl receiver$"
        with pytest.raises(ReplicatorError, match=expected) as caught:
            await ControlClient(path).get("/v1/status")
        assert caught.value.exit_code == 1


def receiver_config(tmp_path: Path) -> Path:
    values = {"dr_auth_token": KEY, "control_socket": tmp_path / "c.sock", "state_dir": tmp_path}
    return write_config(tmp_path / "replicator.conf", values)


@pytest.mark.parametrize(
    "words", [("status",), ("points", "web"), ("verify", "web"), ("failover", "undo", "web")]
)
def test_without_a_receiver_every_command_says_how_to_start_it(
    tmp_path: Path, replctl: Replctl, words: tuple[str, ...]
) -> None:
    done = replctl("--config", receiver_config(tmp_path), *words)
    assert done.code == 1
    assert re.fullmatch(
        r"replctl: no receiver listens at [^\n]*/c\.sock [^\n]* replctl receiver\n", done.err
    )


GOOD = {"point": 3, "good": True, "bytes_read": 2048, "damages": [], "map_faults": []}
DAMAGE = {
    "point": 3,
    "disk": "disk-0",
    "offset": 65536,
    "length": 65536,
    "file": "/x\x1b[2J",
    "reason": "digest",
}
BAD = {
    "point": 3,
    "good": False,
    "bytes_read": 9,
    "damages": [DAMAGE],
    "map_faults": ["level 1 page 0"],
}
TESTED = {
    "vm": "web", "point": 2, "clone": "c1", "running": True, "booted": True, "console": "login:", "console_s": 4.25, "reason": None,
    "disks": [{"disk": "disk-0", "size": 1024, "nbd": "/run/a.sock", "overlay": "/clones/a.qcow2"}],
}  # fmt: skip
UNBOOTED = {
    **TESTED, "running": False, "booted": False, "console": None, "console_s": None, "reason": "no QEMU here",
}  # fmt: skip
SILENT = {**UNBOOTED, "running": True, "reason": "nothing on its serial console within 60 s"}


async def ask(
    tmp_path: Path, replctl: Replctl, result: object, *words: str
) -> tuple[Any, list[Any]]:
    """A command against a receiver whose answer is known: for a person and in JSON."""
    config = receiver_config(tmp_path)
    progress = {"progress": {"done": 1024, "total": 2048}}
    reply = lines(progress, {"step": "making the clone"}, {"result": result})
    async with fake_receiver(tmp_path / "c.sock", reply) as fake:
        person = await trio.to_thread.run_sync(lambda: replctl("--config", config, *words))
        machine = await trio.to_thread.run_sync(
            lambda: replctl("--json", "--config", config, *words)
        )
    assert json.loads(machine.out) == result
    assert machine.code == person.code
    assert fake.requests[0] == fake.requests[1]
    return person, [fake.requests[0][1], fake.requests[0][2]]


async def test_verify_of_a_good_point(tmp_path: Path, replctl: Replctl) -> None:
    done, request = await ask(tmp_path, replctl, GOOD, "verify", "web")
    assert (done.code, done.out) == (0, "recovery point 3 of web is good: 2.0 KiB read\n")
    assert "verify: 50 % of 2.0 KiB" in done.err
    assert request == ["/v1/vms/web/verify", {"point": None}]


async def test_verify_of_a_damaged_point_fails_and_names_the_place(
    tmp_path: Path, replctl: Replctl
) -> None:
    done, request = await ask(tmp_path, replctl, BAD, "verify", "web", "--point", "3")
    assert done.code == 1
    assert "point 3: disk-0, 65536 bytes at 65536: digest (/x" in done.out
    assert "map: level 1 page 0\n" in done.out
    assert "\x1b" not in done.out
    assert done.err.splitlines()[-1] == "replctl: recovery point 3 of web is damaged (2 findings)"
    assert request == ["/v1/vms/web/verify", {"point": 3}]


async def test_one_finding_is_one(tmp_path: Path, replctl: Replctl) -> None:
    done, _ = await ask(tmp_path, replctl, {**BAD, "map_faults": []}, "verify", "web")
    assert done.err.endswith("is damaged (1 finding)\n")


async def test_failover_test_tells_steps_and_the_first_console_line(
    tmp_path: Path, replctl: Replctl
) -> None:
    done, request = await ask(tmp_path, replctl, TESTED, "failover", "test", "web", "--point", "2")
    assert done.code == 0
    assert "making the clone" in done.err
    assert "disk-0: 1.0 KiB, NBD at /run/a.sock, writes in /clones/a.qcow2\n" in done.out
    assert (
        "clone c1 of web at recovery point 2: booted, first console line after 4.2 s: login:\n"
        in done.out
    )
    assert request == ["/v1/vms/web/failover/test", {"point": 2}]


async def test_failover_test_without_a_boot_says_why(tmp_path: Path, replctl: Replctl) -> None:
    done, _ = await ask(tmp_path, replctl, UNBOOTED, "failover", "test", "web")
    assert "not booted: no QEMU here" in done.out


async def test_failover_test_of_a_silent_guest_says_that_it_runs(
    tmp_path: Path, replctl: Replctl
) -> None:
    done, _ = await ask(tmp_path, replctl, SILENT, "failover", "test", "web")
    assert done.code == 0
    assert "running, but nothing on its serial console within 60 s\n" in done.out


async def test_failover_undo(tmp_path: Path, replctl: Replctl) -> None:
    done, request = await ask(
        tmp_path, replctl, {"vm": "web", "clone": "c1"}, "failover", "undo", "web"
    )
    assert (done.code, done.out) == (0, "clone c1 of web is removed\n")
    assert request == ["/v1/vms/web/failover/undo", {}]


async def test_an_answer_without_a_result_is_an_error(tmp_path: Path, replctl: Replctl) -> None:
    config = receiver_config(tmp_path)
    async with fake_receiver(tmp_path / "c.sock", lines({"step": "x"})):
        done = await trio.to_thread.run_sync(
            lambda: replctl("--config", config, "failover", "undo", "web")
        )
    assert done.code == 1
    assert done.err.endswith("replctl: the receiver's answer ended without a result\n")
