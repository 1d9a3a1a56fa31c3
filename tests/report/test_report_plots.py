from __future__ import annotations

import dataclasses
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from made_tune import barest, changed, make_result, quality, speedup, trial, trials
from paretune.report import canvas, plots
from paretune.report.trials import trial_rows

PNG = b"\x89PNG\r\n\x1a\n"


def texts(svg: bytes) -> list[str]:
    root = ElementTree.fromstring(svg)
    return ["".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("name", ["pareto", "latency_bars", "bandwidth_curve"])
def test_pictures_of_a_result(name: str) -> None:
    draw = getattr(plots, name)
    svg = draw(make_result())
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg == draw(make_result()), "the same result gives the same bytes"
    assert draw(make_result(), fmt="png").startswith(PNG)
    assert b"<script" not in svg and b"<!DOCTYPE" not in svg and b"<style" not in svg
    for empty in (barest(), make_result(trials=[])):
        assert ElementTree.fromstring(draw(empty)).tag.endswith("svg")
    with pytest.raises(ValueError, match="gif"):
        draw(make_result(), fmt="gif")


def test_pareto_labels_what_was_measured() -> None:
    found = texts(plots.pareto(make_result()))
    for name in ("baseline", "int8 + sdpa, compile", "int8", "bf16", "limit 1 %"):
        assert name in found
    assert "fuse qkv" not in found and "nf4 + sdpa" not in found
    caption = plots.pareto_caption(make_result())
    assert "8 marks" in caption and "3 that failed" in caption and "2 that were not reached" in caption


def test_a_name_cannot_break_the_picture() -> None:
    result = changed(make_result(), "t2", name="<b>&$x^2$ \\frac")
    assert "<b>&$x^2$ \\frac" in texts(plots.pareto(result))


def test_frontier() -> None:
    points = plots.pareto_points(make_result())
    assert [r.id for r in plots.frontier(points)] == ["t1", "t2", "t6"]


def test_labels_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty candidates in a small space: what is labelled can be read."""
    more = []
    for i in range(30):
        value = 1.0 + 0.02 * i
        speed, loss = speedup(value, value - 0.02, value + 0.02, "faster"), 0.004 * abs(math.sin(i))
        more.append(trial(f"x{i}", f"candidate {i} + sdpa", speedup=speed, quality=quality(loss, 0.006, True)))
    boxes: list[canvas.Box] = []
    original = canvas.place_labels

    def spy(axes: Any, entries: Any, hard: Any, soft: Any) -> int:
        before = len(axes.texts)
        n = original(axes, entries, hard, soft)
        renderer = axes.figure.canvas.get_renderer()
        for text in axes.texts[before:]:
            if text.get_text():
                e = text.get_window_extent(renderer)
                boxes.append((e.x0, e.y0, e.x1, e.y1))
        return n

    monkeypatch.setattr(plots, "place_labels", spy)
    plots.pareto(make_result(trials=trials() + more))
    assert len(boxes) >= 10
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("loss", [-0.01, 0.0, 0.003, 40.0])
def test_any_scale_can_be_drawn(limit: float, loss: float) -> None:
    result = make_result()
    result = dataclasses.replace(result, goal=dataclasses.replace(result.goal, max_ppl_increase=limit))
    result = changed(result, "t2", quality=quality(loss, loss + 0.001, True))
    result = changed(result, "t3", speedup=speedup(20.0, 1.37, 22.0, "faster"))
    assert texts(plots.pareto(result))


def test_latency_bars_say_what_is_not_measured() -> None:
    found = texts(plots.latency_bars(make_result()))
    assert "2.22 ms" in found and "int8 + sdpa, compile (chosen)" in found
    assert "No candidate has a measured time." in texts(plots.latency_bars(barest()))


def test_loss_curve() -> None:
    points = [{"step": i, "loss": 3 / (i + 1), "val_loss": None if i % 2 else 3.0} for i in range(8)]
    svg = plots.loss_curve(points)
    assert "val loss" in texts(svg)
    assert svg == plots.loss_curve(points)
    assert plots.loss_curve([]).startswith(b"<svg")


def test_ids_of_two_pictures_differ() -> None:
    first, second = (
        set(re.findall(rb'id="([^"]+)"', draw(make_result()))) for draw in (plots.pareto, plots.bandwidth_curve)
    )
    assert first and second and not first & second


def test_rows_without_quality_are_not_drawn() -> None:
    result = changed(make_result(), "t3", quality=None)
    assert "t3" not in {r.id for r in plots.pareto_points(result)}
    assert "1 without a measured speed or quality" in plots.pareto_caption(result)
    assert len(trial_rows(result)) == len(result.trials)
