# SPDX-License-Identifier: AGPL-3.0-or-later
"""What docs/eventstore.md shows works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```$",
    (ROOT / "docs" / "eventstore.md").read_text(),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize("number", range(3))
def test_an_example(tmp_path: Path, number: int) -> None:
    assert len(EXAMPLES) == 3
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXAMPLES[number]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        timeout=HANG_S,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "events" / "data.mdb").exists()
