"""A profile gives the model's own logits, tiles the step without a gap, and counts what really runs."""

from __future__ import annotations

import json

import pytest
import torch

from paretune import clock, hardware
from paretune.engine.load import load_recipe
from paretune.errors import ParetuneError, UsageError
from paretune.hardware import Ceilings
from paretune.measure import profile as measure
from paretune.measure import profile_blocks, profile_facts, profile_native, profile_steps
from paretune.measure.profile import profile, take_apart
from paretune.measure.profile_blocks import Timed, time_blocks
from paretune.measure.profile_count import CountingMode
from paretune.measure.profile_marks import Instrument, Marks, cost_of_a_reading, staged_reference
from paretune.measure.profile_parts import BY_KEY, PARTS, SUMS
from paretune.measure.profile_rows import ORDER, alike_half, layers_of, middle_half, seconds_of
from paretune.measure.profile_steps import Step
from paretune.model import checkpoint
from paretune.ops.attention import reference, sdpa
from paretune.ops.attention.pattern import CAUSAL, Window
from paretune.ops.attention.spec import AttentionSpec
from paretune.recipe import preset

CEILINGS = Ceilings(
    device="cpu",
    kind="native",
    threads=2,
    read_bandwidth=tuple(
        {"bytes": n, "threads": t, "bytes_per_sec": 1e10 * t, "kind": "native", "samples": [], "state": "high"}
        for n in (1 << 20, 1 << 28)
        for t in (1, 2)
    ),
    matrix_rates={"fp32": 1e11, "bf16": 2e11},
)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """What is tested here is not how fast anything is: few steps, no bandwidth probe."""
    before = torch.get_num_threads()
    for name, value in (("QUICK_SLICE_SEC", 0.0), ("QUICK_BLOCKS", 1), ("WARM_UP_SEC", 0.0), ("MAX_WARM_UP_SEC", 0.0)):
        monkeypatch.setattr(profile_blocks, name, value)
    monkeypatch.setattr(measure, "QUICK_KERNELS", (0.0, 3))
    monkeypatch.setattr(hardware, "BandwidthProbe", lambda threads: lambda: 1e10)
    monkeypatch.setattr(profile_facts, "_WATCH_SEC", 0.0)
    yield
    torch.set_num_threads(before)


