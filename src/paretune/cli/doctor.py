"""`paretune doctor`: what this machine is, what it can do at most, what is missing and how to get it."""

from __future__ import annotations

import json
from typing import Any

from paretune import hardware, native_build
from paretune.cli.ls import mechanism_lines
from paretune.hardware.abilities import abilities
from paretune.measure import environment
from paretune.measure.roofline import quantity


def doctor(json_output: bool = False, quick: bool = False, model: str | None = None) -> None:
    """Prints the findings to stdout (a page, or JSON), progress to stderr. About 20 s, 5 s when `quick`.

    Args:
        model: also say whether this model fits into the memory.
    """
    wanted = None if model is None else _model_memory(model)  # a wrong name is said before anything is measured
    report = collect(quick) | ({"model": wanted} if wanted else {})
    print(json.dumps(report, indent=2, allow_nan=False) if json_output else page(report))


def collect(quick: bool = False) -> dict[str, Any]:
    """Everything that `doctor` shows, as plain data with the head of a result file. Measures."""
    threads = hardware.set_threads()
    device = "cuda" if hardware.has_cuda() else "cpu"
    report = environment.header()
    report["device"] = device
    report["threads"] = threads
    report["memory"] = {
        "total_bytes": hardware.memory_bytes(),
        "available_bytes": hardware.available_memory_bytes(),
    }
    command = native_build.compiler()
    report["compiler"] = {
        "command": command,
        "version": native_build.compiler_version(command) if command else None,
        "flags": list(native_build.flags()),
        "cache": environment.hide_paths(str(native_build.cache_folder())),
    }
    native_build.say("measuring read bandwidth and matrix rates")
    report["ceilings"] = hardware.ceilings("cpu", quick).to_json()
    native_build.say("trying number formats")
    report["dtype_support"] = {name: s.to_json() for name, s in hardware.dtype_support("cpu").items()}
    if device != "cpu":
        native_build.say("measuring the GPU")
        report["device_ceilings"] = hardware.ceilings(device, quick).to_json()
        report["device_dtype_support"] = {n: s.to_json() for n, s in hardware.dtype_support(device).items()}
    native_build.say("trying mechanisms")
    report["abilities"] = [a.to_json() for a in abilities(device, compile_too=not quick)]
    report["missing"] = missing(device, report["ceilings"]["kind"], report["versions"])
    return report


def _model_memory(name: str) -> dict[str, Any]:
    """Bytes that a model needs in each phase here (128 tokens, batch 1), and those that are free."""
    from paretune.measure import profile_steps
    from paretune.model import checkpoint

    config = checkpoint.read_config(checkpoint.resolve(name))
    n = min(128, config.n_positions - 1)
    needed = {f"{phase}_bytes": profile_steps.needed_bytes(config, phase, n, 1) for phase in profile_steps.PHASES}
    return {"name": name, **needed, "available_bytes": hardware.available_memory_bytes()}


def missing(device: str, probe_kind: str, versions: dict[str, str]) -> list[dict[str, str]]:
    """What is not here, what that costs, and how to get it."""
    found = []
    if reason := native_build.unavailable_reason():
        cure = "install g++ or clang++ (Debian: apt install g++; Fedora: dnf install gcc-c++), or set CXX"
        found.append({"what": "C++ compiler", "why": f"{reason}: no native code", "cure": cure})
    elif probe_kind == "torch":
        try:
            native_build.load("probe")
        except native_build.NativeUnavailable as error:
            found.append({"what": "native code", "why": error.cause, "cure": error.cure})
    if "transformers" not in versions:
        why = "no comparison with Hugging Face's own implementation"
        found.append({"what": "transformers", "why": why, "cure": "pip install 'transformers>=5'"})
    if device == "cpu":
        cure = "on a machine with an NVIDIA GPU, install a CUDA build of PyTorch (pytorch.org/get-started)"
        found.append({"what": "CUDA", "why": "PyTorch sees no GPU: everything runs on the CPU", "cure": cure})
    elif "triton" not in versions:
        found.append({"what": "Triton", "why": "no GPU kernels of our own", "cure": "pip install triton"})
    return found


