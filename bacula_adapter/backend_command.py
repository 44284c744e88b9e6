# SPDX-License-Identifier: AGPL-3.0-or-later
"""The `replicator-backend` command: the process that a Bacula file daemon's plugin starts for a job.

Without arguments it speaks the dialogue of docs/backend-protocol.md over its standard input and output. With `--standalone`
it runs the same command line as `replctl`, so that everything it does can be exercised without Bacula. Loads no more
of the product than the answer to Hello takes: somebody waits for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from replicator import __version__

USAGE_EXIT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; ``arguments`` are those of the process unless given. Returns the exit code.

    `--standalone COMMAND …` gives the exit code of `replctl COMMAND …`. Arguments that are none, and a terminal where the plugin
    should be, are refused with one line on stderr and exit code 2.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        sys.stdout.write(f"replicator-backend {__version__}\n")
        return 0
    if given[:1] == ["--standalone"]:
        from replicator.cli.main import main as replctl  # noqa: PLC0415 - see the module's docstring

        return replctl(given[1:])
    if given or sys.stdin.isatty() or sys.stdout.isatty():
        sys.stderr.write(
            f"replicator-backend {__version__}: started by Bacula's plugin replicator-fd.so, speaks the backend protocol on"
            " standard input and output; by hand: `replicator-backend --standalone COMMAND …`, the same as `replctl COMMAND …`\n"
        )
        return USAGE_EXIT
    return _serve()


def _serve() -> int:
    import trio  # noqa: PLC0415 - see the module's docstring

    from bacula_adapter.backend.dispatch import Product  # noqa: PLC0415 - the same
    from bacula_adapter.backend.session import converse  # noqa: PLC0415 - the same

    # The pipes are the dialogue's alone: what a library prints must not get in between, nor a child read from them.
    plugin_in, plugin_out = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return trio.run(converse, plugin_in, plugin_out, Product())


if __name__ == "__main__":
    sys.exit(main())
