# SPDX-License-Identifier: AGPL-3.0-or-later
"""A command run in this process: what it answered, what it said, how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from replicator.cli.main import main

KEY = "ab" * 32


@dataclass(frozen=True, slots=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Replctl = Callable[..., Done]


@pytest.fixture
def replctl(capsys: pytest.CaptureFixture[str]) -> Replctl:
    """Run ``replctl`` with these words."""

    def run(*words: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


def write_config(path: Path, values: Mapping[str, object], *, mode: int = 0o600) -> Path:
    path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()))
    path.chmod(mode)
    return path


def source_values(folder: Path, **values: object) -> dict[str, object]:
    """A source that could push, but for the values given; None leaves a key out."""
    image = folder / "a.raw"
    image.write_bytes(bytes(70000))
    whole: dict[str, object] = {
        "source": "image",
        "vm": "web",
        "image_disks": f"disk-0={image}",
        "dr_host": "127.0.0.1",
        "dr_port": 9,
        "dr_auth_token": KEY,
        "state_dir": folder / "state",
        **values,
    }
    return {key: value for key, value in whole.items() if value is not None}
