"""`python -m paretune` and the `paretune` command."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        from paretune.cli.app import run
    except KeyboardInterrupt:  # while the imports run, nobody else catches it
        return 130
    except ModuleNotFoundError as error:  # the command line itself stands on packages
        from paretune.errors import missing_package

        print(f"paretune: error: {missing_package(error)}", file=sys.stderr)
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