def apart(folder, config: str, phase: str, input_len: int = 7, batch_size: int = 2):
    loaded = load_recipe(folder, preset(config))
    step = Step(loaded, phase, input_len, batch_size)  # type: ignore[arg-type]
    return loaded, step, take_apart(loaded, step, CEILINGS, quick=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", pytest.param("mistral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", ["eager_attn", "baseline", "int8"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_parts_tile_the_step(request, family, config, phase):
    """Every reading ends one part and begins the next: their sum is the marked step. (Bit-equal logits: `_count`.)"""
    _, step, result = apart(request.getfixturevalue(f"tiny_{family}_folder"), config, phase)
    json.dumps(result, allow_nan=False)
    parts = {row["part"]: row for row in result["parts"]}
    model = sum(row["sec"] for row in result["parts"] if row["group"] == "model")
    assert model == pytest.approx(result["closing"]["sum_sec"])
    for group, (key, _, _) in SUMS.items():
        members = [row for row in result["parts"] if row["group"] == group]
        assert sum(row["sec"] for row in members) == pytest.approx(parts[key]["sec"])
        assert sum(row["group_share"] for row in members) == pytest.approx(1.0)
    assert [row["layer"] for row in result["layers"]] == [0, 1]
    attention = {"scores", "softmax", "values"} if config == "eager_attn" else {"fused_attention"}
    assert attention <= set(parts)
    assert ("rotary_angles" in parts) == (family != "gpt2") and ("embedding_sum" in parts) == (family == "gpt2")
    assert {"norm_1", "norm_2", "residual_1", "residual_2", "qkv_reshape", "output_reshape", "cache_append"} <= set(
        parts
    )
    assert result["notes"] == [] or "add up" in result["notes"][0]  # the second: a busy machine
    # The model is as it was.
    assert all("forward" not in m.__dict__ for m in step.model.modules())


def test_the_published_rows_are_there(tiny_gpt2_folder):
    _, _, result = apart(tiny_gpt2_folder, "eager_attn", "prefill")
    found = {row["part"] for row in result["parts"] if row["is_published"]}
    assert found == {part.key for part in PARTS if part.is_published} | {key for key, _, _ in SUMS.values()}
    assert set(ORDER) == set(BY_KEY) | {key for key, _, _ in SUMS.values()}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_flops_and_bytes_of_a_known_model(tiny_gpt2_folder, phase):
    _, step, result = apart(tiny_gpt2_folder, "eager_attn", phase, input_len=7, batch_size=2)
    parts = {row["part"]: row for row in result["parts"]}
    rows, width, layers = step.n_tokens, 48, 2
    assert parts["qkv_projection"]["product_flops"] == 2 * rows * width * 3 * width * layers
    assert parts["expansion"]["product_flops"] == 2 * rows * width * 4 * width * layers
    assert parts["head"]["product_flops"] == 2 * 2 * width * 131
    assert parts["head"]["product_weight_bytes"] == 4 * width * 131
    # Weight, input and output, fp32, a bias.
    n = width * 3 * width + rows * width + rows * 3 * width + 3 * width
    assert parts["qkv_projection"]["bytes"] == 4 * n * layers
    keys = 7 if phase == "prefill" else 8
    # Two products a layer over all pairs of the 4 heads: the reference computes the hidden ones too.
    assert parts["scores"]["product_flops"] == 2 * (rows * keys * width) * layers
    assert ("mask" in parts) == (phase == "prefill")
    assert parts["residual_1"]["bytes"] == 3 * 4 * rows * width * layers
    total = result["whole"]
    assert total["needed_flops"] <= total["counted_flops"] and total["needed_bytes"] > 0


def test_int8_reads_fewer_bytes_and_dequantises_only_long_prompts(tiny_gpt2_folder):
    few = {r["part"]: r for r in apart(tiny_gpt2_folder, "int8", "decode", 7, 1)[2]["parts"]}
    many = {r["part"]: r for r in apart(tiny_gpt2_folder, "int8", "prefill", 40, 1)[2]["parts"]}
    assert few["expansion"]["converted_bytes"] == 0
    assert many["expansion"]["converted_bytes"] >= 2 * 48 * 4 * 48  # another form of the whole matrix


def test_training_has_a_backward_pass_for_each_part(tiny_gpt2_folder):
    _, step, result = apart(tiny_gpt2_folder, "eager_attn", "train")
    parts = {row["part"]: row for row in result["parts"]}
    assert {"loss", "optimizer", "head", "mask", "softmax"} <= set(parts)
    for key in ("qkv_projection", "qkv_reshape", "output_projection", "expansion", "activation", "projection", "head"):
        assert parts[key]["backward_sec"] > 0, key
    # Twice the forward pass: gradients of inputs and of weights.
    n = step.n_tokens
    assert parts["expansion"]["product_flops"] == 3 * 2 * n * 48 * 192 * 2
    assert result["whole"]["needed_flops"] is None and result["whole"]["counted_flops"] > 0


@pytest.mark.parametrize("case", ["prefill", "decode", "window", "masked"])
def test_the_staged_attention_is_the_reference(case):
    generator = torch.Generator().manual_seed(1)
    K = 1 if case == "decode" else 9
    q, k, v = (torch.randn(2, h, K, 8, generator=generator) for h in (4, 2, 2))
    spec = AttentionSpec(scale=0.3, pattern=Window(4) if case == "window" else CAUSAL)
    marks = Marks()
    marks.start()
    assert torch.equal(staged_reference(marks, 0, q, k, v, None, spec), reference.attention(q, k, v, None, spec))
    assert {"scores", "softmax", "values"} <= {key[0] for key in marks.stop()}


def test_marks_on_a_clock_of_our_own():
    """Known durations come out as they went in, whatever the order."""
    with clock.use(clock.FakeClock()) as fake:
        marks = Marks()
        marks.start()
        for key, sec in (("norm_1", 1.0), ("head", 2.0), ("norm_1", 4.0)):
            marks((key, 0, False))
            fake.sleep(sec)
        got = marks.stop()
    assert got[("norm_1", 0, False)] == 5.0 and got[("head", 0, False)] == 2.0
    assert layers_of(got) == [{"layer": 0, "sec": 7.0}]
    assert marks.counts()[("norm_1", 0, False)] == 2


def test_means_add_up_and_leave_out_interruptions():
    key, other = ("head", -1, False), ("norm_1", 0, False)
    steps = [{key: 1.0, other: 2.0}] * 9 + [{key: 100.0, other: 2.0}]
    quiet = middle_half([sum(step.values()) for step in steps])
    assert seconds_of([steps[i] for i in quiet]) == {key: 1.0, other: 2.0}
    assert middle_half([5.0, 1.0, 2.0, 9.0]) == [2, 0]


def test_turns_in_which_one_step_was_interrupted_are_left_out():
    plain = [1.0, 1.0, 9.0, 1.0, 2.0, 1.0, 8.0, 1.0]
    marked = [1.1, 7.0, 1.1, 1.1, 2.2, 1.2, 8.8, 1.1]
    assert alike_half(plain, marked) == [0, 3, 4, 7]
    assert alike_half([1.0], [2.0]) == [0]


def test_blocks_of_the_commonest_bandwidth_state():
    timed = Timed([[1.0], [2.0], [3.0]], [], [(10.0, 10.0), (10.0, 3.0), (9.5, 10.0)])
    kept, state = timed.kept()
    assert (state, kept.plain, timed.states()) == ("high", [[1.0], [3.0]], ["high", "mixed", "high"])
    assert Timed([[1.0]], [], [None]).kept()[1] == "unknown"


def test_a_fused_layer_is_named(tiny_gpt2_folder):
    """A tree without a boundary says so; its time stands with the part before."""
    loaded = load_recipe(tiny_gpt2_folder, preset("baseline"))
    del loaded.runner.model.h[1].ln_2
    assert Instrument(loaded.runner.model, Marks()).missing == ["h.1.ln_2"]


def test_the_cost_of_a_reading_is_small_and_known():
    assert 0 <= cost_of_a_reading(90) < 1e-3


def test_a_step_marked_twice(tiny_gpt2_folder):
    """The second instrument reads at every boundary of the first; both leave the model as it was."""
    loaded = load_recipe(tiny_gpt2_folder, preset("baseline"))
    step = Step(loaded, "decode", 5, 1)
    plain = step.run()
    inner = Instrument(loaded.runner.model, Marks())
    outer = inner.around(loaded.runner.model)
    timed = time_blocks(step, [inner, outer], quick=True, seed=0)
    assert len(timed.twice[0]) == len(timed.marked[0]) == len(timed.plain[0]) > 0
    assert outer.marks.n_readings == inner.marks.n_readings - 1 > 20  # the reading that ends the step is the first's
    assert "forward" not in loaded.runner.model.h[0].ln_1.__dict__
    assert loaded.runner.model.h[0].attn.attention is sdpa.attention
    step.prepare()
    assert torch.equal(step.run(), plain)


def test_counting_changes_nothing(tiny_llama_folder):
    loaded = load_recipe(tiny_llama_folder, preset("baseline"))
    step = Step(loaded, "prefill", 9, 1)
    plain = step.run()
    step.prepare()
    mode = CountingMode(lambda: ("head", -1, False), step.model, step.cache_tensors)
    with mode:
        counted = step.run()
    assert torch.equal(plain, counted)
    assert mode.counts.total().cache_bytes > 0


class _Native:
    name = "native"
    own_kernels = True
    counters = None

    def count_(self, on: bool) -> None:
        n = profile_native.N_STEPS
        entries = [("norm_1+qkv_projection", i, n, 1e-3 * n, 1000 * n, 2000 * n) for i in range(2)]
        self.counters = entries if on else None


def test_native_counters_where_they_are_and_where_not(tiny_gpt2_folder):
    step = Step(load_recipe(tiny_gpt2_folder, preset("baseline")), "decode", 7, 1)
    assert profile_native.rows(step.runner, step, {}, CEILINGS) is None  # eager
    whole = {"sec": 4e-3, "needed_bytes": 1 << 28, "dtype": "fp32"}
    found = profile_native.rows(_Native(), step, whole, CEILINGS)
    assert found is not None
    row, rest = found["rows"]
    assert rest["operation"] == profile_native.OUTSIDE and rest["ceiling_share"] is None
    assert row["sec"] + rest["sec"] == pytest.approx(found["step_sec"]) and row["share"] + rest["share"] == 1.0
    assert row["share"] == row["sec"] / found["step_sec"] and row["ceiling_share"] == pytest.approx(5e-5)
    assert row["operation"] == "norm_1+qkv_projection" and row["calls"] == 2
    assert row["sec"] == pytest.approx(2e-3) and row["bytes_per_sec"] == pytest.approx(1e6)
    assert profile_native.spans(step.runner, step) == []
    names = [name for name, _ in profile_native.spans(_Native(), step)]
    assert names == [f"layer {i}: norm_1+qkv_projection" for i in range(2)]
    without = type("Uncounted", (), {"own_kernels": True, "counters": None, "count_": lambda self, is_on: None})()
    assert profile_native.rows(without, step, {}, CEILINGS)["available"] is False  # type: ignore[index]


def test_memory_is_predicted_before_anything_is_loaded(tiny_gpt2_folder, monkeypatch):
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 1 << 20)
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ParetuneError, match=r"needs about .* GB and 0.0 GB are free") as caught:
        profile(tiny_gpt2_folder, preset("baseline"), "baseline", ceilings=CEILINGS)
    assert caught.value.exit_code == 1 and "--device-profile" in caught.value.cure


