"""Each seeded slow-down is named, on a model that really has it; a bound is named from figures made by hand."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_profile import CEILINGS, hurry  # noqa: F401 - a fixture
from torch import Tensor

from paretune import hardware
from paretune.engine.load import Loaded, load_recipe
from paretune.engine.runners.eager import EagerRunner
from paretune.hardware import DtypeSupport
from paretune.measure import explain, explain_bounds, explain_mistakes, profile_facts
from paretune.measure.profile import examine
from paretune.measure.profile_steps import Step
from paretune.model.layers import Linear
from paretune.ops.weights.dense import Dense
from paretune.recipe import preset
from paretune.transforms.attention import Attention


def explained(loaded: Loaded, threads: dict[str, int] | None = None) -> dict[str, explain.Explanation]:
    """What `profile` says of a runner that is ready."""
    breaks = profile_facts.BreakCounter()
    step = Step(loaded, "decode", 7, 1)
    step.prepare()
    step.run()
    result = examine(step, CEILINGS, threads or {"threads": 2, "usable_cores": 2}, breaks, quick=True)
    # What else runs while the tests do is not the matter here; it would withhold gains.
    result["facts"] = result["facts"] | {"preemptions": 0.0, "cpu_pressure": 0.0}
    known = {"ceilings": CEILINGS.to_json(), "recipe": loaded.recipe.to_dict()}
    return {e.cause: e for e in explain.explain(result | known)}


def ready(folder, change=None, config: str = "baseline") -> Loaded:
    loaded = load_recipe(folder, preset(config))
    if change:
        change(loaded.runner.model)
    return loaded


MISTAKES = {"threads", "graph break", "emulated dtype", "dequantisation on every call", "masked dense weights"}


def test_a_healthy_model_shows_no_mistake(tiny_gpt2_folder):
    assert not MISTAKES & set(explained(ready(tiny_gpt2_folder)))


class _DequantisedEachTime(Dense):
    """int8 that is made fp32 again on every call: what a careless quantised linear does."""

    def __init__(self, weight: Dense) -> None:
        super().__init__(weight.values)
        scale = weight.values.abs().amax() / 127
        self.register_buffer("q", torch.round(weight.values / scale).to(torch.int8))
        self.scale = float(scale)

    def matmul(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.q.to(x.dtype) * self.scale)


class _BiasApart(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.matmul(x) + self.bias


def test_dequantise_every_call(tiny_gpt2_folder):
    def change(model):
        for block in model.h:
            mlp = block.mlp
            mlp.c_fc = _BiasApart(_DequantisedEachTime(mlp.c_fc.weight), mlp.c_fc.bias.data)
            mlp.c_proj = _BiasApart(_DequantisedEachTime(mlp.c_proj.weight), mlp.c_proj.bias.data)

    found = explained(ready(tiny_gpt2_folder, change))["dequantisation on every call"]
    # Two layers of two matrices of 48 x 192, fp32: 147 kB.
    assert "147 kB" in found.sentence and found.gain is not None and "native" in found.try_next


def test_masked_dense_weights(tiny_gpt2_folder):
    def change(model):
        for module in model.modules():
            if isinstance(module, Linear):
                module.weight.values.data[:, ::2] = 0

    found = explained(ready(tiny_gpt2_folder, change))["masked dense weights"]
    assert "50 %" in found.sentence


def test_a_mask_on_every_call_is_both(tiny_gpt2_folder):
    class Masked(Dense):
        def matmul(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.values * (self.values > 0))

    def change(model):
        for block in model.h:
            for layer in (block.mlp.c_fc, block.mlp.c_proj, block.attn.c_attn, block.attn.c_proj):
                layer.weight.values.data.clamp_(min=0)
                layer.weight = Masked(layer.weight.values)
                layer.__class__ = _BiasApart

    assert {"dequantisation on every call", "masked dense weights"} <= set(explained(ready(tiny_gpt2_folder, change)))


def test_a_single_thread_run(tiny_gpt2_folder):
    """The threads are set and read back, as `--threads 1` does."""
    threads = hardware.set_threads(1)
    if threads["usable_cores"] == 1:
        pytest.skip("this machine has one core")
    loaded = ready(tiny_gpt2_folder)
    assert torch.get_num_threads() == 1
    found = explained(loaded, threads)["threads"]
    n = threads["usable_cores"]
    assert f"1 of {n} usable cores" in found.sentence and f"--threads {n}" in found.try_next and found.gain > 1
    if n == 2:  # the ceilings of this test: twice the bandwidth on twice the threads
        assert found.gain == pytest.approx(2.0) and "10 GB/s" in found.sentence and "20 GB/s" in found.sentence


@pytest.mark.slow
def test_an_emulated_dtype(tiny_gpt2_folder):
    """Found by the micro-kernels of this machine, on a model that really runs in the format."""
    support = hardware.dtype_support()
    emulated = [name for name in ("bf16", "fp16") if support[name].works and support[name].emulated]
    if not emulated:
        pytest.skip("this machine emulates no 16-bit format")
    for name in emulated:
        found = explained(load_recipe(tiny_gpt2_folder, preset(name), check=False))["emulated dtype"]
        assert name in found.sentence and support[name].reason in found.sentence and "native_bf16" in found.try_next


def test_an_emulated_dtype_on_any_machine(tiny_gpt2_folder, monkeypatch):
    support = {"bf16": DtypeSupport(True, True, 0.4, 0.3, "bf16 is only emulated here: 0.40x the speed of fp32")}
    monkeypatch.setattr(hardware, "dtype_support", lambda device="cpu": support)
    found = explained(load_recipe(tiny_gpt2_folder, preset("bf16"), check=False))["emulated dtype"]
    assert "bf16" in found.sentence and "0.40x" in found.sentence and "baseline" in found.try_next


class _BrokenCompile(EagerRunner):
    """Compiles without `fullgraph`, so that a break passes in silence."""

    name = "compile"

    def __init__(self, model) -> None:
        super().__init__(model)
        torch._dynamo.reset()
        self._compiled = torch.compile(model, backend="eager")

    @torch.no_grad()
    def forward(self, tokens, cache, logits="last"):
        cache.begin_(tokens.size(1))
        out = self._compiled(tokens, cache, logits)
        cache.commit_()
        return out


def test_an_artificial_graph_break(tiny_gpt2_folder):
    loaded = ready(tiny_gpt2_folder)
    inner = loaded.runner.model.h[0].attn.attention

    def broken(*args):
        torch._dynamo.graph_break()
        return inner(*args)

    loaded.runner.model.h[0].attn.attention = broken
    found = explained(Loaded(loaded.folder, loaded.recipe, _BrokenCompile(loaded.runner.model), 0.0))["graph break"]
    assert "graph break" in found.sentence and "--config compile" in found.try_next


# ---- bounds, from figures made by hand


def part(name: str, share: float, least: float, limit: str, **more):
    zero = dict.fromkeys(("product_weight_bytes", "converted_bytes", "cache_bytes", "flops", "bytes"), 0)
    return {
        "part": name,
        "share": share,
        "sec": share * 1e-2,
        "least_sec": least * 1e-2,
        "limit": limit,
        **zero,
        **more,
    }


def result(*parts, kernels=(), **facts):
    classes = [{"kind": k, "share": s, "sec": s * 1e-2, "count": n} for k, s, n in kernels]
    return {
        "phase": "decode",
        "device": "cpu",
        "whole": {"sec": 1e-2, "dtype": "fp32", "needed_bytes": 9e7, "bound_by": "the roofline says so"},
        "parts": list(parts),
        "kernels": [],
        "kernel_classes": classes,
        "profiled_sec": 1e-2,
        "ceilings": CEILINGS.to_json(),
        "facts": facts,
    }


def test_weight_bandwidth():
    row = part("expansion", 0.9, 0.8, "memory", product_weight_bytes=9 * 10**7, bytes=9 * 10**7)
    (found,) = explain.explain(result(row))
    assert found.cause == "weight bandwidth" and "90 %" in found.sentence and "90 MB" in found.sentence
    assert found.gain == pytest.approx(1 / (1 - 0.9 * 0.75))  # int8 in place of fp32
    assert "Predicted gain: at most 3.08x" in found.text


def test_cache_bandwidth():
    row = part("fused_attention", 0.6, 0.5, "memory", cache_bytes=8 * 10**7, bytes=9 * 10**7)
    (found,) = explain.explain(result(row))
    assert found.cause == "cache bandwidth" and "60 %" in found.sentence and "int8 cache" in found.try_next


def test_arithmetic():
    row = part("expansion", 0.8, 0.6, "compute", product_weight_bytes=1, flops=6 * 10**8)
    (found,) = explain.explain(result(row))
    assert found.cause == "arithmetic" and "bf16" in found.try_next
    assert found.gain == pytest.approx(1 / (1 - 0.8 * 0.5))  # these ceilings: twice the rate in bf16


def test_attention_by_the_formula_is_told_of_attention_without_scores():
    """The preset has no attention transform at all: that is the formula."""
    found = result(page_faults=4000, page_fault_sec=1e-6)
    for name, says in (("eager_attn", True), ("baseline", False), ("native", False)):
        (told,) = explain.explain(found | {"recipe": preset(name).to_dict()})
        assert ("--config baseline" in told.try_next) == says
        assert ("--config native" in told.try_next) == (name != "native")


def test_what_the_native_runner_refuses_is_not_told_to_try_it(monkeypatch):
    """Attention of another kind: every place that would name the runner names something else."""
    monkeypatch.setattr(Attention, "replaces_attention", True)
    kernels = [("dispatch", 0.4, 500), ("launch gap", 0.3, 500), ("GEMM", 0.6, 40)]
    row = part("expansion", 0.9, 0.1, "compute", product_weight_bytes=1, flops=6 * 10**7)
    slow = result(row, kernels=kernels, page_faults=4000, page_fault_sec=1e-6, graph_breaks=2, converted_bytes=10**9)
    wide = result(part("expansion", 0.9, 0.8, "memory", product_weight_bytes=9 * 10**7, bytes=9 * 10**7))
    for name, says in (("baseline", False), ("eager_attn", True)):
        found = [e for r in (slow, wide) for e in explain.explain(r | {"recipe": preset(name).to_dict()})]
        assert {"slow products", "dispatch overhead", "memory allocation", "weight bandwidth"} <= {
            e.cause for e in found
        }
        assert any("native" in e.try_next for e in found) == says


def test_training_is_not_told_of_runners_that_cannot_train():
    kernels = [("dispatch", 0.4, 500), ("launch gap", 0.3, 500), ("GEMM", 0.6, 40)]
    row = part("expansion", 0.9, 0.1, "compute", product_weight_bytes=1, flops=6 * 10**7)
    for phase in ("decode", "train"):
        found = explain.explain(result(row, kernels=kernels, page_faults=4000, page_fault_sec=1e-6) | {"phase": phase})
        told = " ".join(e.try_next for e in found)
        assert {"slow products", "dispatch overhead", "memory allocation"} <= {e.cause for e in found}
        assert ("native" in told) == (phase == "decode") and ("--batch-size" in told) == (phase == "train")
        assert "--config baseline" not in told  # which it is


def test_a_bandwidth_that_was_surpassed_is_no_bound():
    row = part("expansion", 0.9, 1.8, "memory", product_weight_bytes=9 * 10**7, bytes=9 * 10**7)
    (found,) = explain.explain(result(row))
    assert found.cause == "unsteady machine" and "200 % of what was measured as the largest bandwidth" in found.sentence


def test_a_ceiling_that_was_surpassed_is_no_bound():
    row = part("expansion", 0.8, 2.1, "compute", product_weight_bytes=1, flops=6 * 10**8)
    (found,) = explain.explain(result(row))
    assert (
        found.cause == "unsteady machine" and "262 %" in found.sentence
    )  # 2.1 / 0.8 and "measuring again" in found.try_next


def test_dispatch_and_python():
    kernels = (("GEMV", 0.3, 20), ("dispatch", 0.2, 400), ("allocation", 0.1, 100), ("launch gap", 0.4, 520))
    found = explain.explain(result(kernels=kernels))
    assert [e.cause for e in found] == ["Python", "dispatch overhead"]  # by share
    assert "520 operators" in found[1].sentence and "40 %" in found[0].sentence


def test_memory_allocation():
    (found,) = explain.explain(result(page_faults=4000, page_fault_sec=1e-6))
    assert found.cause == "memory allocation" and "4,000 fresh pages" in found.sentence


def test_a_busy_machine():
    found = explain.explain(result(preemptions=5.0, cpu_pressure=0.9))[0]
    assert found.cause == "busy machine" and "500 times a second" in found.sentence and "90 %" in found.sentence
    for threads, says_fewer in ((2, True), (1, False)):
        busy = next(
            e
            for e in explain.explain(result(preemptions=5.0, threads=threads, usable_cores=2))
            if e.cause == "busy machine"
        )
        assert ("fewer --threads" in busy.try_next) == says_fewer
    row = part("expansion", 0.9, 0.8, "memory", product_weight_bytes=9 * 10**7, bytes=9 * 10**7)
    _, bound = explain.explain(result(row, preemptions=5.0))
    assert bound.cause == "weight bandwidth" and bound.gain is None and "Predicted" not in bound.text


def test_slow_products():
    """Kernels that reach neither ceiling are named, in a step with parts and in a graph."""
    row = part("expansion", 0.9, 0.2, "memory", product_weight_bytes=4 * 10**7, bytes=4 * 10**7)
    parts = result(row, kernels=(("GEMV", 0.8, 24),))
    found = explain.explain(parts)[0]
    assert found.cause == "slow products" and "80 %" in found.sentence and "40 MB at 5 GB/s, 25 %" in found.sentence
    assert found.gain == pytest.approx(1 / (1 - 0.8 * (1 - 0.25 / 0.8))) and "--config native" in found.try_next
    graph = result(kernels=(("GEMV", 0.8, 24),))
    graph["whole"] |= {"mbu": 0.3, "mfu": 0.01, "needed_flops": 1e7}
    found = explain.explain(graph | {"recipe": {"engine": {"runner": "compile"}}})[0]
    assert found.cause == "slow products" and "90 MB at 11.2 GB/s, 38 %" in found.sentence


def test_what_the_profiler_costs_is_no_cause():
    """A step that is twice as long under the profiler: what it adds around the kernels is taken off first."""
    kernels = (("GEMV", 1.0, 20), ("dispatch", 0.6, 400), ("launch gap", 0.4, 420))
    slow = result(kernels=kernels) | {"profiled_sec": 2e-2}
    assert "dispatch overhead" not in {e.cause for e in explain.explain(slow)}
    plain = result(kernels=kernels) | {"profiled_sec": 1e-2}
    assert "dispatch overhead" in {e.cause for e in explain.explain(plain)}


@pytest.mark.parametrize(
    ("width", "words"), [(4.0, "native_int8"), (2.0, "native_int8"), (1.06, "native_int4"), (0.5625, "smaller")]
)
def test_the_next_narrower_format_is_one_that_is_not_in_use(width, words):
    data = result() | {"recipe": {"engine": {"runner": "native"}}}
    data["whole"] |= {"mbu": 0.8, "bytes_per_weight": width}
    (found,) = explain.explain(data)
    assert found.cause == "weight bandwidth" and words in found.try_next
    assert (found.gain is None) == (words == "smaller")


def test_what_is_in_use_is_not_proposed():
    kernels = (("GEMV", 0.3, 20), ("dispatch", 0.3, 400), ("launch gap", 0.4, 520))
    compiled = result(kernels=kernels) | {"recipe": {"engine": {"runner": "compile"}}}
    assert all("--config compile" not in e.try_next for e in explain.explain(compiled))


def test_every_config_that_is_proposed_exists():
    """Sentences of all rules, from their source."""
    source = "".join(Path(module.__file__).read_text("utf-8") for module in (explain_bounds, explain_mistakes))
    proposed = set(re.findall(r"--config ([a-z0-9_+]+)", source))
    assert proposed and all(preset(name) for name in proposed)


def test_nothing_is_made_up():
    (found,) = explain.explain(result())
    assert found.cause == "no single cause" and found.sentence == "the roofline says so"
    assert explain.explain({}) == []
    assert {e.cause for e in [found]} <= set(explain.CAUSES)


def test_a_trial_with_little_known_is_explained_too():
    """`tune` knows no parts of a trial: the same rules on what there is."""
    trial = SimpleNamespace(**result())
    data = {"phase": "decode", "whole": {**trial.whole, "mbu": 0.9}, "ceilings": trial.ceilings}
    (found,) = explain.explain(data)
    assert found.cause == "weight bandwidth" and "90 % of what" in found.sentence
