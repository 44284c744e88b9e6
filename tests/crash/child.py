# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs trials, one after the other: reads one JSON request a line, answers each with a line.

A trial needs two or three short-lived processes. They are forked from this one, which has imported everything, and has
opened no log and run no event loop itself. It holds the listening socket, so that a source that finds the receiver dead
waits in the socket's queue for the next one, not for a time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import trio

from replicator.config import check
from replicator.domain.model import Point
from replicator.push.journal import PushEntry
from replicator.wire import messages
from replicator.wire.handshake import ClientHandshake, ServerHandshake
from replicator.wire.keys import Keyring, PreSharedKey
from tests.crash import sides
from tests.crash.scenario import (
    PHASES,
    Layout,
    Phase,
    copy_state,
    empty_template,
    forget_source,
    read_points,
    write_images,
    write_points,
)
from tests.limits import HANG_S
from tests.sites import TOKEN

#: Longer than a side's own limit, which says more.
ALARM_S = HANG_S + 20
#: Kill the source at the first acknowledgement instead of a step.
ON_ACK = -1


class Request(msgspec.Struct, frozen=True):
    """One trial, or (``phase`` None) the making of all templates below ``base``. ``step`` 0 kills nobody."""

    base: str
    work: str
    phase: Phase | None = None
    side: str = "receiver"
    step: int = 0
    apply: bool = True
    clones: bool = False


class Answer(msgspec.Struct, frozen=True):
    """``killed``: before which step; None if the side had fewer. ``error``: what did not hold; None if all did."""

    killed: str | None
    error: str | None
    #: Where sessions after the kill went on, as positions in the streams.
    resumed: list[list[int]] = []


class TrialError(Exception):
    """What did not hold."""