def test_needed_memory_grows_with_the_phase(tiny_gpt2_folder):
    config = checkpoint.read_config(tiny_gpt2_folder)
    needed = [profile_steps.needed_bytes(config, phase, 32, 2) for phase in ("prefill", "train")]
    assert needed[0] < needed[1]


def test_needed_memory_is_that_of_the_converted_weights():
    config = checkpoint.published("gpt2-xl")
    needed = {
        c: profile_steps.needed_bytes(config, "decode", 128, 1, preset(c)) for c in ("fp32", "bf16", "native_int4")
    }
    n = 1.56e9
    assert needed["fp32"] == pytest.approx(4 * n, rel=0.25) and needed["fp32"] - needed["bf16"] == pytest.approx(
        2 * n, rel=0.05
    )
    assert needed["native_int4"] < needed["bf16"] < needed["fp32"]


@pytest.mark.parametrize(
    ("phase", "config", "words"),
    [
        ("think", "baseline", "unknown phase 'think'"),
        ("train", "int8", "has no training phase: int8 weights carry no gradient"),
        ("train", "native", "has no training phase: its runner is native"),
    ],
)
def test_a_phase_that_is_not_there(tiny_gpt2_folder, phase, config, words):
    with pytest.raises(UsageError, match=words):
        profile(tiny_gpt2_folder, preset(config), config, phase=phase, ceilings=CEILINGS)


