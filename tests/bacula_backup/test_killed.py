# SPDX-License-Identifier: AGPL-3.0-or-later
"""A backend is killed -9 before each of its durable steps: what Bacula has is what can be restored, and the chain goes on."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from bacula_adapter.backend.interface import Level
from bacula_adapter.state import folder_of
from tests.bacula_backup.child import Trial
from tests.bacula_backup.lab import GRAIN, ImageVm, image_vm
from tests.crash.scenario import copy_state


class Children:
    """Runs jobs in processes of their own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, vm: ImageVm, level: Level, step: int = 0) -> bool:
        """A job; whether it came to its end. What Bacula has of it then is in the catalogue."""
        info = vm.catalogue.info(level)
        volume = vm.folder / "volume"
        volume.unlink(missing_ok=True)
        trial = Trial(
            config=vm.values,
            name=info.name,
            job_id=info.job_id,
            level=info.level,
            previous=info.previous,
            volume=str(volume),
            step=step,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(trial).decode() + "\n")
        self._process.stdin.flush()
        self._process.stdout.readline()  # its id
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), "the job failed: see what it printed"
        if volume.exists():
            vm.catalogue.keep(info, pickle.loads(volume.read_bytes()))  # noqa: S301 - our own
        return code == 0


@contextmanager
def children() -> Iterator[Children]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bacula_backup.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield Children(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("level", [Level.FULL, Level.INCREMENTAL, Level.DIFFERENTIAL])
def test_killed_before_each_step(level: Level, tmp_path: Path) -> None:
    vm = image_vm(tmp_path, {"disk-0": 20 * GRAIN})
    vm.write("disk-0", 0, os.urandom(GRAIN))
    template = tmp_path / "template"
    killed, fell_back, went_on = 0, 0, 0
    with children() as host:
        assert host.run(vm, Level.FULL)
        vm.write("disk-0", 2 * GRAIN, os.urandom(GRAIN))
        assert host.run(vm, Level.INCREMENTAL)
        copy_state(tmp_path / "state", template)
        before = dict(vm.catalogue.volumes)
        for step in range(1, 1000):
            shutil.rmtree(tmp_path / "state")
            copy_state(template, tmp_path / "state")
            vm.catalogue.volumes = dict(before)
            vm.write("disk-0", 5 * GRAIN, os.urandom(100))
            ended = host.run(vm, level, step)
            if len(vm.catalogue.volumes) > len(before):
                assert vm.catalogue.images() == vm.contents
            killed += not ended
            vm.write("disk-0", 7 * GRAIN, os.urandom(100))
            assert host.run(vm, Level.INCREMENTAL), step
            assert vm.catalogue.images() == vm.contents, step
            kind = (
                vm.catalogue.volumes[next(reversed(vm.catalogue.volumes))]
                .description()
                .disks[0]
                .kind
            )
            fell_back += kind == "full"
            went_on += kind == "delta"
            work = folder_of(vm.catalogue.config, "jobs", "Nightly", vm.uuid)
            assert not list((tmp_path / "state" / "work" / "bacula").glob("*/replctl-*"))
            assert len(list((work / "maps").iterdir())) <= 2
            if ended:
                break
    assert killed > 40
    # Between the verdict and the event lies one window: there, and nowhere else, the next job is a Full.
    assert 0 < fell_back < 12
    assert went_on > 30