@dataclass(slots=True)
class Trial:
    """Both sides in ``folder``, which holds a copy of a template."""

    request: Request
    folder: Path
    phase: Phase
    listener: socket.socket
    end: tuple[int, int] = field(default_factory=os.pipe)
    count: int = 0

    @property
    def note(self) -> Path:
        """Where the killed process says what it was about to do."""
        return self.folder / "killed"

    @property
    def stage(self) -> sides.Stage:
        """What both sides are given."""
        return sides.Stage(self.folder, Layout(Path(self.request.base)), self.phase)

    def receiver(self, killed: bool) -> tuple[int, Path]:
        """Start a receiver; ``killed`` if it is the one to be killed."""
        apply = "yes" if self.request.apply else "no"
        run = partial(sides.run_receiver, self.stage, self.listener, self.end[0], apply)
        return self._fork("receiver", run, killed)

    def source(self, killed: bool) -> tuple[int, Path]:
        """Start a source."""
        port = self.listener.getsockname()[1]
        kill = sides.Kill(self.request.step, self.note)
        on_ack = killed and self.request.step == ON_ACK
        run = partial(
            sides.run_source,
            self.stage,
            port,
            (lambda: kill.now("acknowledgement")) if on_ack else lambda: None,
        )
        return self._fork("source", run, killed)

    def _fork(self, name: str, run: Callable[[], Any], killed: bool) -> tuple[int, Path]:
        self.count += 1
        report = self.folder / f"{self.count}-{name}.json"
        pid = os.fork()
        if pid == 0:
            self._side(run, report, killed)
        return pid, report

    def _side(self, run: Callable[[], Any], report: Path, killed: bool) -> NoReturn:
        code = 1
        signal.alarm(ALARM_S)
        log = os.open(report.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(fd, target)
        try:
            sides.shrink_limits(self.request.clones)
            if killed:
                sides.Kill(self.request.step, self.note).install()
            report.write_text(json.dumps(trio.run(_limited, run)))
            code = 0
        except BaseException:  # noqa: BLE001 -- whatever it is, the trial has failed and says so
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


async def _limited(run: Callable[[], Any]) -> Any:
    with trio.fail_after(HANG_S):
        return await run()


def _reap(*wanted: int) -> tuple[int, int]:
    """Wait for one of our processes; its id and how it ended, as in subprocess."""
    pid, status = os.wait()
    assert pid in wanted
    return pid, os.waitstatus_to_exitcode(status)


def _result(report: Path, code: int) -> Any:
    if code != 0:
        text = report.with_suffix(".log").read_text()
        raise TrialError(f"{report.stem} ended with {code}:\n{text}")
    return json.loads(report.read_text())


def _run_both(trial: Trial) -> tuple[Any, Any]:
    """The reports of the receiver and the source that saw the end; whoever is killed is started again."""
    killed_side = trial.request.side if trial.request.step else ""
    receiver, receiver_report = trial.receiver(killed_side == "receiver")
    source, source_report = trial.source(killed_side == "source")
    running = {receiver, source}
    try:
        while running:
            pid, code = _reap(*running)
            running.discard(pid)
            was_killed = code == -signal.SIGKILL and trial.note.exists() and killed_side != ""
            if was_killed:
                killed_side = ""
            if pid == receiver:
                if not was_killed:
                    _result(receiver_report, code)
                    assert source not in running
                    continue
                receiver, receiver_report = trial.receiver(False)
                running.add(receiver)
            elif was_killed:
                if trial.request.step == ON_ACK:
                    return None, None
                source, source_report = trial.source(False)
                running.add(source)
            else:
                _result(source_report, code)
                os.write(trial.end[1], b"e")  # the receiver settles and ends
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return _result(receiver_report, 0), _result(source_report, 0)


def _trial(request: Request, phase: Phase, keep: Path | None = None) -> Answer:
    folder = Path(request.work)
    layout = Layout(Path(request.base))
    copy_state(layout.template(phase), folder)
    before = read_points(folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        trial = Trial(request, folder, phase, listener)
        error, source = None, None
        try:
            receiver, source = _run_both(trial)
            if source is not None:
                _compare(receiver, source, before, trial.note.exists() and request.side == "source")
                given_up = 1 if phase is Phase.ABANDON else 0
                assert len(source["abandoned"]) == given_up, source["abandoned"]
        except (TrialError, AssertionError) as failure:
            error = "".join(traceback.format_exception_only(failure))
        finally:
            for fd in trial.end:
                os.close(fd)
    killed = trial.note.read_text() if trial.note.exists() else None
    if keep is not None and error is None:
        numbers = [] if source is None else [number for number, *_ in source["commits"]]
        _keep(folder, keep, before | dict.fromkeys(set(numbers) - before.keys(), phase))
    if error is None or keep is not None:
        shutil.rmtree(folder)
    resumed = source["begun"] if source is not None and killed is not None else []
    return Answer(killed, error, resumed)


def _compare(receiver: Any, source: Any, before: dict[int, Phase], source_killed: bool) -> None:
    """What the two logs say of each other, and of what they said before."""
    here, there = receiver["commits"], source["commits"]
    numbers = [number for number, *_ in here]
    assert numbers == list(range(1, len(numbers) + 1)), f"committed: {numbers}"
    assert here[: len(receiver["started"])] == receiver["started"], (
        "the receiver's log was rewritten"
    )
    assert here[-len(there) :] == there, (
        f"the logs differ: {here} at the receiver, {there} at the source"
    )
    assert source["pushed"] == there[-1]
    if source["before"] is not None:
        assert source["before"] in here
    new = len(here) - len(before)
    if not source_killed:
        assert new == 1, f"{new} points for one push"
        return
    # The next process makes a point of its own only if the one before had settled its own as committed.
    had = source["before"] is not None and source["before"][0] > len(before)
    assert new == (2 if had else 1), f"{new} points"
    if source["unsettled"] not in (None, *source["abandoned"]) and not had:
        assert source["pushed"][1] == source["unsettled"], "planned anew instead of resumed"


def _keep(folder: Path, template: Path, points: dict[int, Phase]) -> None:
    template.mkdir(parents=True)
    for side in ("receiver", "source"):
        os.rename(folder / side, template / side)
    write_points(template, points)


def _prepare(request: Request) -> Answer:
    """Make images and templates: each phase without a kill is the template of the next."""
    layout = Layout(Path(request.base))
    write_images(layout)
    empty_template(layout.template(PHASES[0]))
    for phase, following in pairwise(PHASES):
        target = layout.template(following)
        answer = _trial(request, phase, keep=target)
        if answer.error is None and following is Phase.ABANDON:
            answer = _half_pushed(request, layout)
        if answer.error is not None:
            return answer
        if following in {Phase.RESEED, Phase.RESYNC}:
            forget_source(target)
    return Answer(None, None)


def _half_pushed(request: Request, layout: Layout) -> Answer:
    """Have a push die in the middle, then change an image that it was reading in place."""
    template = layout.template(Phase.ABANDON)
    settled = template.with_name("settled")
    os.rename(template, settled)
    image = layout.disks(Phase.ABANDON)["disk-1"]
    content = image.read_bytes()
    image.write_bytes(content[::-1])
    half = msgspec.structs.replace(request, side="source", step=ON_ACK)
    copy_state(settled, template)
    answer = _trial(half, Phase.ABANDON, keep=template.with_name("half"))
    shutil.rmtree(template)
    os.rename(template.with_name("half"), template)
    write_points(template, read_points(settled))
    shutil.rmtree(settled)
    image.write_bytes(content)
    return answer


def _warm_up() -> None:
    """Have done once, before any fork, what each process would do again: late imports, decoders, patterns."""
    key = PreSharedKey.from_hex(TOKEN)
    client, server = ClientHandshake(key), ServerHandshake(Keyring([key]))
    server.receive_data(client.receive_data(server.receive_data(client.start())))
    check({"dr_auth_token": TOKEN, "state_dir": "/"})
    for decode in (messages.decode_from_receiver, messages.decode_from_source):
        decode(
            messages.encode(
                messages.Ping() if decode is messages.decode_from_source else messages.Pong()
            )
        )
    for kind in (Point, PushEntry):
        with suppress(msgspec.ValidationError):
            msgspec.convert({}, kind)
    importlib.import_module("lmdb._envid")
    "localhost".encode("idna")
    gc.freeze()


def main() -> None:
    """Answer requests until the input ends."""
    _warm_up()
    for line in sys.stdin.buffer:
        request = msgspec.json.decode(line, type=Request)
        answer = _prepare(request) if request.phase is None else _trial(request, request.phase)
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
