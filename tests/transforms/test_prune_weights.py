"""Single weights that become zero: how many, which, what is refused, what a folder remembers."""

from __future__ import annotations

import json

import pytest
import torch

from paretune.engine.load import load_recipe, prove
from paretune.engine.probe import observe
from paretune.engine.runners.eager import EagerRunner
from paretune.errors import CheckpointError, NoEffectError, ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.ops.weights import pruning, rounding
from paretune.recipe import Recipe, preset
from paretune.transforms.base import Context
from paretune.transforms.prune.magnitude import Magnitude
from paretune.transforms.prune.sparsegpt import SparseGPT
from paretune.transforms.prune.wanda import Wanda
from paretune.transforms.prune.weights import count_zeros

CONTEXT = Context(calibration=torch.randint(0, 131, (8, 32), generator=torch.Generator().manual_seed(2)))
KINDS = (Magnitude(keep=0.5), Magnitude(keep=0.5, scope="global"), Wanda(keep=0.5), SparseGPT(keep=0.5))


def shares(model):
    """The share of zeros of each block layer."""
    layers = {n: m.weight for n, m in model.named_modules() if hasattr(m, "weight") and ".c_" in n}
    return {name: count_zeros(w) / (w.out_features * w.in_features) for name, w in layers.items()}


@pytest.mark.parametrize("transform", KINDS, ids=lambda t: t.title)
def test_half_of_the_weights_are_zero(tiny_gpt2_folder, transform):
    dense = checkpoint.load(tiny_gpt2_folder)
    model = transform.apply(checkpoint.load(tiny_gpt2_folder), CONTEXT)
    found = shares(model)
    assert len(found) == 8
    if getattr(transform, "scope", "layer") == "layer":
        assert all(share == pytest.approx(0.5, abs=0.01) for share in found.values())
    assert sum(count_zeros(m.weight) for m in model.modules() if hasattr(m, "weight") and hasattr(m, "bias")) > 0
    assert torch.equal(model.wte.weight.values, dense.wte.weight.values)
    assert "of 55,296 weights in 8 matrices are zero (50.0%)" in transform.verify(model, observe(EagerRunner(model)))[0]
    with pytest.raises(NoEffectError, match="not pruned"):
        transform.verify(dense, observe(EagerRunner(dense)))


def test_ends_are_pruned_on_request_and_stay_tied(tiny_gpt2_folder):
    for kind in (Magnitude, Wanda, SparseGPT):
        model = kind(keep=0.25, ends=True).apply(checkpoint.load(tiny_gpt2_folder), CONTEXT)
        assert model.lm_head.weight is model.wte.weight
        assert count_zeros(model.wte.weight) == pytest.approx(0.75 * 131 * 48, rel=0.01)
        assert count_zeros(model.wpe.weight) == 0


def test_the_largest_stay_exactly_so_many():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 5.0, 4.0, 0.0]])
    assert pruning.largest(scores, 0.5, "x").sum() == 4
    assert pruning.largest(scores, 0.25, "x").tolist() == [[False] * 4, [False, True, True, False]]
    assert pruning.largest_of_rows(scores, 0.5, "x").sum(1).tolist() == [2, 2]
    with pytest.raises(UsageError, match="leaves none"):
        pruning.largest_of_rows(scores, 0.1, "x")


