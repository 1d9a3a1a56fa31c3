"""The native attention operator, and every mechanism in every form: outputs, gradients, decode, batches."""

from __future__ import annotations

import os

import pytest
import torch
from torch.testing import assert_close

from paretune import native_build
from paretune.engine.cache import KVCache
from paretune.engine.runners.eager import EagerRunner
from paretune.ops.attention import alibi, native, reference, sdpa
from paretune.ops.attention.pattern import parse
from paretune.ops.attention.spec import AttentionSpec
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

NO_COMPILER = native_build.unavailable_reason() is not None
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
FORMS = ["eager", "sdpa", pytest.param("native", marks=needs_compiler)]
FUNCTIONS = {"eager": reference.attention, "sdpa": sdpa.attention, "native": native.attention}
PATTERNS = (
    "causal",
    "window:5",
    "window:300",
    "blocks:64",
    "strided:8+window:3",
    "prefix:70+window:100",
    "prefix:3+window:70+random:2x64@5",
    "blocks:64+strided:16+prefix:2",
)


def inputs(B, H, Hkv, K, D, n=None, dtype=torch.float32):
    n = K if n is None else n
    return [torch.randn(s).to(dtype) for s in ((B, H, K, D), (B, Hkv, n, D), (B, Hkv, n, D))]


