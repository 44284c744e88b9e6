# SPDX-License-Identifier: AGPL-3.0-or-later
"""The `replicator-backend` command: the process that a Bacula file daemon will start.

With `--standalone` it runs the same command line as `replctl`, so that everything it does can be
exercised without Bacula. Must not load the product before it knows that it is needed: it is started
once a job, and a wrong call has to fail at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from replicator import __version__

USAGE_EXIT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; ``arguments`` are those of the process unless given. Returns the exit code.

    `--standalone COMMAND …` gives the exit code of `replctl COMMAND …`. Everything else but
    `--version` is refused with one line on stderr and exit code 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        sys.stdout.write(f"replicator-backend {__version__}\n")
        return 0
    if given[:1] == ["--standalone"]:
        from replicator.cli.main import main as replctl  # noqa: PLC0415 - see the module's docstring

        return replctl(given[1:])
    sys.stderr.write(
        f"replicator-backend: version {__version__} does not speak Bacula's backend protocol yet; "
        "use `replicator-backend --standalone COMMAND …`\n"
    )
    return USAGE_EXIT
