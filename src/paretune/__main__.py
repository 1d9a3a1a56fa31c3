"""`python -m paretune` and the `paretune` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        from paretune.cli.app import run
    except KeyboardInterrupt:  # while the imports run, nobody else catches it
        return 130
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
