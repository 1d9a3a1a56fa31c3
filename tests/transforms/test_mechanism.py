"""The conversion to ALiBi and to sparse patterns: what changes, what is refused, what a folder remembers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from paretune import native_build
from paretune.engine.runners.native import NativeRunner
from paretune.errors import CheckpointError, NoEffectError, UsageError
from paretune.model import checkpoint
from paretune.ops.attention import alibi
from paretune.ops.attention.pattern import parse
from paretune.ops.native.program import CannotLower
from paretune.recipe import Recipe, preset
from paretune.transforms.attention import attention_layers
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism
from recipe_names import HASHES

PROBE = SimpleNamespace(kernels={}, compiled=False)
KINDS = [
    {"alibi": True},
    {"alibi": True, "positions": "kept"},
    {"pattern": "prefix:2+window:8"},
    {"alibi": True, "pattern": "window:8+strided:4"},
]


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def family(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_a_saved_folder_loads_as_it_was(tiny, family, kind, tiny_tokens, tmp_path):
    model, _, folder = tiny(family)
    before = model(tiny_tokens)
    model = Mechanism(**kind).apply(model, Context())
    after = model(tiny_tokens)
    assert (after - before).abs().max() > 1e-3  # not what it was
    checkpoint.save(model, tmp_path)
    again = checkpoint.load(tmp_path)
    assert torch.equal(again(tiny_tokens), after)
    assert again.config == model.config and again.config.family == family
    with pytest.raises(ValueError, match=f"paretune_{family}"):  # nobody reads it as the plain model
        import transformers

        transformers.AutoConfig.from_pretrained(tmp_path)
    assert checkpoint.read_config(folder).pattern is None


def test_every_layer_says_so(tiny, family):
    model, _, _ = tiny(family)
    transform = Mechanism(alibi=True, pattern="window:8")
    model = transform.apply(model, Context())
    said = transform.verify(model, PROBE)
    assert "all 2 layers fall by 0.25 to 0.00391 a token; no positions are added" in said[0]
    assert "all 2 layers see window:8" in said[1] and "%" in said[1]
    assert not any(name.startswith("wpe") for name, _ in model.named_parameters())
    layer = attention_layers(model)[1]
    right, layer.spec = layer.spec, attention_layers(model)[1].spec.__class__(1.0)
    with pytest.raises(NoEffectError, match="some layers have other slopes"):
        transform.verify(model, PROBE)
    layer.spec = right
    with pytest.raises(NoEffectError, match="some layers have another pattern"):
        Mechanism(pattern="window:9").verify(model, PROBE)


def test_a_pattern_that_skips_nothing_is_no_effect(tiny):
    model, _, _ = tiny("gpt2")
    transform = Mechanism(pattern="window:64")
    with pytest.raises(NoEffectError, match="skips nothing in a context of 64"):
        transform.verify(transform.apply(model, Context()), PROBE)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "changes nothing"),
        ({"pattern": "window:x"}, "cannot be read"),
        ({"alibi": True, "positions": "gone"}, "Known: removed, kept"),
        ({"pattern": "window:4", "positions": "kept"}, "always kept"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(UsageError, match=match):
        Mechanism(**options)


@pytest.mark.parametrize(
    ("pattern", "match"), [("window:65", "larger than the context"), ("blocks:48", "do not divide")]
)
def test_patterns_that_do_not_fit_leave_the_model_alone(tiny, tiny_tokens, pattern, match):
    model, _, _ = tiny("gpt2")
    before = model(tiny_tokens)
    with pytest.raises(UsageError, match=match):
        Mechanism(alibi=True, pattern=pattern).apply(model, Context())
    assert torch.equal(model(tiny_tokens), before)


def test_alibi_twice_is_refused(tiny):
    model, _, _ = tiny("gpt2")
    model = Mechanism(alibi=True).apply(model, Context())
    with pytest.raises(UsageError, match="has ALiBi already"):
        Mechanism(alibi=True).apply(model, Context())


@pytest.mark.parametrize("entry", [{"pattern": "window:x"}, {"alibi": 3}, {"slopes": 1}, "alibi"])
def test_damaged_entries_in_a_config(tiny, tmp_path, entry):
    model, _, _ = tiny("gpt2")
    checkpoint.save(Mechanism(alibi=True).apply(model, Context()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"paretune": entry}))
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path)


def test_kept_positions_of_mistral_keep_its_window_unless_told(tiny):
    model, _, _ = tiny("mistral")
    assert str(attention_layers(model)[0].spec.pattern) == "window:8"
    model = Mechanism(alibi=True).apply(model, Context())
    assert attention_layers(model)[0].spec.pattern == parse("window:8")
    assert attention_layers(model)[0].spec.slopes == alibi.slopes(4)


@pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("pattern", ["window:8+strided:4", "blocks:8", "window:8+random:1x64"])
def test_patterns_without_a_native_form_are_named(tiny, pattern):
    model, _, _ = tiny("gpt2")
    model = Mechanism(pattern=pattern).apply(model, Context())
    with pytest.raises(CannotLower, match=f"layer 0: native code has no {parse(pattern)!s}".replace("+", r"\+")):
        NativeRunner(model)


def test_presets_read_back():
    named = [n for n in HASHES if preset(n).changes_mechanism]
    assert len(named) >= 8
    for name in named:
        assert Recipe.from_dict(preset(name).to_dict()) == preset(name)
        assert preset(name).changes_numbers
