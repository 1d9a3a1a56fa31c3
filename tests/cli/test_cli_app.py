"""The command line as a whole: lazy verbs, one line an error, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paretune.cli import app as cli
from paretune.errors import NoRecipeError, TooNoisyError

VERBS = (
    "tune",
    "generate",
    "bench",
    "peers",
    "eval",
    "profile",
    "study",
    "train",
    "quantize",
    "prune",
    "export",
    "get",
    "new",
    "doctor",
    "ls",
)


@pytest.fixture
def command(capsys, monkeypatch):
    """`command(*arguments) -> (exit code, stdout, stderr)`, in this process, without a traceback."""
    monkeypatch.delenv("PARETUNE_DEBUG", raising=False)

    def call(*arguments: str):
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def one_line(err: str) -> str:
    assert err.count("\n") == 1 and err.startswith("paretune: "), err
    return err


def broken(monkeypatch, error: BaseException) -> None:
    """Makes `ls` raise `error`."""

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr("paretune.cli.ls.collect", fail)


def test_help_lists_the_verbs_and_imports_no_torch():
    code = """
import sys
from paretune.__main__ import main
sys.argv = ["paretune", "--help"]
assert main() == 0
heavy = {"torch", "numpy", "matplotlib", "tokenizers", "safetensors", "rich", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    commands = done.stdout.partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in commands if line.strip()] == list(VERBS)


def test_no_arguments_show_the_help(command):
    code, out, _ = command()
    assert code == 0 and "Commands:" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_in_plain_text(command, verb):
    code, out, err = command(verb, "--help")
    assert code == 0 and f"paretune {verb} [OPTIONS]" in out and not err
    assert "\x1b" not in out, "no colour, so NO_COLOR has nothing to switch off"


def test_version(command):
    import paretune

    assert command("--version") == (0, f"paretune {paretune.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["genrate"], "Did you mean 'generate'?"),
        (["xyzzy"], "unknown command 'xyzzy'"),
        (["generate", "--promt", "a"], "unknown flag '--promt'. Did you mean '--prompt'?"),
        (["--versoin"], "unknown flag '--versoin'. Did you mean '--version'?"),
        (["generate", "-z"], "unknown flag '-z'"),
        (["generate", "--top-k", "x"], "invalid value for '--top-k'"),
        (["generate", "a", "b"], "unexpected extra argument"),
        (["generate", "--prompt"], "--prompt"),
        (["new", "gpt2"], "--output-dir"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(command, arguments, said):
    code, out, err = command(*arguments)
    assert code == 2 and not out
    assert said in one_line(err)


def test_underscores_stand_for_dashes_in_names_only(command):
    code, out, _ = command("generate", "--prompt", "--max_x", "--max_new_tokens", "2", "--no_stream", "--json")
    assert code == 0 and '"prompt": "--max_x"' in out
    assert command("ls", "--js_on")[0] == 2


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (NoRecipeError("nothing meets the bound", "Raise it"), 3, "error: nothing meets the bound. Raise it"),
        (TooNoisyError("too noisy"), 5, "error: too noisy"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "/x/y"), 1, "cannot write /x/y: the disk is full"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
        (ModuleNotFoundError("No module", name="scipy.special"), 1, "the package scipy is not installed. Run `python"),
        (ModuleNotFoundError("No module", name="paretune.nothing"), 1, "internal error (ModuleNotFoundError"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (ZeroDivisionError("so\nlong"), 1, "internal error (ZeroDivisionError: so long). Please report it"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(command, monkeypatch, error, expected, said):
    broken(monkeypatch, error)
    code, out, err = command("ls")
    assert code == expected and not out
    assert said in one_line(err)


def test_a_name_of_thousands_of_characters_is_cut(command):
    code, _, err = command("generate", "a" * 5000, "-p", "x")
    assert code == 1 and len(one_line(err)) < 1100 and "File name too long" in err


def test_debug_shows_the_traceback(capsys, monkeypatch):
    broken(monkeypatch, ZeroDivisionError("x"))
    monkeypatch.setenv("PARETUNE_DEBUG", "1")
    assert cli.run(["ls"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.rstrip().split("\n")[-1].startswith("paretune: error: internal error")


def test_a_full_disk_and_a_closed_pipe_under_stdout():
    program = [sys.executable, "-m", "paretune", "ls"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1 and "the disk is full" in one_line(done.stderr)

    read_end, write_end = os.pipe()
    os.close(read_end)  # before the first byte: what `| head` does sooner or later
    done = subprocess.run(program, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_main_takes_the_arguments_of_the_process(monkeypatch, capsys):
    from paretune.__main__ import main

    monkeypatch.setattr(sys, "argv", ["paretune", "--version"])
    assert main() == 0 and capsys.readouterr().out.startswith("paretune ")


@pytest.mark.parametrize(
    ("package", "verb"), [("typer", "ls"), ("scipy", "bench pocket"), ("gguf", "export pocket -o made.gguf")]
)
def test_a_missing_package_is_one_line(tmp_path, package, verb):
    hide = f"import sys; sys.modules[{package!r}] = None; sys.argv = {['paretune', *verb.split()]}; "
    done = subprocess.run(
        [sys.executable, "-c", hide + "from paretune.__main__ import main; sys.exit(main())"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 1 and not list(tmp_path.iterdir()) and done.stderr.count("\n") == 1
    assert f"the package {package} is not installed. Run `python -m pip install {package}`" in done.stderr