def page(report: dict[str, Any]) -> str:
    """The report as plain text: it reads the same on a terminal, in a file and in a bug report."""
    machine = report["hardware"]
    memory, compiler, threads = report["memory"], report["compiler"], report["threads"]
    lines = [
        _row("processor", machine["cpu_model"]),
        _row("instruction sets", ", ".join(machine["instruction_sets"]) or "none of interest"),
        _row("system", f"{machine['os']}, fingerprint {machine['id']}"),
        _row("device", report["device"]),
        *(
            _row("GPU", f"{g['name']}, capability {g['capability']}, {_gib(g['memory_bytes'])}")
            for g in machine["gpus"]
        ),
        _row("threads", f"{threads['threads']} of {threads['usable_cores']} usable cores, read back"),
        _row("memory", f"{_gib(memory['available_bytes'])} free of {_gib(memory['total_bytes'])}"),
        _row("load average", _load(report["environment"]["load_average"])),
        _row("caches", f"L2 {_mib(machine['l2_bytes'])} a core, L3 {_mib(machine['l3_bytes'])}"),
        _row("compiler", f"{compiler['command']}: {compiler['version']}" if compiler["command"] else "none"),
        _row("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]
    lines += _ceilings_lines("cpu", report["ceilings"], report["dtype_support"])
    if "device_ceilings" in report:
        lines += _ceilings_lines(report["device"], report["device_ceilings"], report["device_dtype_support"])
    lines += mechanism_lines(report["abilities"], report["device"])
    if "model" in report:
        lines += _model_lines(report["model"])
    lines += ["", "missing" if report["missing"] else "nothing is missing"]
    for item in report["missing"]:
        lines += [f"  {item['what']}: {item['why']}", f"      to get it: {item['cure']}"]
    return "\n".join(lines)


def _ceilings_lines(device: str, ceilings: dict[str, Any], support: dict[str, Any]) -> list[str]:
    rows = ceilings["read_bandwidth"]
    counts = sorted({row["threads"] for row in rows})
    how = {"native": "own streaming sums", "torch": "torch.sum: slower than the machine", "copy": "copies"}
    lines = ["", f"read bandwidth of the {device} by working set ({how[ceilings['kind']]}), GB/s"]
    names = [f"{n} thread{'s' if n > 1 else ''}" if n else "GB/s" for n in counts]
    lines.append(f"  {'size':>9}" + "".join(f"{name:>12}" for name in names) + "   state of the host")
    for size in sorted({row["bytes"] for row in rows}):
        here = {row["threads"]: row for row in rows if row["bytes"] == size}
        cells = "".join(f"{here[n]['bytes_per_sec'] / 1e9:12.1f}" for n in counts)
        states = "/".join(dict.fromkeys(here[n]["state"] for n in counts))
        lines.append(f"  {_mib(size):>9}{cells}   {states}")
    lines += ["", f"matrix products of PyTorch on the {device}, and number formats against fp32"]
    lines.append(f"  {'format':<8}{'rate':>16}{'decode':>9}{'prefill':>9}   remark")
    for name in ("fp32", "bf16", "fp16", "int8"):
        rate = ceilings["matrix_rates"].get(name)
        figure = quantity(rate, "OP/s" if name == "int8" else "FLOP/s") if rate else "none"
        verdict = support.get(name)
        if verdict is None:
            lines.append(f"  {name:<8}{figure:>16}{'':>18}   quantised layers")
            continue
        ratios = f"{verdict['decode_ratio']:8.2f}x{verdict['prefill_ratio']:8.2f}x"
        lines.append(f"  {name:<8}{figure:>16}{ratios}   {_remark(verdict)}")
    lines += [f"  {verdict['reason']}" for name, verdict in support.items() if name != "fp32"]
    if ceilings["fma_rate"]:
        lines.append(f"  fp32 multiply-adds in registers: {quantity(ceilings['fma_rate'], 'FLOP/s')}")
    return lines


def _model_lines(model: dict[str, Any]) -> list[str]:
    lines = ["", f"memory for {model['name']} in fp32, 128 tokens, batch 1 (reckoned from above, nothing was loaded)"]
    for phase in ("prefill", "decode", "train"):
        needed = model[f"{phase}_bytes"]
        fits = "fits" if needed < 0.9 * model["available_bytes"] else "DOES NOT FIT"
        lines.append(f"  {phase:<9}{_gib(needed):>10}   {fits} into {_gib(model['available_bytes'])} free")
    return lines


def _load(load: list[float] | None) -> str:
    if not load:
        return "unknown"
    busy = "; the machine is busy: figures and verdicts below may be off" if load[0] > 0.5 else ""
    return f"{load[0]:.1f} over the last minute{busy}"


def _remark(verdict: dict[str, Any]) -> str:
    if not verdict["works"]:
        return "DOES NOT WORK"
    if verdict["emulated"]:
        return "EMULATED"
    slower = [phase for phase in ("decode", "prefill") if verdict[f"{phase}_ratio"] < hardware.EMULATED_LOSS]
    return f"works, slower {' and '.join(slower)}" if slower else "works"


def _row(name: str, value: str) -> str:
    return f"{name:<18}{value}"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.1f} GiB"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / hardware.MIB:g} MiB" if n_bytes else "unknown"
