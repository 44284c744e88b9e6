# SPDX-License-Identifier: AGPL-3.0-or-later
"""`replctl resync` against a receiver on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import trio

from tests.cli.conftest import Done, Replctl, source_values, write_config
from tests.cli.test_json_contract import promised
from tests.cli.test_pushing import two_sites

GRAIN = 65536


async def test_a_source_that_lost_its_state(tmp_path: Path, replctl: Replctl) -> None:
    async with two_sites(tmp_path) as (source, receiver):

        async def told(*words: str, config: Path = source) -> Done:
            return await trio.to_thread.run_sync(lambda: replctl("--config", config, *words))

        image = tmp_path / "a.raw"
        image.write_bytes(os.urandom(5 * GRAIN))
        assert (await told("resync")).code == 3
        assert (await told("seed")).code == 0
        shutil.rmtree(tmp_path / "state")
        with image.open("r+b") as file:
            file.write(b"changed")
        done = await told("push")
        assert done.code == 3
        assert "replctl resync" in done.err
        done = await told("resync", "web")
        assert done.code == 0, done.err
        assert done.out.startswith(
            "resync of web complete: 320.0 KiB compared, 64.0 KiB differ; recovery point 2, "
        )
        assert "phase=F8.2 mode=resync vm=web" in done.err
        assert (await told("push")).code == 0
        done = await told("--json", "resync")
        result = done.json
        assert (
            result.keys()
            == (promised("PointInfo").keys() | promised("PushResult").keys())
            | promised("ResyncResult").keys()
        )
        assert (result["compared_bytes"], result["differing_bytes"]) == (5 * GRAIN, 0)
        assert (result["kind"], result["point"], result["parent"]) == ("cycle", 4, 3)
        assert (await told("--json", "resync", result["uuid"])).json["point"] == 5
        events = (await told("--json", "history", "web")).json
        assert [event["kind"] for event in events][1:3] == ["disks-compared", "cycle-committed"]
        verified = (await told("--json", "verify", "web", config=receiver)).json
        assert (verified["point"], verified["good"]) == (5, True)


def test_another_vm_is_not_touched(tmp_path: Path, replctl: Replctl) -> None:
    config = write_config(tmp_path / "source.conf", source_values(tmp_path))
    done = replctl("--config", config, "resync", "db")
    assert (done.code, done.out) == (2, "")
    assert "VM: this host pushes web (" in done.err
    assert ", not db; nothing was touched" in done.err
    assert not (tmp_path / "state").exists()


def test_on_a_receiver_it_is_refused(tmp_path: Path, replctl: Replctl) -> None:
    values = source_values(tmp_path, dr_host=None, source=None)
    done = replctl("--config", write_config(tmp_path / "rx.conf", values), "resync")
    assert done.code == 2
    assert "dr_host" in done.err
