"""`paretune profile`: where the time of a step goes, and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.model_help import MODEL_OR_PLAN

if TYPE_CHECKING:
    pass

_PHASES = "prefill,decode"


def profile(
    model: Annotated[str, typer.Argument(help=MODEL_OR_PLAN)] = "pocket",
    phase: Annotated[str, typer.Option(help="prefill, decode, train, comma-separated.")] = _PHASES,
    input_len: Annotated[int, typer.Option(help="Prompt tokens; a decode step comes after them.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    config: Annotated[
        str | None, typer.Option(help="Name or recipe file. [default: baseline; of a plan: plan]")
    ] = None,
    runner: Annotated[str | None, typer.Option(help="eager, compile or native. [default: the config's]")] = None,
    device_profile: Annotated[
        str | None, typer.Option(help="t4, a100, h100, h200, laptop-cpu: predict for that device, run nothing.")
    ] = None,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Predict the time per output token on this machine; the model is not loaded."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter blocks.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: physical cores]")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the prompt and of the order of slices.")] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder for report.html, profile.json, roofline.png and traces."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Takes a step apart: time, bytes, arithmetic of each part and kernel against measured ceilings, and says why."""
    import json

    from paretune import hardware
    from paretune.engine import session
    from paretune.errors import UsageError
    from paretune.files import ensure_folder, write_json, write_text
    from paretune.measure import profile_trace
    from paretune.measure.profile import profile as measure
    from paretune.measure.profile_steps import check_memory, check_phase
    from paretune.model import checkpoint
    from paretune.report import profile as report

    for flag, value in (("--input-len", input_len), ("--batch-size", batch_size), ("--threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}", "It has to be 1 or more")
    phases: list[Any] = list(dict.fromkeys(part.strip() for part in phase.split(",") if part.strip()))
    if not phases:
        raise UsageError("--phase is empty", "Give prefill, decode or train")
    if predict or device_profile is not None:
        given = {"--config": config, "--runner": runner, "--output-dir": output_dir}
        unused = [flag for flag, value in given.items() if value is not None]
        if unused or phase != _PHASES:
            flag = [*unused, "--phase"][0]
            raise UsageError(f"a prediction takes no {flag}", "Leave it out: the table has every case it can predict")
    opened = session.open(model, config, runner=runner)
    folder, name, recipe = opened.folder, opened.config, opened.recipe
    for one in phases:
        check_phase(one, recipe, name)
    if device_profile is not None:
        if predict:
            raise UsageError("--predict is about this machine, --device-profile about another", "Pass one of them")
        _predict(model, folder, device_profile, input_len, batch_size, json_output)
        return
    hardware.check_device(device, "Use --device cpu, or plan with --device-profile")
    shape = checkpoint.read_config(folder)
    if input_len + ("prefill" not in phases or len(phases) > 1) > shape.n_positions:
        raise UsageError(
            f"{input_len} input tokens and one more exceed the context of {shape.n_positions}",
            "Choose a smaller --input-len",
        )
    if predict:
        if device != "cpu" or batch_size != 1:
            raise UsageError("--predict knows one sequence on a CPU", "Leave out --device and --batch-size")
        _predict_here(model, folder, input_len, threads, quick, json_output, quiet)
        return
    for one in phases:
        check_memory(shape, one, input_len, batch_size, recipe)
    out = None if output_dir is None else ensure_folder(output_dir.expanduser())
    say = (lambda line: None) if quiet else _say
    results: list[dict[str, Any]] = []
    ceilings: Any = None
    for one in phases:
        result, trace = measure(
            folder,
            recipe,
            name,
            phase=one,
            input_len=input_len,
            batch_size=batch_size,
            device=device,
            threads=threads,
            quick=quick,
            seed=seed,
            with_trace=out is not None,
            ceilings=ceilings,
            say=say,
        )
        ceilings = hardware.Ceilings.from_json(result["ceilings"])
        if checkpoint.is_named(model):
            result["model"]["name"] = model
        results.append(result)
        if out is not None and trace is not None:
            profile_trace.write(out, f"trace-{one}", trace)
    if out is not None:
        write_json(out / "profile.json", {"schema_version": results[0]["schema_version"], "profiles": results})
        write_text(out / "profile.md", report.markdown(results))
        report.write(out, results)
    if json_output:
        print(json.dumps(results if len(results) > 1 else results[0], indent=2, allow_nan=False))
    else:
        print(report.markdown(results), end="")
    if out is not None and not quiet:
        _say(f"written: {out}")


def _predict(model: str, folder: Path, device: str, input_len: int, batch_size: int, json_output: bool) -> None:
    import json

    from paretune.hardware.devices import REAL_SHARE, device_profile
    from paretune.measure import environment, predict
    from paretune.model import checkpoint
    from paretune.report.tables import Column, to_markdown

    known = device_profile(device)
    rows = predict.predict(checkpoint.read_config(folder), known, input_len, batch_size)
    said = predict.findings(known, rows)
    if json_output:
        result = {**environment.header(), "model": {"name": model}, "device_profile": known.name, "is_prediction": True}
        print(json.dumps({**result, "rows": rows, "findings": said}, indent=2, allow_nan=False))
        return
    print(f"# {model} on {known.title}: a prediction, nothing was run\n")
    print(
        f"From the data sheet ({known.bandwidth / 1e9:.0f} GB/s, of which {REAL_SHARE:.0%} are reckoned with) and an "
        f"assumed {known.operator_sec * 1e6:g} us an eager operator, {known.graph_sec * 1e6:g} us in a graph.\n"
    )
    columns = [
        Column("phase", "Phase"),
        Column("dtype", "Weights"),
        Column("form", "Launched as"),
        Column("predicted_sec", "Predicted time"),
        Column("roofline_sec", "Roofline alone"),
        Column("bound_by", "Bound by"),
        Column("speedup", "Gain", lambda r: f"{r['speedup']:.2f}x"),
        Column("note", "Remark", lambda r: "; ".join(t for t in ("" if r["fits"] else "does not fit", r["note"]) if t)),
    ]
    print(to_markdown(rows, columns))
    print("\n".join(f"- Prediction: {sentence}." for sentence in said))


def _predict_here(
    model: str, folder: Path, input_len: int, threads: int | None, quick: bool, json_output: bool, quiet: bool
) -> None:
    import json

    from paretune.measure import environment, predict_here
    from paretune.model import checkpoint
    from paretune.report.tables import Column, to_markdown
    from paretune.report.units import format_sec

    config = checkpoint.read_config(folder)
    runners = ["baseline"] if quick else list(predict_here.CALIBRATED)  # the compiler takes most of the time
    say = (lambda line: None) if quiet else _say
    ceilings, models, others = predict_here.calibrate(threads=threads, runners=runners, say=say)
    rows = predict_here.predict_here(config, input_len + 1, ceilings, models)
    if json_output:
        result = {**environment.header(), "model": {"name": model}, "is_prediction": True, "input_len": input_len}
        print(
            json.dumps(
                {**result, "busy": others, "ceilings": ceilings.to_json(), "rows": rows}, indent=2, allow_nan=False
            )
        )
        return
    print(f"# {model} on this machine: a prediction, the model was not loaded\n")
    columns = [
        Column("config", "Config", numeric=False),
        Column("predicted_tpot_sec", "Predicted TPOT"),
        Column("range_sec", "Fast to slow moments", lambda r: " to ".join(format_sec(sec) for sec in r["range_sec"])),
        Column("predicted_tokens_per_sec", "Tokens/s", lambda r: f"{r['predicted_tokens_per_sec']:,.0f}"),
        Column("roofline_sec", "Roofline alone"),
        Column("bytes", "Bytes a step"),
        Column("rests_on", "Rests on", numeric=False),
        Column("fits", "Memory", lambda r: "fits" if r["fits"] else "does not fit", numeric=False),
    ]
    print(to_markdown(rows, columns))
    print(f"- One sequence after {input_len} tokens. The native rows are the least that their bytes take.")
    print(
        "- Fast to slow moments: as what a row rests on varied while it was measured (steps of the embedded model, "
        "10th to 90th percentile; bandwidth, best to worst)."
    )
    if others:
        print(f"- Busy machine: {' and '.join(others)}. These are predictions for a machine as busy as that.")
    if quick:
        print("- --quick leaves `compile` out: compiling the model that it is calibrated on takes most of the time.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
