"""A bench without processes: rows of known ratios, so that what a study makes of them can be checked."""

from __future__ import annotations

from made_records import phase, result, row
from paretune.hardware import Ceilings

CEILINGS = Ceilings(
    device="cpu",
    kind="native",
    threads=2,
    read_bandwidth=({"bytes": 1 << 28, "threads": 2, "bytes_per_sec": 2e10, "kind": "native", "state": "high"},),
    matrix_rates={"fp32": 1e11},
)
VERDICTS = ("slower", "indistinguishable", "faster")


def fake_bench(folder, configs, **options):
    """A row for every configuration and cell; the baseline's twin too, and one that fails."""
    baseline = options["baseline"]
    names = [name for name, _ in configs]
    rows = []
    for cell, (batch, n_in) in enumerate((b, i) for b in options["batch_sizes"] for i in options["input_lens"]):
        for i, name in enumerate([*names, f"{baseline} again"]):
            role = "baseline" if name == baseline else "twin" if name.endswith(" again") else ""
            sizes = ("weights", "kv_cache", "activation_peak", "rss", "rss_peak")
            n_bytes = {f"{key}_bytes": 1_000_000 * (10 - i % 10) for key in sizes}
            speedup = 0.7 + 0.3 * (i + cell)
            judged = phase(speedup, speedup - 0.1, speedup + 0.1, VERDICTS[min(2, i + cell)])
            phases = {"throughput": judged, "prefill": judged, "decode": judged}
            if name == "bf16":
                more = {**phases, "throughput": None, "cause": "it crashed"}
            else:
                more = {**phases, "throughput_tokens_per_sec": 100 * speedup}
            rows.append(row(name, role, batch_size=batch, input_len=n_in, **n_bytes, **more))
    return result(rows, CEILINGS)