def plain(q, k, v, spec):
    """The formula in fp64, mask and bias from the pattern's and the paper's definitions."""
    H, K, n = q.size(1), q.size(2), k.size(2)
    k, v = (t.double().repeat_interleave(H // k.size(1), 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * spec.scale
    if spec.slopes is not None:
        distance = torch.arange(n - K, n)[:, None] - torch.arange(n)[None]
        scores = scores - torch.tensor(spec.slopes).double()[:, None, None] * distance
    return scores.masked_fill(~spec.pattern.dense(n)[n - K :], float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("has_alibi", [False, True])
def test_every_mechanism_equals_the_formula(form, pattern, has_alibi):
    """Odd shapes: grouped heads, head sizes that fill no vector, lengths that fill no block."""
    for H, Hkv, K, D in ((2, 2, 450, 64), (4, 2, 333, 26), (2, 1, 130, 13), (1, 1, 1, 8), (20, 1, 77, 16)):
        spec = AttentionSpec(0.3, parse(pattern), alibi.slopes(H) if has_alibi else None)
        q, k, v = inputs(1, H, Hkv, K, D)
        assert_close(FUNCTIONS[form](q, k, v, None, spec).double(), plain(q, k, v, spec), atol=2e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("pattern", ["window:100", "prefix:3+window:70", "blocks:64+prefix:70"])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_a_ring_is_read_where_it_lies(pattern, has_alibi, monkeypatch):
    """Pieces of a long text through a ring that wraps: the formula's numbers, and no mask."""
    found, n, H, D = parse(pattern), 1200, 2, 16
    cache = KVCache(n_layer=1, batch_size=1, n_kv_head=1, capacity=n, head_dim=D, dtype=torch.float32, kept=found.kept)
    assert cache.ring and cache.n_slots < n
    view = cache.layers[0]
    view.k.fill_(float("nan")), view.v.fill_(float("nan"))  # slots that hold nothing yet are not read
    spec = AttentionSpec(0.3, found, alibi.slopes(H) if has_alibi else None)
    q, k, v = inputs(1, H, 1, n, D)
    wanted = plain(q, k, v, spec)
    monkeypatch.setattr(sdpa, "attention", None)
    at = 0
    for K in (200, 256, 7, 256, 2, 255, 224):
        cache.begin_(K)
        piece = slice(at, at + K)
        out = native.attention(q[:, :, piece], k[:, :, piece], v[:, :, piece], view, spec)
        cache.commit_()
        assert_close(out.double(), wanted[:, :, piece], atol=2e-5, rtol=1e-5)
        at += K
    assert at == n


@pytest.mark.parametrize("form", ["sdpa", pytest.param("native", marks=needs_compiler)])
@pytest.mark.parametrize("pattern", ["causal", "window:5", "prefix:3+window:70+random:2x64@5"])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_gradients_equal_the_references(form, pattern, has_alibi):
    spec = AttentionSpec(0.3, parse(pattern), alibi.slopes(4) if has_alibi else None)
    tensors, weight = inputs(2, 4, 2, 150, 16), torch.randn(2, 4, 150, 16)
    found = []
    for function in (reference.attention, FUNCTIONS[form]):
        leaves = [t.clone().requires_grad_() for t in tensors]
        (function(*leaves, None, spec) * weight).sum().backward()
        found.append([t.grad for t in leaves])
    for wanted, got in zip(*found, strict=True):
        assert wanted.abs().max() > 0.01
        assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_in_16_bits_is_as_near_as_the_reference(dtype):
    spec = AttentionSpec(0.25, parse("prefix:3+window:70"), alibi.slopes(4))
    q, k, v = inputs(2, 4, 2, 200, 32, dtype=dtype)
    exact = plain(q, k, v, spec)
    errors = [
        float((f(q, k, v, None, spec).double() - exact).abs().max()) for f in (native.attention, reference.attention)
    ]
    assert 0 < errors[0] <= 1.1 * errors[1]


@needs_compiler
def test_native_takes_views_and_never_reads_what_is_hidden():
    spec = AttentionSpec(0.3, parse("window:20"))
    qkv = torch.randn(2, 300, 3, 4, 16)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    wanted = native.attention(*(t.contiguous() for t in (q, k, v)), None, spec)
    assert torch.equal(native.attention(q, k, v, None, spec), wanted)
    poisoned = [t.clone() for t in (k, v)]
    for t in poisoned:
        t[:, :, :100] = float("nan")
    late = native.attend(q[:, :, 150:].contiguous(), *poisoned, "window:20", [], 0.3, 150)
    assert late.isfinite().all()
    assert_close(late, wanted[:, :, 150:])


@needs_compiler
def test_native_does_not_depend_on_threads_and_compiles(monkeypatch):
    spec = AttentionSpec(0.3, parse("prefix:3+window:70"), alibi.slopes(4))
    tensors = inputs(1, 4, 4, 500, 16)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(native.attention(*tensors, None, spec))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    native._parallel.cache_clear()
    monkeypatch.setattr(native, "_process", -1)  # as in a forked child: a team of our own
    assert native._parallel(os.getpid()) is None
    assert torch.equal(found[0], native.attention(*tensors, None, spec))
    native._parallel.cache_clear()
    torch.library.opcheck(
        native.attend,
        (*(t.requires_grad_() for t in inputs(1, 2, 2, 40, 8)), "window:7", [0.5, 0.25], 0.3, 0),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


MECHANISMS = [
    {"alibi": True},
    {"alibi": True, "positions": "kept", "pattern": "prefix:3+window:9"},
    {"pattern": "window:5+strided:4"},
    {"pattern": "window:7+random:1x64"},
    {"pattern": "window:9"},
    {"pattern": "blocks:16+strided:8"},
    {"alibi": True, "pattern": "window:9"},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
def test_training_gradients_of_models_equal_the_references(tiny_factory, form, mechanism):
    """A step of training: the loss and the gradient of every parameter, against the reference form."""
    from paretune.model import checkpoint

    _, _, folder = tiny_factory("gpt2", n_positions=128)
    tokens = torch.randint(0, 131, (2, 81))
    found = []
    for name in ("eager", form):
        model = Mechanism(**mechanism).apply(checkpoint.load(folder), Context())
        model = Attention(name).apply(model, Context())
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits = model(tokens[:, :-1], None, "all")
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1))
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (wanted_loss, wanted), (loss, got) = found
    assert_close(loss, wanted_loss, atol=1e-5, rtol=1e-5)
    assert wanted.keys() == got.keys() and all(g is not None for g in wanted.values())
    for name, gradient in wanted.items():
        assert_close(got[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert max(float(g.abs().max()) for n, g in wanted.items() if "c_attn" in n) > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)
@torch.inference_mode()
def test_models_prefill_decode_and_batch(tiny, form, family, mechanism):
    """Any way of cutting a text into steps, alone or beside others, equals the reference without a cache."""
    model, _, _ = tiny(family, **({"n_positions": 128} if family == "gpt2" else {}))
    model = Mechanism(**mechanism).apply(model, Context())
    tokens = torch.randint(0, 131, (2, 90))
    wanted = model(tokens, None, "all")
    runner = EagerRunner(Attention(form).apply(model, Context()))
    assert_close(runner.model(tokens, None, "all"), wanted, atol=3e-5, rtol=1e-4)
    cache = runner.new_cache(2, 90)
    got = [runner.forward(part, cache, "all") for part in tokens.split([70, 1, 1, 12, 6], dim=1)]
    assert_close(torch.cat(got, dim=1), wanted, atol=3e-5, rtol=1e-4)
    cache = runner.new_cache(2, 90)
    cache.stage_([70, 30])
    first = runner.forward(tokens[:, :70], cache)
    assert_close(first[:, 0], torch.stack([wanted[0, 69], wanted[1, 29]]), atol=3e-5, rtol=1e-4)
    step = runner.forward(torch.stack([tokens[0, 70:71], tokens[1, 30:31]]), cache)
    assert_close(step[:, 0], torch.stack([wanted[0, 70], wanted[1, 30]]), atol=3e-5, rtol=1e-4)


def test_alibi_equals_bloom():
    """The whole attention of transformers' Bloom, on its own weights."""
    import transformers
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    config = transformers.BloomConfig(hidden_size=48, n_head=6, attention_dropout=0.0, hidden_dropout=0.0)
    layer = BloomAttention(config, layer_idx=0).eval()
    x, T = torch.randn(2, 17, 48), 17
    bias = build_alibi_tensor(torch.ones(2, T, dtype=torch.int64), 6, torch.float32)
    hidden = torch.full((T, T), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, T, T)
    with torch.no_grad():
        wanted = layer(x, torch.zeros_like(x), bias, hidden)[0]
        qkv = layer.query_key_value(x).view(2, T, 6, 3, 8)
        q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
        spec = AttentionSpec(8**-0.5, slopes=alibi.slopes(6))
        for name in ("eager", "sdpa", *([] if NO_COMPILER else ["native"])):
            got = layer.dense(FUNCTIONS[name](q, k, v, None, spec).transpose(1, 2).reshape(2, T, 48))
            assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    """It has lost PyTorch's: the operator must neither wait for them nor for its parent's team."""
    tensors, spec = inputs(1, 4, 4, 300, 16), AttentionSpec(0.3)
    wanted = native.attention(*tensors, None, spec)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if torch.equal(native.attention(*tensors, None, spec), wanted) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
