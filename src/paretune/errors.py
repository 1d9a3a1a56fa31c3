"""What the user sees when something is wrong: one line with the cause and the cure, and an exit code.

Invariants of the program are `assert`s; everything that a user, a file or a machine can cause is one of these.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_NO_RECIPE = 3
EXIT_TOO_NOISY = 5
EXIT_INTERRUPTED = 130


class ParetuneError(Exception):
    """A failure that the user can act on.

    Args:
        cause: what is wrong, with the offending value.
        cure: what to do about it.
    """

    exit_code = EXIT_FAILURE

    def __init__(self, cause: str, cure: str = "") -> None:
        self.cause = " ".join(cause.split())
        self.cure = " ".join(cure.split())
        super().__init__(f"{self.cause}. {self.cure}" if self.cure else self.cause)


class UsageError(ParetuneError):
    """A wrong flag, name or value."""

    exit_code = EXIT_USAGE


class CheckpointError(ParetuneError):
    """A model folder that cannot be loaded as it is."""


class WriteError(ParetuneError):
    """A file or folder that cannot be written."""


class NoEffectError(ParetuneError):
    """A transform that did not do what it states (`Transform.verify`): never a row in a table."""


class NotExactError(ParetuneError):
    """A mechanism that claims to be exact and is not."""


class NoRecipeError(ParetuneError):
    """No recipe meets the bound; the best so far has been written."""

    exit_code = EXIT_NO_RECIPE


class TooNoisyError(ParetuneError):
    """The machine is too noisy to judge."""

    exit_code = EXIT_TOO_NOISY


def missing_package(error: ModuleNotFoundError) -> ParetuneError:
    """A dependency that an installation should have brought is not there."""
    package = (error.name or "").partition(".")[0]
    return ParetuneError(f"the package {package} is not installed", f"Run `python -m pip install {package}`")
