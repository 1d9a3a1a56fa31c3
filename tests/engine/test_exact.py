"""What claims to be exact against its reference: what is wrong must not pass, whoever computed the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from paretune.engine import exact
from paretune.engine.exact import TIE_MARGIN, check_exact
from paretune.engine.generate import naive_generate
from paretune.engine.load import load_recipe
from paretune.errors import NotExactError
from paretune.model import checkpoint
from paretune.ops.attention import reference
from paretune.ops.native.packed import PackedWeight
from paretune.recipe import Recipe, preset
from paretune.registry import ATTENTION
from paretune.transforms.attention import Attention
from paretune.transforms.fp8 import Float8
from paretune.transforms.groups import Groups
from paretune.transforms.int8 import Int8
from paretune.transforms.llm_int8 import LLMInt8
from paretune.transforms.nf4 import NormalFloat4
from paretune.transforms.precision import Precision

PROMPT = [5, 17, 99, 3, 42, 42, 8, 120, 64, 2, 77, 31, 90, 11, 56, 101]


def proper(q, k_new, v_new, layer_cache, spec):
    return reference.attention(q, k_new, v_new, layer_cache, spec)


def wrongly_scaled(q, k_new, v_new, layer_cache, spec):
    return reference.attention(q, k_new, v_new, layer_cache, dataclasses.replace(spec, scale=spec.scale / 2))


def wrong_in_decode_only(q, k_new, v_new, layer_cache, spec):
    y = reference.attention(q, k_new, v_new, layer_cache, spec)
    return y if q.size(2) > 1 else y * 1.5


def far_off(q, k_new, v_new, layer_cache, spec):
    return -4 * reference.attention(q, k_new, v_new, layer_cache, spec)


def far_off_in_decode_only(q, k_new, v_new, layer_cache, spec):
    y = reference.attention(q, k_new, v_new, layer_cache, spec)
    return y if q.size(2) > 1 else -4 * y


@pytest.fixture(autouse=True)
def forms(monkeypatch):
    for function in (proper, wrongly_scaled, wrong_in_decode_only, far_off, far_off_in_decode_only):
        monkeypatch.setitem(ATTENTION._own, function.__name__, f"{__name__}:{function.__name__}")


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def folder(request):
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def recipe_of(form, *more):
    return Recipe((Attention(form), *more))


@pytest.mark.parametrize("form", ["eager", "sdpa", "proper"])
def test_what_is_exact_passes(folder, form):
    said = check_exact(load_recipe(folder, recipe_of(form)), PROMPT)
    assert said == ["12 greedy tokens equal the reference's"]
    assert check_exact(load_recipe(folder, recipe_of(form)), PROMPT, 3) == ["3 greedy tokens equal the reference's"]


@pytest.mark.parametrize("form", ["wrongly_scaled", "wrong_in_decode_only"])
def test_what_is_not_exact_is_refused(folder, form):
    with pytest.raises(NotExactError, match=f"{form}, eager is not exact: token \\d+ differs") as failure:
        check_exact(load_recipe(folder, recipe_of(form)), PROMPT)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("more", [(Precision("bf16"),), (Precision("fp16"),), (Int8(),), (Precision("bf16"), Int8())])
def test_rounded_numbers_are_held_to_twice_the_references_error(folder, more):
    """Exact forms stay within it; wrong ones, also in the decode step alone, do not."""
    for form in ("sdpa", "proper"):
        said = check_exact(load_recipe(folder, recipe_of(form, *more)), PROMPT)
        assert len(said) == 1 and "logit error against fp32" in said[0]
    for form in ("wrongly_scaled", "wrong_in_decode_only"):
        with pytest.raises(NotExactError, match=r"is off by .* from fp32, its reference form by"):
            check_exact(load_recipe(folder, recipe_of(form, *more)), PROMPT)


# Formats whose reference is one step of many rows, and those that need few rows too.
WHOLE = {
    "groups": Groups(),
    "groups7": Groups(bits=7, group=64),
    "minimum": Groups(minimum=True),
    "byte inputs": Groups(bits=8, group=128, activation_bits=8),
    "nf4": NormalFloat4(),
    "fp8": Float8(),
}
STEPWISE = {"int8": Int8(), "llm_int8": LLMInt8(), "bf16": Precision("bf16"), "fp16": Precision("fp16")}


@pytest.mark.parametrize("name", [*WHOLE, *STEPWISE])
def test_the_reference_takes_few_rows_only_where_they_round_otherwise(folder, name):
    """Whole and stepwise give the same error where the format says that rows do not matter."""
    loaded = load_recipe(folder, recipe_of("sdpa", (WHOLE | STEPWISE)[name]))
    reference = exact._Reference(loaded, PROMPT, 12, 2, None)
    runner = reference.recipe.runner(reference.twin())
    assert exact._rows_matter(runner) == (name in STEPWISE)
    stepwise = exact._last_logits(runner, torch.tensor([PROMPT] * 2), reference.half, 0, exact.FEW_ROWS)
    assert reference.allowed() == pytest.approx(reference.error_of(stepwise), rel=1e-3)


@pytest.mark.parametrize("name", [*WHOLE, *STEPWISE])
@pytest.mark.parametrize("form", ["far_off", "far_off_in_decode_only"])
def test_a_planted_error_is_caught_under_every_format(folder, name, form):
    """So large that it stands out of the rounding of 4 bits too, of which a tiny random model has plenty."""
    more = (WHOLE | STEPWISE)[name]
    assert check_exact(load_recipe(folder, recipe_of("sdpa", more)), PROMPT)
    with pytest.raises(NotExactError, match=r"is off by .* from fp32, its reference form by"):
        check_exact(load_recipe(folder, recipe_of(form, more)), PROMPT)


@pytest.mark.parametrize("where", ["data", "scale"])
@pytest.mark.parametrize(
    "name", ["native_int4", "native_int8", "native_q8_0", "native_w8a8", "native_w7a7", "native_nf4"]
)
def test_an_error_planted_in_packed_weights_is_caught(folder, tmp_path, name, where):
    """The head of one trial; the reference is that of the trial before it, whose weights are right."""
    assert check_exact(load_recipe(folder, preset(name), check=False), PROMPT, store=tmp_path)
    loaded = load_recipe(folder, preset(name), check=False)
    packed = loaded.runner.model.head.weight
    assert isinstance(packed, PackedWeight) and packed.scale is not None
    if where == "data":
        packed.packed.copy_(packed.packed.flip(0))
    else:
        packed.scale.mul_(3)
    with pytest.raises(NotExactError, match=r"is off by .* from fp32, its reference form by"):
        check_exact(loaded, PROMPT, store=tmp_path)


def test_a_nan_is_not_exact(tiny_gpt2_folder):
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa", Precision("bf16")))
    loaded.runner.model.ln_f.weight.data[0] = float("nan")
    with pytest.raises(NotExactError):
        check_exact(loaded, PROMPT)


def test_prompts_of_one_token_and_of_the_whole_context(tiny_gpt2_folder):
    for more in ((), (Int8(),)):
        assert check_exact(load_recipe(tiny_gpt2_folder, recipe_of("sdpa", *more)), [7])
    whole = (PROMPT * 4)[:64]
    assert check_exact(load_recipe(tiny_gpt2_folder, recipe_of("sdpa", Int8())), whole)


@pytest.mark.parametrize(
    ("margin", "at", "passes"),
    [(TIE_MARGIN / 2, 4, True), (TIE_MARGIN * 2, 4, False), (TIE_MARGIN / 2, 0, True)],
)
def test_a_tie_is_no_difference(tiny_gpt2_folder, monkeypatch, margin, at, passes):
    """The oracle takes the other token of two equal ones: what follows is another text, and not compared."""
    real = exact.naive_generate

    def other(model, prompt, n, guess):
        tokens, margins = real(model, prompt, n, guess)
        tokens = [*tokens[:at], *((t + 1) % 131 for t in tokens[at:])]
        return tokens, [*margins[:at], margin, *([1.0] * (n - at - 1))]

    monkeypatch.setattr(exact, "naive_generate", other)
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa"))
    if passes:
        (said,) = check_exact(loaded, PROMPT)
        assert f"up to a tie at token {at + 1} (margin 5.0e-05)" in said
    else:
        with pytest.raises(NotExactError, match=f"token {at + 1} differs, with a margin of 0.0002"):
            check_exact(loaded, PROMPT)


# --- the reference that trials share --------------------------------------------------------------


@pytest.fixture
def unloadable(monkeypatch):
    """Nothing is loaded a second time."""

    def refuse(*args, **options):
        pytest.fail("a model was loaded for the check")

    def switch():
        monkeypatch.setattr(exact, "load_recipe", refuse)
        monkeypatch.setattr(checkpoint, "load", refuse)

    return switch


@pytest.mark.parametrize("name", ["baseline", "native", "int8", "native_int8", "bf16_int8", "kv8"])
def test_a_trial_is_checked_on_its_own_weights_once_the_truth_is_known(folder, tmp_path, unloadable, name):
    check_exact(load_recipe(folder, preset("baseline")), PROMPT, store=tmp_path)
    loaded = load_recipe(folder, preset(name))
    unloadable()
    assert check_exact(loaded, PROMPT, store=tmp_path)


@pytest.mark.parametrize(
    "name", ["int8", "native", "native_int8", "native_bf16", "native_int4", "native_nf4", "native_w7a7"]
)
def test_the_twin_of_ones_own_weights_is_the_reference_form(pocket_folder, name):
    """Bit for bit what the recipe without its exact parts gives when it is loaded from the folder."""
    loaded = load_recipe(pocket_folder, preset(name), check=False)
    plain = loaded.recipe.without_exact()
    runners = plain.runner(exact._undone(loaded)), load_recipe(pocket_folder, plain, check=False).runner
    ours, theirs = (exact._last_logits(runner, torch.tensor([PROMPT]), 4, 0, rows=1) for runner in runners)
    assert torch.equal(ours, theirs)
    layers = [m for m in loaded.runner.model.modules() if hasattr(m, "spec")]
    assert layers and all(m.attention is ATTENTION.get("sdpa") for m in layers)  # what is timed is as it was


@pytest.mark.parametrize("form", ["wrongly_scaled", "wrong_in_decode_only"])
@pytest.mark.parametrize("more", [(), (Int8(),)])
def test_a_wrong_form_is_refused_by_the_stored_reference_too(folder, tmp_path, form, more):
    for right in (recipe_of("sdpa"), recipe_of("sdpa", *more)):
        assert check_exact(load_recipe(folder, right), PROMPT, store=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NotExactError):
        check_exact(load_recipe(folder, recipe_of(form, *more)), PROMPT, store=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_the_stored_reference_is_what_is_compared_with(tiny_gpt2_folder, tmp_path):
    """Not computed again: another answer in the file is another verdict."""
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa", Int8()))
    said = check_exact(loaded, PROMPT, store=tmp_path)
    assert said == check_exact(loaded, PROMPT, store=tmp_path) == check_exact(loaded, PROMPT)
    (path,) = tmp_path.glob("error-*")
    np.savez(path, error=np.array(0.0))
    with pytest.raises(NotExactError, match="its reference form by 0"):
        check_exact(loaded, PROMPT, store=tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", None])
def test_a_damaged_reference_is_computed_again(tiny_gpt2_folder, tmp_path, damage):
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa"))
    said = check_exact(loaded, PROMPT, store=tmp_path)
    for path in tmp_path.iterdir():
        if damage is None:
            np.savez(path, tokens=np.zeros(3), margins=np.array(["a"]), logits=np.zeros((2, 2)))
        else:
            path.write_bytes(damage)
    assert check_exact(loaded, PROMPT, store=tmp_path) == said
    with np.load(next(tmp_path.glob("greedy-*"))) as file:
        assert file["tokens"].tolist() == naive_generate(checkpoint.load(tiny_gpt2_folder), PROMPT, 12)[0]


def test_references_of_other_prompts_models_and_recipes_are_others(tiny_gpt2_folder, tiny_llama_folder, tmp_path):
    for folder in (tiny_gpt2_folder, tiny_llama_folder):
        for prompt in (PROMPT, PROMPT[1:]):
            check_exact(load_recipe(folder, recipe_of("sdpa")), prompt, store=tmp_path)
    assert len(list(tmp_path.glob("greedy-*"))) == len(list(tmp_path.glob("truth-*"))) == 4
    for more in (Int8(), Precision("bf16")):
        check_exact(load_recipe(tiny_gpt2_folder, recipe_of("sdpa", more)), PROMPT, store=tmp_path)
    assert len(list(tmp_path.glob("error-*"))) == 2 and len(list(tmp_path.glob("truth-*"))) == 4


def test_rows_of_a_batch_are_held_to_the_reference_of_that_batch(tiny_gpt2_folder, tmp_path):
    loaded = load_recipe(tiny_gpt2_folder, recipe_of("sdpa", Int8()))
    for batch_size in (1, 3):
        assert check_exact(loaded, PROMPT, shape=(batch_size, 40), store=tmp_path)
    assert len(list(tmp_path.glob("error-*"))) == 2
