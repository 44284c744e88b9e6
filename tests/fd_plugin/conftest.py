# SPDX-License-Identifier: AGPL-3.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from tests.fd_plugin.driving import INTERFACES, Built, Daemon, build


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("sanitized"), sanitized=True)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("released"), sanitized=False)


@pytest.fixture
def daemon(sanitized: Built, tmp_path: Path) -> Daemon:
    return Daemon(sanitized, tmp_path)


@pytest.fixture(params=INTERFACES)
def interface(request: pytest.FixtureRequest) -> int:
    value = request.param
    assert isinstance(value, int)
    return value
