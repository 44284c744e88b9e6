# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl status` of a source: its own log, and what the process that pushes says of itself."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import trio

from replicator.cli.showing import _status
from replicator.config import check
from replicator.control.server import NotFoundError, serve_http
from replicator.domain.model import PushKind
from replicator.domain.views import push_info
from replicator.log import open_log
from tests.domain.samples import point
from tests.limits import HANG_S

PUSH = push_info(2, "cycle", 1_700_000_000_000_000, done=1, total=2, sent=3)


async def test_the_push_under_way_is_that_of_the_process_that_answers(tmp_path: Path) -> None:
    answers: list[dict[str, Any]] = []

    async def handle(method: str, target: str, _: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        assert (method, target) == ("GET", "/v1/push")
        if not answers:
            raise NotFoundError("an older process has no such route")
        return answers.pop()

    with TemporaryDirectory(dir="/tmp") as short, trio.fail_after(HANG_S):
        values = {"state_dir": str(tmp_path), "dr_host": "dr.example", "vm": "web"}
        config = check({**values, "control_socket": f"{short}/c.sock"})
        async with open_log(tmp_path / "events") as log:
            for number, name in enumerate(("web", "old", "wbe")):
                await log.register(UUID(int=number + 1), name, "source")
            async with log.change(UUID(int=2)) as vm:
                vm.commit(point(1, PushKind.SEED))

        async def shown() -> dict[str, Any]:
            return {vm["vm"]: vm["push"] for vm in await _status(config, None)}

        # One that never had a point, and is not the one that is configured, is not spoken of.
        nothing = {"web": None, "old": None}
        assert await shown() == nothing
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_http, config.control_path, handle)
            assert await shown() == nothing
            answers.append({"vm": "web", "push": PUSH})
            assert await shown() == {**nothing, "web": PUSH}
            answers.append({"vm": "", "push": None})
            assert await shown() == nothing
            nursery.cancel_scope.cancel()
        assert {vm["vm"] for vm in await _status(config, 2**51)} == {"web", "old"}
