"""Predictions for this machine: a cost model gives back what it was made from, and reads between and beyond it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_profile import CEILINGS

from paretune.measure import predict_here
from paretune.measure.predict import Sizes
from paretune.measure.predict_here import CostModel, cost_model, product_rates
from paretune.model import checkpoint
from paretune.model.layers import Linear

# 10 GB/s at 1 MB, 20 GB/s at 16 MB.
PRODUCTS = ({"bytes": 1e6, "bytes_per_sec": 1e10}, {"bytes": 1.6e7, "bytes_per_sec": 2e10})
CONFIG = checkpoint.published("gpt2")


def test_rates_between_the_sizes_and_beyond_them():
    model = CostModel(PRODUCTS, 1e10, 0.0)
    assert model.product_sec(1e6) == pytest.approx(1e-4) and model.product_sec(1.6e7) == pytest.approx(8e-4)
    assert model.product_sec(4e6) == pytest.approx(4e6 / (1e10 * 2**0.5))  # half way on a logarithmic scale
    assert model.product_sec(1e5) == pytest.approx(1e-5) and model.product_sec(3.2e7) == pytest.approx(1.6e-3)


@pytest.mark.parametrize("has_parts", [True, False])
def test_a_cost_model_gives_back_the_model_it_was_made_from(tiny_gpt2_folder, has_parts):
    """Eager from its parts, compile from its kernels: whole = products + attention + operators."""
    config = checkpoint.read_config(tiny_gpt2_folder)
    exact = CostModel(PRODUCTS, 5e9, 2e-5)
    layers = [m.weight for m in checkpoint.build(config).modules() if isinstance(m, Linear)]
    products = sum(exact.product_sec(4 * w.out_features * w.in_features) for w in layers)
    attention = 4 * Sizes.of(config).kv_values * 10 / 5e9
    whole = exact.tpot_sec(config, 10)
    parts = [
        {"part": "expansion", "sec": products, "product_weight_bytes": 1},
        {"part": "mlp", "sec": products, "product_weight_bytes": 1},  # a sum: not counted again
        {"part": "fused_attention", "sec": attention, "product_weight_bytes": 0},
    ]
    kinds = [
        {"kind": "GEMV", "sec": products},
        {"kind": "attention", "sec": attention},
        {"kind": "dispatch", "sec": 1.0},
    ]
    profiled = {
        "input_len": 9,
        "whole": {"sec": whole},
        "parts": parts if has_parts else [],
        "kernel_classes": kinds,
    }
    found = cost_model(profiled, PRODUCTS, config)
    assert found.operator_sec == pytest.approx(2e-5) and found.attention_rate == pytest.approx(5e9)
    assert found.tpot_sec(config, 10) == pytest.approx(whole) and found.spread == (1.0, 1.0)
    varied = profiled | {"whole": {"sec": whole, "samples": [[whole * f for f in (0.5, 0.9, 1.0)], [whole * 2] * 9]}}
    low, high = cost_model(varied, PRODUCTS, config).spread
    assert 0.5 <= low < 1.0 and high == pytest.approx(2.0)


def test_a_larger_model_by_hand():
    """GPT-2 124M: 12 x (2.25 + 0.56 + 2.25 + 2.25 MiB x 1.05...) and the head, all at one rate."""
    flat = tuple({**row, "bytes_per_sec": 1e10} for row in PRODUCTS)
    got = CostModel(flat, 1e10, 1e-5).tpot_sec(CONFIG, 129)
    weights = 4 * (12 * 12 * 768 * 768 + 50257 * 768)
    kv = 4 * 2 * 12 * 768 * 129
    assert got == pytest.approx((weights + kv) / 1e10 + 1e-5 * (14 * 12 + 7), rel=1e-6)


def test_rows_are_predictions_and_narrower_weights_are_faster():
    varied = dataclasses.replace(
        CEILINGS, read_bandwidth=tuple({**row, "samples": [2e10, 1e10, 1.5e10]} for row in CEILINGS.read_bandwidth)
    )
    model = CostModel(PRODUCTS, 1e10, 1e-5, (0.8, 1.5))
    rows = predict_here.predict_here(CONFIG, 129, varied, {"baseline": model})
    json.dumps(rows, allow_nan=False)
    by = {row["config"]: row["predicted_tpot_sec"] for row in rows}
    assert by["baseline"] > by["native"] > by["native_bf16"] > by["native_int8"] > by["native_int4"]
    assert all(row["is_prediction"] and row["predicted_tpot_sec"] >= row["roofline_sec"] for row in rows)
    for row in rows:
        fast, slow = (0.8, 1.5) if row["config"] == "baseline" else (1.0, 2.0)
        assert row["range_sec"] == pytest.approx([fast * row["predicted_tpot_sec"], slow * row["predicted_tpot_sec"]])
    native = next(row for row in rows if row["config"] == "native")
    assert native["predicted_tpot_sec"] == native["roofline_sec"] == pytest.approx(native["bytes"] / 2e10)


def test_product_rates_keep_the_threads(monkeypatch):
    monkeypatch.setattr(predict_here, "MIN_SEC", 0.0)
    before = torch.get_num_threads()
    rows = product_rates(1, (16, 32), 1 << 14)
    assert [row["bytes"] for row in rows] == [1024, 4096] and all(row["bytes_per_sec"] > 0 for row in rows)
    assert torch.get_num_threads() == before