def test_sparsegpt_makes_up_for_what_goes():
    """On correlated inputs its outputs are nearer to the dense ones than Wanda's, and those nearer than magnitude's."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-0.5, 0.5, 160)[torch.randperm(160, generator=generator)]
    mix = torch.randn(160, 160, generator=generator)[:, :60].repeat(1, 3)[:, :160] * sizes
    x = torch.randn(2000, 160, generator=generator) @ mix + torch.randn(2000, 160, generator=generator)
    w = torch.randn(48, 160, generator=generator)
    H = 2 / len(x) * x.t() @ x
    factor = rounding.solver(H.clone(), act_order=False).factor
    made = {
        "magnitude": w * pruning.largest(w.abs(), 0.5, "w"),
        "wanda": w * pruning.largest_of_rows(w.abs() * H.diagonal().sqrt(), 0.5, "w"),
        "sparsegpt": pruning.sparsegpt(w, factor, 0.5, "w"),
    }
    errors = {name: float((x @ (w - v).t()).norm()) for name, v in made.items()}
    assert errors["sparsegpt"] < 0.7 * errors["wanda"] < 0.7 * errors["magnitude"], errors
    assert int((made["sparsegpt"] == 0).sum()) == 48 * 80
    # Columns in blocks of other sizes give what one column after another gives.
    assert torch.allclose(_one_by_one(w, factor), made["sparsegpt"], atol=1e-4)


def _one_by_one(w, factor):
    """SparseGPT as the paper writes it."""
    w = w.clone()
    for start in range(0, w.size(1), 128):
        end = min(start + 128, w.size(1))
        loss = (w[:, start:end] / factor.diagonal()[start:end]).square()
        mask = pruning.largest(loss, 0.5, "w")
        for i in range(start, end):
            gone = torch.where(mask[:, i - start], 0, w[:, i])
            w[:, i] -= gone
            w[:, i + 1 :] -= torch.outer(gone / factor[i, i], factor[i, i + 1 :])
    return w


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_shares_outside_are_refused(keep):
    with pytest.raises(UsageError, match="keep is"):
        Magnitude(keep=keep)


def test_bad_input(tiny_gpt2_folder, tmp_path):
    with pytest.raises(UsageError, match="leaves none"):
        Wanda(keep=0.001).apply(checkpoint.load(tiny_gpt2_folder), CONTEXT)
    with pytest.raises(UsageError, match="would be empty"):
        model = checkpoint.load(tiny_gpt2_folder)
        model.h[0].attn.c_attn.weight.values.data.mul_(1e-6)
        Magnitude(keep=0.5, scope="global").apply(model, CONTEXT)
    with pytest.raises(UsageError, match="calibration text too short: 20 tokens"):
        SparseGPT().apply(checkpoint.load(tiny_gpt2_folder), Context(calibration=torch.zeros(1, 20, dtype=torch.int64)))
    with pytest.raises(UsageError, match="needs calibration text"):
        Wanda().apply(checkpoint.load(tiny_gpt2_folder), Context())
    with pytest.raises(UsageError, match="matches no layer"):
        Wanda(include="nothing").apply(checkpoint.load(tiny_gpt2_folder), CONTEXT)
    model = checkpoint.load(tiny_gpt2_folder)
    before = model.h[1].mlp.c_fc.weight.values.clone()
    model.h[1].mlp.c_proj.weight.values.data[0, 0] = torch.nan
    with pytest.raises(ParetuneError, match=r"h\.1\.mlp\.c_proj: a weight holds NaN"):
        Wanda().apply(model, CONTEXT)
    assert torch.equal(model.h[1].mlp.c_fc.weight.values, before)
    quantized = preset("int8").apply(checkpoint.load(tiny_gpt2_folder), Context())
    with pytest.raises(UsageError, match="stored as int8_rows already"):
        Wanda().apply(quantized, CONTEXT)
    checkpoint.save(quantized, tmp_path)
    assert "prune the dense model first" in str(Wanda().fits(checkpoint.read_config(tmp_path)))


def test_an_error_in_the_last_layer_leaves_all_as_they_were(tiny_gpt2_folder, monkeypatch):
    model = checkpoint.load(tiny_gpt2_folder)
    before = {n: p.clone() for n, p in model.named_parameters()}
    calls = []

    def fail(self, values, name, moments, shared):
        calls.append(name)
        if len(calls) == 8:
            raise ParetuneError("no")
        return values * 0

    monkeypatch.setattr(Wanda, "pruned", fail)
    with pytest.raises(ParetuneError, match=f"{'mlp.c_proj'}: no"):
        Wanda().apply(model, CONTEXT)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        "native+sparsegpt(0.5)+sparse8",
        "wanda(0.5)+sparse8",
        "sparsegpt(0.5)+int8",
        "wanda(0.5)+int4",
        "magnitude(0.5)+bf16",
        "wanda(0.5)",
    ],
)
def test_a_pruned_folder_is_served_by_its_recipe(tiny_llama_folder, tmp_path, config, tiny_tokens):
    """The way of a plan: convert, save, load through the recipe, prove. Pruned once, quantised after."""
    recipe = preset(config)
    first = load_recipe(tiny_llama_folder, recipe, ctx=CONTEXT)
    model = load_recipe(tiny_llama_folder, Recipe(recipe.transforms), ctx=CONTEXT).runner.model
    logits = first.runner.forward(tiny_tokens, first.runner.new_cache(2, 23), "all")
    checkpoint.save(model, tmp_path)
    again = load_recipe(tmp_path, recipe, ctx=CONTEXT)
    assert torch.equal(again.runner.forward(tiny_tokens, again.runner.new_cache(2, 23), "all"), logits)
    assert any("are zero (50.0%)" in s for s in prove(again)[0])
    entry = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert entry["model_type"] == "llama" and entry["paretune_pruned"]["schema_version"] == 1


def test_a_folder_of_a_newer_version_is_refused(tiny_gpt2_folder, tmp_path):
    checkpoint.save(Magnitude().apply(checkpoint.load(tiny_gpt2_folder), Context()), tmp_path)
    path = tmp_path / "config.json"
    entry = json.loads(path.read_text("utf-8"))
    entry["paretune_pruned"]["schema_version"] = 2
    path.write_text(json.dumps(entry), "utf-8")
    with pytest.raises(CheckpointError, match="pruned by a newer version"):
        checkpoint.load(tmp_path)