def test_a_request_that_does_not_fit(tiny_gpt2_folder):
    with pytest.raises(UsageError, match="exceed the context of 64"):
        profile(tiny_gpt2_folder, preset("baseline"), "baseline", phase="decode", input_len=64, ceilings=CEILINGS)


def test_the_whole_result(tiny_gpt2_folder, monkeypatch):
    said: list[str] = []
    result, trace = profile(
        tiny_gpt2_folder, preset("baseline"), "baseline", input_len=7, quick=True, ceilings=CEILINGS, say=said.append
    )
    json.dumps(result, allow_nan=False)
    assert {"schema_version", "command", "seed", "versions", "hardware", "environment"} <= set(result)
    assert result["whole"]["samples"] and result["explanations"] and trace
    assert result["blocks"]["n"] >= 3 and said
    assert {"graph_breaks", "zero_share", "threads", "n_ops"} <= set(result["facts"])


def test_facts_that_need_no_clock(tiny_gpt2_folder):
    loaded = load_recipe(tiny_gpt2_folder, preset("baseline"))
    assert profile_facts.zero_share(loaded.runner.model) < 0.01
    for block in loaded.runner.model.h:
        block.mlp.c_fc.weight.values.data[:, ::2] = 0
        block.mlp.c_proj.weight.values.data[:, ::2] = 0
    assert 0.2 < profile_facts.zero_share(loaded.runner.model) < 0.5
    assert profile_facts.page_fault_sec() >= 0
