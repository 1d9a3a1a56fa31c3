"""A bench without processes: rows of known ratios, so that what a study makes of them can be checked."""

from __future__ import annotations

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
            row = {"config": name, "role": role, "batch_size": batch, "input_len": n_in, "cause": ""}
            sizes = ("weights", "kv_cache", "activation_peak", "rss", "rss_peak")
            row |= {f"{key}_bytes": 1_000_000 * (10 - i % 10) for key in sizes}
            speedup = 0.7 + 0.3 * (i + cell)
            row["throughput_tokens_per_sec"] = 100 * speedup
            for phase in ("throughput", "prefill", "decode"):
                row |= {f"{phase}_speedup": speedup, f"{phase}_speedup_low": speedup - 0.1, f"{phase}_n": 9}
                row |= {f"{phase}_speedup_high": speedup + 0.1, f"{phase}_verdict": VERDICTS[min(2, i + cell)]}
            if name == "bf16":
                row = {k: None if k.startswith("throughput") else v for k, v in row.items()} | {"cause": "it crashed"}
            rows.append(row)
    return {
        "rows": rows,
        "ceilings": CEILINGS.to_json(),
        "threads": {"threads": 2},
        "too_noisy": False,
        "is_noisy": False,
        "aa": [],
    }
