"""A folder with fewer weights: the share that was asked for, recovery, resume, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from paretune.errors import ParetuneError, UsageError
from paretune.model import checkpoint
from paretune.train import pruning, recover
from paretune.train.recover import RecoverOptions, recover_blocks_
from paretune.transforms.base import Context
from paretune.transforms.prune.layers import Layers
from paretune.transforms.prune.magnitude import Magnitude
from paretune.transforms.prune.neurons import Neurons

TOKENS = torch.randint(0, 131, (24, 32), generator=torch.Generator().manual_seed(3))
OPTIONS = RecoverOptions(epochs=6, learning_rate=3e-3, batch_size=2)


@pytest.mark.parametrize(
    ("what", "by", "remaining", "settings"),
    [
        ("weights", None, 0.6, {}),
        ("weights", "magnitude", 0.2, {"ends": True}),
        ("neurons", None, 0.8, {}),
        ("heads", "taylor", 0.9, {}),
        ("layers", None, 0.6, {}),
        ("columns", "magnitude", 0.7, {}),
    ],
)
def test_the_share_is_of_all_parameters(tiny_gpt2_folder, what, by, remaining, settings):
    config = checkpoint.read_config(tiny_gpt2_folder)
    transform = pruning.transform_for(config, what, by, remaining, **settings)
    model = transform.apply(checkpoint.load(tiny_gpt2_folder), Context(calibration=TOKENS))
    left = pruning._left(model) / pruning.n_parameters(config)
    assert left == pytest.approx(remaining, abs=0.01 if what == "weights" else 0.1)


def test_shares_that_cannot_be_had(tiny_gpt2_folder):
    config = checkpoint.read_config(tiny_gpt2_folder)
    for what, by, remaining, settings, words in (
        ("weights", None, 0.05, {}, "prune the ends too"),
        ("heads", None, 0.3, {}, "without heads at least"),
        ("weights", None, 0.0, {}, "--remaining is 0"),
        ("weights", None, 1.5, {}, "--remaining is 1.5"),
        ("weights", "taylor", 0.5, {}, "Known for weights: magnitude, wanda, sparsegpt"),
        ("neurons", "luck", 0.9, {}, "by is 'luck'"),
        ("nothing", None, 0.5, {}, "--what is 'nothing'"),
        ("layers", None, 0.5, {"ends": True}, "--ends is about single weights"),
    ):
        with pytest.raises(UsageError, match=words):
            pruning.transform_for(config, what, by, remaining, **settings)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("transform", [Magnitude(keep=0.4), Neurons(keep=0.4, by="magnitude"), Layers(keep=0.5)])
def test_blocks_come_nearer_to_the_dense_ones(tiny_factory, family, transform):
    """On other text too; what is zero stays zero."""
    _, _, folder = tiny_factory(family)
    dense, model = checkpoint.load(folder), checkpoint.load(folder)
    blocks = getattr(model, model.family.stack)
    before = [id(b) for b in blocks]
    model = transform.apply(model, Context(calibration=TOKENS))
    kept = [before.index(id(b)) for b in getattr(model, model.family.stack)]
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() == 2}
    other = torch.randint(0, 131, (4, 32), generator=torch.Generator().manual_seed(9))
    wanted = dense(other)
    error = float((model(other) - wanted).norm())
    halves = recover_blocks_(model, dense, kept, TOKENS, OPTIONS)
    assert len(halves) == 2 * len(kept) and all(h.after <= h.before for h in halves)
    assert halves[-1].after < halves[-1].before
    assert float((model(other) - wanted).norm()) < error
    assert all(bool((p[zeros[n]] == 0).all()) for n, p in model.named_parameters() if n in zeros)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_run_that_is_cut_off_goes_on(tiny_gpt2_folder, tmp_path, monkeypatch):
    """Bit by bit as one that was not."""
    transform = Magnitude(keep=0.5)
    monkeypatch.setattr(pruning.calibration, "from_model", lambda *args, **more: TOKENS)
    whole = pruning.prune(tiny_gpt2_folder, transform, tmp_path / "whole", recover=OPTIONS)
    original = recover._train

    def fail(name, *args):
        if "h.1" in name:
            raise KeyboardInterrupt
        return original(name, *args)

    monkeypatch.setattr(recover, "_train", fail)
    with pytest.raises(KeyboardInterrupt):
        pruning.prune(tiny_gpt2_folder, transform, tmp_path / "cut", recover=OPTIONS)
    monkeypatch.setattr(recover, "_train", original)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(UsageError, match="holds an unfinished run"):
        pruning.prune(tiny_gpt2_folder, transform, tmp_path / "cut", recover=OPTIONS)
    with pytest.raises(UsageError, match="begun with other settings"):
        pruning.prune(tiny_gpt2_folder, Magnitude(keep=0.6), tmp_path / "cut", recover=OPTIONS, resume=True)
    made = pruning.prune(tiny_gpt2_folder, transform, tmp_path / "cut", recover=OPTIONS, resume=True)
    assert made.loss_after == whole.loss_after and len(made.halves) == 4
    a, b = (dict(checkpoint.load(tmp_path / n).named_parameters()) for n in ("whole", "cut"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not (tmp_path / "cut.work").exists()
    assert json.loads((tmp_path / "cut" / "prune.json").read_text("utf-8"))["remaining"] == pytest.approx(
        made.remaining
    )
    with pytest.raises(UsageError, match="nothing to resume"):
        pruning.prune(tiny_gpt2_folder, transform, tmp_path / "new", resume=True)
    with pytest.raises(UsageError, match="was pruned like this already"):
        pruning.prune(tmp_path / "whole", transform, tmp_path / "new")


def test_bad_input(tiny_gpt2_folder):
    dense, model = checkpoint.load(tiny_gpt2_folder), checkpoint.load(tiny_gpt2_folder)
    with pytest.raises(UsageError, match="3 windows are too short"):
        recover_blocks_(model, dense, [0, 1], TOKENS[:3], OPTIONS)
    with pytest.raises(ParetuneError, match="the error became nan"):
        model.h[0].ln_1.weight.data[0] = torch.nan
        recover_blocks_(model, dense, [0, 1], TOKENS, OPTIONS)
    with pytest.raises(UsageError, match="epochs is 0"):
        RecoverOptions(epochs=0)
