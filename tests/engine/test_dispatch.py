"""The table of choice: right at and between grid points, honest about memory and quality, and views share weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from paretune.engine.dispatch import (
    ASK_FROM_BYTES,
    PLAN,
    Dispatcher,
    Entry,
    Form,
    Table,
    same_numbers,
    shares_weights,
)
from paretune.engine.generate import generate
from paretune.engine.load import load_recipe
from paretune.errors import UsageError
from paretune.recipe import Recipe, preset
from paretune.transforms.attention import attention_layers

MB = 1 << 20


def recipe(*transforms, **engine):
    return Recipe.from_dict({"transforms": list(transforms), "engine": engine})


def attention(form):
    return {"name": "attention", "form": form}


SDPA, EAGER, NATIVE = (recipe(attention(form)) for form in ("sdpa", "eager", "native"))
WINDOW = recipe({"name": "mechanism", "pattern": "prefix:2+window:8"}, attention("sdpa"))
INT8 = preset("native_int8")


def table(**changes):
    """Two batch sizes x three lengths: `eager` first for short single requests, `native` for long batches."""
    forms = {
        PLAN: Form(PLAN, SDPA, "lossless"),
        "eager": Form("eager", EAGER, "lossless"),
        "native": Form("native", NATIVE, "lossless"),
        "window": Form("window", WINDOW, "bounded", 0.004, longest=700),
    }
    plan, eager, native, window = (Entry(n, 4 * MB) for n in (PLAN, "eager", "native", "window"))
    cells = (
        ((eager, plan, native), (plan, eager), (window, native, plan)),
        ((plan,), (native, plan), (native, plan, eager)),
    )
    return Table(**{"batch_sizes": (1, 16), "lengths": (128, 512, 2048), "forms": forms, "cells": cells} | changes)


@pytest.mark.parametrize(
    ("batch_size", "length", "expected"),
    [
        (1, 128, "eager"), (1, 512, PLAN), (1, 2048, "native"), (16, 128, PLAN), (16, 512, "native"),
        # Between grid points the nearer by ratio: 128 and 512 meet at 256, 1 and 16 at 4.
        (1, 1, "eager"), (1, 255, "eager"), (1, 256, PLAN), (3, 255, "eager"), (4, 255, PLAN), (4, 256, "native"),
        (1, 1023, PLAN), (1, 1024, "native"), (99, 9999, "native"),
    ],
)  # fmt: skip
def test_the_choice_at_and_between_grid_points(batch_size, length, expected):
    choice = table().choose(batch_size, length)
    assert choice.form == expected
    assert choice.recipe == table().forms[expected].recipe.name and choice.label == "lossless"
    assert "regime of batch" in str(choice)


def test_a_form_that_changes_numbers_runs_only_where_the_request_permits_it():
    assert table().choose(1, 2048).form == "native"
    assert table().choose(1, 2048, "lossless").form == "native"
    # Its quality was measured up to 700 tokens: it says nothing of longer ones.
    assert table().choose(1, 2048, "bounded").form == "native"
    short = table(lengths=(32, 64, 256))
    assert short.choose(1, 600, "bounded").form == "window" and short.choose(1, 701, "bounded").form == "native"
    assert short.choose(1, 600, "bounded").label == "bounded"
    with pytest.raises(UsageError, match="unknown quality level 'best'"):
        table().choose(1, 128, "best")


def test_a_plan_runs_its_own_recipe_however_long_a_request_is():
    own = Form(PLAN, WINDOW, "bounded", 0.004, longest=300)
    long = table(forms=dict(table().forms) | {PLAN: own})
    assert long.choose(1, 290).reason == "ranked first here"
    beyond = long.choose(1, 600, available=[PLAN])
    assert beyond.form == PLAN and "longer than the 300 tokens" in beyond.reason
    with pytest.raises(UsageError, match="no form of this plan keeps"):
        long.choose(1, 600, "bounded", available=[PLAN])


def test_a_plan_that_changed_numbers_gives_lossless_ones_from_a_second_copy_alone():
    forms = {
        PLAN: Form(PLAN, INT8, "bounded", 0.002),
        "as it was": Form("as it was", SDPA, "lossless", weights_bytes=3),
    }
    cells = (((Entry(PLAN, 1), Entry("as it was", 1)),),)
    one = Table((1,), (64,), forms, cells)
    assert one.choose(1, 64).form == one.choose(1, 64, "bounded").form == PLAN
    assert one.choose(1, 64, "lossless").form == "as it was"
    with pytest.raises(UsageError, match=r"no form of this plan keeps.*second copy"):
        one.choose(1, 64, "lossless", available=[PLAN])


def test_memory_is_asked_for_large_requests_only_and_decides():
    asked = []

    def left(n_bytes):
        def answer():
            asked.append(n_bytes)
            return n_bytes

        return answer

    assert table().choose(1, 128, memory_left=left(0)).form == "eager" and not asked
    # 4 MB at batch 16 and 2048 tokens: from above 100 times as much at ten times the length.
    big = ASK_FROM_BYTES
    sizes = {PLAN: 2 * big, "native": 9 * big, "eager": 3 * big}
    cells = copy.deepcopy(table().cells)
    cells = (cells[0], (*cells[1][:2], tuple(Entry(e.form, sizes[e.form]) for e in cells[1][2])))
    one = table(cells=cells)
    assert one.choose(16, 2048, memory_left=left(10 * big)).form == "native"
    choice = one.choose(16, 2048, memory_left=left(8 * big))
    assert choice.form == PLAN and "fits into" in choice.reason
    tight = one.choose(16, 2048, memory_left=left(big))
    assert tight.form == PLAN and "smallest" in tight.reason
    assert one.choose(16, 20480, memory_left=left(8 * big)).reason.startswith("the smallest")
    assert asked == [10 * big, 8 * big, big, 8 * big], "once a request"


def test_a_table_comes_back_from_json():
    one = table()
    again = Table.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
    assert again == one
    assert again.choose(4, 255) == one.choose(4, 255)


def damages():
    def forms(change):
        def damage(data):
            change(data["forms"][1])

        return damage

    yield "no table", lambda d: d.clear()
    yield "unknown key", lambda d: d.update(more=1)
    yield "order", lambda d: d.update(lengths=[512, 128, 2048])
    yield "not whole", lambda d: d.update(batch_sizes=[1.0, 16.0])
    yield "empty", lambda d: d.update(batch_sizes=[])
    yield "shape", lambda d: d["cells"].pop()
    yield "unknown form", lambda d: d["cells"][0][0].append({"form": "?", "n_bytes": 1})
    yield "no plan", lambda d: d["cells"][0].__setitem__(0, [{"form": "eager", "n_bytes": 1}])
    yield "entry", lambda d: d["cells"][0][0][0].update(n_bytes=-1)
    yield "entry key", lambda d: d["cells"][0][0][0].pop("n_bytes")
    yield "label", forms(lambda f: f.update(label="fine"))
    yield "no loss", forms(lambda f: f.update(label="bounded"))
    yield "recipe", forms(lambda f: f["recipe"]["transforms"].append({"name": "int7"}))
    yield "bytes", forms(lambda f: f.update(weights_bytes="3"))


@pytest.mark.parametrize("damage", [d for _, d in damages()], ids=[n for n, _ in damages()])
def test_a_damaged_table_is_refused_in_one_line(damage):
    data = json.loads(json.dumps(table().to_dict()))
    damage(data)
    with pytest.raises(UsageError) as caught:
        Table.from_dict(data)
    assert "\n" not in str(caught.value) and caught.value.cure


def test_what_shares_weights_and_what_gives_the_same_numbers():
    assert shares_weights(EAGER, SDPA) and same_numbers(EAGER, SDPA)
    assert shares_weights(WINDOW, SDPA) and not same_numbers(WINDOW, SDPA)
    assert not shares_weights(SDPA, WINDOW), "a mechanism is not taken back"
    assert not shares_weights(preset("native"), SDPA), "native code packs the weights"
    assert same_numbers(preset("native"), SDPA)
    assert not shares_weights(preset("int8"), SDPA) and not same_numbers(preset("native_int8_kv8"), INT8)


def pointers(runner):
    model = runner.model
    return {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize("plan", ["sdpa", "native"])
def test_forms_are_views_of_one_model_and_give_what_they_would_alone(tiny_gpt2_folder, plan, request):
    base = SDPA if plan == "sdpa" else preset("native")
    if reason := base.requires("cpu") or NATIVE.requires("cpu"):
        pytest.skip(reason)
    window = Recipe.from_dict({**WINDOW.to_dict(), "engine": base.to_dict()["engine"]})
    others = {"window": window} | ({"eager": EAGER, "native": NATIVE} if plan == "sdpa" else {})
    forms = {PLAN: Form(PLAN, base, "lossless")}
    forms |= {
        n: Form(n, r, "bounded" if n == "window" else "lossless", 0.1 if n == "window" else None)
        for n, r in others.items()
    }
    forms["copy"] = Form("copy", preset("int8"), "bounded", 0.2, weights_bytes=1000)
    cells = tuple(tuple((Entry(name, 1), *([Entry(PLAN, 1)] if name != PLAN else [])) for name in forms) for _ in (1,))
    one = Table((1,), tuple(10 * 4**i for i in range(len(forms))), forms, cells)
    loaded = load_recipe(tiny_gpt2_folder, base)
    known = Dispatcher(loaded, one, lambda: tiny_gpt2_folder)
    assert set(known.runners) == {*others, PLAN}, "no second copy without a grant"
    assert all(pointers(r) <= pointers(loaded.runner) for r in known.runners.values())
    prompt = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]
    for i, name in enumerate(forms):
        runner, choice = known.runner_for(1, 10 * 4**i, "bounded")
        assert choice.form == (name if name != "copy" else PLAN)
        if name == "copy":
            continue
        alone = load_recipe(tiny_gpt2_folder, forms[name].recipe).runner
        ours, theirs = (generate(r, prompt, 6).generations[0].tokens for r in (runner, alone))
        assert ours == theirs
        logits = [r.forward(torch.tensor(prompt), r.new_cache(1, 20), "last") for r in (runner, alone)]
        torch.testing.assert_close(*logits, rtol=0, atol=0)
    # The plan's own model is what it was.
    assert {m.spec.pattern.is_dense for m in attention_layers(loaded.runner.model)} == {True}
    assert known.runners["window"].config.pattern == "prefix:2+window:8"
    granted = Dispatcher(loaded, one, lambda: tiny_gpt2_folder, spare_bytes=1000)
    runner, choice = granted.runner_for(1, 10 * 4 ** (len(forms) - 1), "bounded")
    assert choice.form == "copy" and not pointers(runner) & pointers(loaded.runner)
