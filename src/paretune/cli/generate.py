"""`paretune generate`: continues prompts with a model, a hub id, a plan, or `pocket`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.model_help import MODEL_OR_PLAN

if TYPE_CHECKING:
    from paretune.engine.generate import GenerateResult
    from paretune.engine.load import Loaded
    from paretune.model.prompt import PromptFormat
    from paretune.recipe import Recipe

DEFAULT_NEW_TOKENS = 50
MAX_SEED = 2**32 - 1


def generate(
    model: Annotated[str, typer.Argument(help=MODEL_OR_PLAN)] = "pocket",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to continue; repeat it for a batch.")
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="File with one more prompt (its last newline is dropped); - is stdin.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to add at most. [default: 50; of --task, as recorded with the model]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set that reaches this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this share as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens seen get less likely.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Of the sampling; drawn and shown when not given.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer, not shown; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    task: Annotated[
        str | None,
        typer.Option(help="summarization: each prompt is an article, put into the model's recorded prompt format."),
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(
            help="Of a plan with a table of forms by regime, which of them may run: plan (the numbers of its recipe), "
            "lossless, or bounded (any within its bound). [default: plan]"
        ),
    ] = None,
    spare_memory: Annotated[
        str | None,
        typer.Option(help="For a second copy of a plan's weights, if its table has a form that needs one, e.g. 200MB."),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="What proposes tokens: auto, off, lookup, suffix, draft=MODEL, self=int4 or exit=N; the text is the "
            "same. [default: the recipe's, else off]"
        ),
    ] = None,
    draft_tokens: Annotated[
        int | None, typer.Option(help="Proposed tokens of a step at most. [default: 15, fewer where that pays]")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Preset (`paretune ls`) or recipe file. [default: baseline]")
    ] = None,
    runner: Annotated[str | None, typer.Option(help="eager, compile or native. [default: the recipe's]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads. [default: the recipe's, else physical cores]")
    ] = None,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Print the text once it is complete.")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at an end token.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print timings.")] = False,
) -> None:
    """Continues a prompt, streaming the new text to stdout; what ran and how fast follows on stderr."""
    import json
    import sys

    from paretune import clock
    from paretune.engine import session, speculation
    from paretune.engine.generate import check_request
    from paretune.engine.generate import generate as run
    from paretune.engine.sampling import SamplingOptions
    from paretune.errors import UsageError

    # Everything that can be refused is refused before the weights are read.
    texts = _prompts(prompt or [], prompt_file)
    if stop and not all(stop):
        raise UsageError("--stop is empty", "Pass the text that ends the answer")
    if seed is None and temperature > 0:
        import secrets

        seed = secrets.randbelow(MAX_SEED)
    sampling = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if sampling.greedy and (top_k or top_p < 1 or min_p):
        _say("--top-k, --top-p and --min-p change nothing at temperature 0 (greedy)")
    opened = session.open(model, config, device, threads, runner=runner, is_alone=True)
    spare_bytes = _spare(spare_memory)
    if opened.table is None and (quality is not None or spare_memory is not None):
        what = "--quality and --spare-memory choose among the forms of a plan"
        raise UsageError(f"{what}, and there is no choice here", "Leave them out, or `tune --regimes`")
    opened.set_threads()

    folder, shape, tokenizer = opened.folder, opened.model_config, opened.tokenizer()
    form = _prompt_format(folder, task, chat)
    eos_run = 1 if form is None else form.eos_run
    if max_new_tokens is None:
        max_new_tokens = DEFAULT_NEW_TOKENS if form is None else form.max_new_tokens
    started = clock.now()
    if chat:  # the template writes the special tokens itself
        messages = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
        prompts = [tokenizer.encode(text, special_tokens=False) for text in messages]
    elif form is not None:
        if not all(text.strip() for text in texts):
            raise UsageError("an article is empty", "Pass its text with --prompt or --prompt-file")
        cut = [form.prompt(tokenizer, text, room=max_new_tokens) for text in texts]
        prompts = [ids for ids, _ in cut]
        if n_cut := sum(is_cut for _, is_cut in cut):
            _say(f"{n_cut} of {len(cut)} articles cut to the limit of {form.max_len} tokens")
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    tokenize_sec = clock.now() - started
    check_request(prompts, max_new_tokens, shape.longest, shape.vocab_size)

    if opened.table is not None and quality is not None:
        opened.table.check_level(quality)
    loaded = opened.load()
    forms = opened.forms(loaded, spare_bytes)
    chosen = None
    if forms is not None:
        length = max(map(len, prompts)) + max_new_tokens
        loaded.runner, chosen = forms.runner_for(len(prompts), length, quality or "plan")
        loaded.recipe = forms.table.forms[chosen.form].recipe
    for note in opened.notes():
        _say(note)
    speculator = speculation.for_recipe(loaded.recipe, loaded.runner, loaded.folder, speculate, draft_tokens)

    streaming = len(prompts) == 1 and not no_stream and not json_output

    def show(_row: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        result = run(
            loaded.runner,
            prompts,
            max_new_tokens,
            sampling,
            tokenizer=tokenizer,
            stop=stop or (),
            ignore_eos=ignore_eos,
            eos_run=eos_run,
            on_text=show if streaming else None,
            speculator=speculator,
        )
    finally:
        if streaming:
            print(flush=True)
    ran = _ran(loaded) | ({} if chosen is None else {"chosen": chosen.to_json()})
    if speculator is not None:
        ran["speculation"] = speculator.report()
    if json_output:
        print(json.dumps(_object(texts, result, loaded.recipe, ran, tokenize_sec, seed), indent=2, allow_nan=False))
    elif not streaming:
        for i, generation in enumerate(result.generations):
            if len(texts) > 1:
                print(f"--- prompt {i + 1} of {len(texts)}: {_short(texts[i])}")
            print(generation.text)
    if not quiet:
        if chosen is not None:
            _say(f"chosen by the plan's table: {chosen}")
        _say(_timings(result, ran, tokenize_sec, seed))
        if speculator is not None:
            _say(speculator.summary())


def _prompt_format(folder: Path, task: str | None, chat: bool) -> PromptFormat | None:
    """The format that `--task` asks for: the recorded one, or the default, which is said."""
    from paretune.errors import UsageError
    from paretune.model.prompt import PromptFormat

    recorded = PromptFormat.read(folder)
    if task is None:
        if recorded is not None and not chat:
            _say("this model was trained on summaries; --task summarization gives the prompt the form that it knows")
        return None
    if task != "summarization":
        raise UsageError(f"unknown task {task!r}", "Known: summarization")
    if chat:
        raise UsageError("--task and --chat both set the form of the prompt", "Pass one of them")
    if recorded is None:
        _say(f"{folder.name} records no prompt format: the article is followed by {PromptFormat().suffix.strip()!r}")
    return recorded or PromptFormat()


def _say(text: str) -> None:
    import sys

    print(f"paretune: {text}", file=sys.stderr, flush=True)


def _prompts(given: list[str], file: str | None) -> list[str]:
    """All prompts, in the order of the flags; the file's comes last.

    Raises:
        UsageError: there is none, or one is empty or no text.
    """
    from paretune.errors import UsageError

    texts = [*given, *([_read_prompt(file)] if file is not None else [])]
    if not texts:
        raise UsageError("there is no prompt", "Pass --prompt TEXT or --prompt-file FILE")
    for text in texts:
        if not text:
            raise UsageError("the prompt is empty", "Pass at least one word with --prompt")
        if any("\ud800" <= c <= "\udfff" for c in text):  # bytes of the command line that are not UTF-8
            raise UsageError("the prompt is not valid UTF-8", "Convert it, or check the terminal's encoding")
    return texts


def _read_prompt(file: str) -> str:
    import sys

    from paretune.errors import ParetuneError, UsageError

    name = "the standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no prompt file {name}", "Check the path") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 (byte {error.start})", "Convert it to UTF-8 first") from None
    except OSError as error:
        raise ParetuneError(f"cannot read {name}: {error.strerror}", "Pass a readable text file") from None
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _spare(text: str | None) -> int:
    from paretune.errors import UsageError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)i?B?", text or "0")
    if match is None:
        raise UsageError(f"--spare-memory is {text!r}", "Write it as 200MB or 1.5GB")
    return int(float(match[1]) * {"": 1, "k": 1 << 10, "M": 1 << 20, "G": 1 << 30}[match[2]])


def _ran(loaded: Loaded) -> dict[str, Any]:
    """What really ran, read back from the loaded model and the runner, not from the flags."""
    import torch

    from paretune.model.layers import Embedding, Linear

    runner = loaded.runner
    layers = [m for m in runner.model.modules() if isinstance(m, Linear | Embedding)]
    return {
        "name": loaded.recipe.name,
        **runner.describe(),
        "compiled": runner.compiled,
        "weight_formats": sorted({m.weight.format for m in layers}),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "device": str(runner.device),
        "threads": torch.get_num_threads(),
    }


def _timings(result: GenerateResult, ran: dict[str, Any], tokenize_sec: float, seed: int | None) -> str:
    timing, tpot = result.timing, result.tpot_sec
    n_new = [len(g.tokens) for g in result.generations]
    n_prompt = [len(g.prompt) for g in result.generations]
    speed = f"TTFT {1e3 * timing.ttft_sec:.1f} ms" + ("" if tpot is None else f", TPOT {1e3 * tpot:.2f} ms")
    compiled = ", compilation included" if ran["compiled"] else ""
    sampled = "" if seed is None else f"; seed {seed}"
    return (
        f"{speed} ({_count(n_new)}{compiled}), prompt {_count(n_prompt)}; "
        f"tokenisation {1e3 * tokenize_sec:.1f} ms apart; ran: {ran['name']} ({', '.join(ran['weight_formats'])} "
        f"weights, {ran['dtype']}, {ran['device']}, {ran['threads']} thread{'s' * (ran['threads'] != 1)}){sampled}"
    )


def _count(numbers: list[int]) -> str:
    return f"{' + '.join(map(str, numbers))} token{'s' if sum(numbers) != 1 else ''}"


def _short(text: str, width: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _object(
    texts: list[str],
    result: GenerateResult,
    recipe: Recipe,
    ran: dict[str, Any],
    tokenize_sec: float,
    seed: int | None,
) -> dict[str, Any]:
    """The result as JSON: always `generations`, and for one prompt its fields at the top too."""
    from paretune.measure import environment

    generations = [
        {
            "prompt": text,
            "text": g.text,
            "tokens": g.tokens,
            "n_prompt_tokens": len(g.prompt),
            "finish_reason": g.finish_reason,
        }
        for text, g in zip(texts, result.generations, strict=True)
    ]
    return {
        **environment.header(seed=seed),
        **(generations[0] if len(generations) == 1 else {}),
        "generations": generations,
        "ttft_sec": result.timing.ttft_sec,
        "tpot_sec": result.tpot_sec,
        "total_sec": result.timing.total_sec,
        "tokenize_sec": tokenize_sec,
        "recipe": recipe.to_dict(),
        "ran": ran,
    }
