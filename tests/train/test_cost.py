"""Training cost: what fits is decided before it is tried."""

from __future__ import annotations

import pytest

from paretune import hardware
from paretune.model import checkpoint
from paretune.recipe import Recipe, preset
from paretune.train import cost

CONFIG = checkpoint.published("gpt2")
N = 124_000_000


def recipe(*transforms) -> Recipe:
    return Recipe.from_dict({"transforms": [*transforms, {"name": "attention", "form": "sdpa"}]})


def test_a_batch_that_does_not_fit_goes_through_in_parts():
    whole = cost.step_bytes(CONFIG, N, 16, 512, False)
    assert cost.micro_batch(CONFIG, N, 16, 512, 2 * whole, False) == 16
    part = cost.micro_batch(CONFIG, N, 16, 512, int(0.6 * whole), False)
    assert 1 <= part < 16 and 16 % part == 0
    assert cost.step_bytes(CONFIG, N, part, 512, False) <= 0.85 * 0.6 * whole
    assert cost.micro_batch(CONFIG, N, 16, 512, 1 << 30, False) == 0
    assert cost.step_bytes(CONFIG, N, 16, 512, True) > whole


def test_which_forms_keep_their_scores():
    assert preset("eager_attn").keeps_scores
    assert Recipe.from_dict({"transforms": [{"name": "attention", "form": "eager"}]}).keeps_scores
    assert not recipe().keeps_scores
    assert recipe({"name": "mechanism", "alibi": True}).keeps_scores


@pytest.mark.slow
def test_rows_in_processes_of_their_own(tiny_gpt2_folder, tmp_path, monkeypatch):
    mechanisms = {"standard": preset("eager_attn"), "flash": recipe()}
    rows = cost.training_costs(
        tiny_gpt2_folder, mechanisms, batch_sizes=(4, 2), length=16, n_blocks=1, log_folder=tmp_path
    )
    assert [(r["batch_size"], r["mechanism"]) for r in rows] == [
        (2, "standard"),
        (2, "flash"),
        (4, "standard"),
        (4, "flash"),
    ]
    assert all(r["step_sec"] > 0 and r["peak_bytes"] > 1 << 26 and r["cause"] == "" for r in rows)
    assert rows[0]["speedup"] == 1 and all(r["n"] == 1 for r in rows)
    monkeypatch.setattr(hardware, "memory_left", lambda device: 1 << 20)
    rows = cost.training_costs(tiny_gpt2_folder, mechanisms, batch_sizes=(2,), length=16, log_folder=tmp_path)
    assert all(r["cause"].startswith("out of memory: one window needs") and r["step_sec"] is None for r in rows)


def test_every_size_has_its_share_of_the_budget(tiny_gpt2_folder, tmp_path, monkeypatch):
    """The clock moves by a second a window: without shares the small sizes would take all of it."""
    now = [0.0]

    class Process:
        def __init__(self, *args, **options):
            pass

        def ask(self, verb, timeout, **request):
            now[0] += request.get("batch_size", 0)
            return {"sec": float(request.get("batch_size", 0)), "peak_bytes": 1}

        def pause(self):
            pass

        resume = close = pause

    monkeypatch.setattr(cost, "TrialProcess", Process)
    monkeypatch.setattr(cost.clock, "now", lambda: now[0])
    rows = cost.training_costs(
        tiny_gpt2_folder,
        {"a": recipe()},
        batch_sizes=(2, 4, 8),
        length=8,
        n_blocks=6,
        budget_sec=50,
        log_folder=tmp_path,
    )
    assert [r["batch_size"] for r in rows] == [2, 4, 8]
    assert all(r["n"] >= 2 for r in rows), [(r["batch_size"], r["n"]) for r in rows]
