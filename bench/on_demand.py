# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m bench.on_demand CONFIG`: what `replctl run` is between two cycles, but each cycle begins when a line comes in.

It answers each line with one of JSON: ``point``, ``bytes_pushed``, and ``committed_at_us``, when this side had recorded what the
receiver has committed; and one before the first line, when it is ready.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import trio

from replicator.cli.pushing import Host
from replicator.config import load
from replicator.push.plan import Want
from replicator.state_dir import open_state_dir


async def _serve(host: Host) -> None:
    requests = trio.lowlevel.FdStream(os.dup(0))
    async with requests, host.pusher(Want.RUN) as (pusher, log):
        _say({})
        async for received in requests:
            assert received == b"\n"
            outcome = await pusher.push(Want.RUN)
            vm = next(vm for vm in log.vms if vm.newest == outcome.point)
            _say(
                {
                    "point": outcome.point.number,
                    "bytes_pushed": outcome.point.bytes_pushed,
                    "committed_at_us": round(vm.modified_on.timestamp() * 1_000_000),
                }
            )


def _say(answer: dict[str, int]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    config = load(Path(sys.argv[1]))
    with open_state_dir(config.state_dir):
        trio.run(_serve, Host(config))
