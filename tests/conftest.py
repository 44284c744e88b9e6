# SPDX-License-Identifier: AGPL-3.0-or-later
"""What holds for every test: none is skipped, and examples are the same in every run."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

# Fixed examples and no deadline: a test's outcome depends on neither luck nor the machine's load.
hypothesis.settings.register_profile(
    "replctl",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("replctl")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure: a green run means that everything was tested."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = call.excinfo.value if call.excinfo else "no reason given"
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} was skipped ({reason}); tests are never skipped: "
            "what they need is installed by scripts/setup"
        )
    return report


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command sets up logging for its process; here the process is the tests'."""
    names = [None, "eventstore", "replicator", "receiver", "bacula_adapter"]
    levels = {name: logging.getLogger(name).level for name in names}
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
