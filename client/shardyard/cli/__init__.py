"""The command line. Exit codes: 0 success, 1 the job did not succeed or a call was refused, 2 wrong usage,
130 stopped by Ctrl-C.

Only the standard library is imported before it is known what is wanted: `shardyard --help` does not wait for gRPC.
"""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich", "yaml")


def main() -> None:
    """The entry point of the `shardyard` command."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"shardyard: the command line needs {', '.join(missing)}; install them with: pip install 'shardyard[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from shardyard.cli.app import run  # Here: without the extra the lines above must still work.

    sys.exit(run(sys.argv[1:]))
