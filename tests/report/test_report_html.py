from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from made_tune import barest, make_result, trial, trials
from paretune.records.record import Record
from paretune.records.tune import TuneGoal
from paretune.report.html import render_report, section, write_page, write_report
from paretune.report.plots import loss_curve


class Page(HTMLParser):
    """Collects what is shown, and what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


def headline(text: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", text, re.DOTALL)
    assert found
    return html.unescape(found.group(1))


def test_everything_that_was_tried_is_there() -> None:
    result = make_result()
    page = Page(render_report(result)).text
    for t in result.trials:
        assert t.name in page
        assert not t.reason or t.reason in page
    for item in result.space.illegal:
        assert item.name in page and item.reason in page
    found = result.trials[2].measured
    assert found is not None and found.bound_by is not None
    for sentence in (*result.verdict, *found.proof, found.bound_by):
        assert sentence in page
    dispatch, alone = (e.text for e in found.explanations)
    assert dispatch[1:] in page and alone not in page  # where no rule fired, the roofline's own sentence is enough
    assert result.again in page and "samples.jsonl" in page and "AMD EPYC 7B13" in page


def test_key_numbers_are_those_of_the_confirmation() -> None:
    page = Page(render_report(make_result())).text
    assert "1.52x 95 % interval: 1.48x to 1.56x" in page
    assert "+0.33 % at most +0.65 %; limit +1 %" in page
    assert "2.25 ms baseline: 3.42 ms (-34.2 %)" in page
    assert "7.30 MB baseline: 28.4 MB (-74.3 %)" in page
    assert "1.002x [0.989, 1.013]" in page and "1.3 %" in page


def test_verdict_precedes_the_table() -> None:
    text = render_report(make_result())
    assert 0 < text.index("<h1>") < text.index('class="cards"') < text.index('<table class="rows"')


def test_nothing_is_loaded_from_anywhere() -> None:
    page = Page(render_report(make_result()))
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert not re.search(r"@import|url\((?!#)", render_report(make_result()))


def _with_text(value: Any, text: str) -> Any:
    """A record whose every free text is `text`."""
    if isinstance(value, Record):
        hints = get_type_hints(type(value))
        fields = {f.name: (hints[f.name], getattr(value, f.name)) for f in dataclasses.fields(value)}
        kept = ("id", "winner_id", "baseline_id", "cause")
        changed = {
            k: text if h in (str, str | None) and k not in kept else _with_text(v, text) for k, (h, v) in fields.items()
        }
        return dataclasses.replace(value, **changed)
    if isinstance(value, list):
        return [text if isinstance(part, str) else _with_text(part, text) for part in value]
    if isinstance(value, dict):
        return {text if isinstance(key, str) else key: _with_text(part, text) for key, part in value.items()}
    return value


def test_names_from_outside_are_harmless() -> None:
    bad = "<script>alert(1)</script>$x_1$"
    text = render_report(_with_text(make_result(), bad))
    assert "<script" not in text and "script" not in Page(text).tags
    assert "&lt;script&gt;" in text


@pytest.mark.parametrize(
    ("outcome", "winner", "badge", "sentence"),
    [
        ("baseline", "t0", "Keep the baseline", "Said."),
        ("none", None, "Nothing reaches the goal", "No candidate reached"),
        ("interrupted", "t3", "Interrupted", "stopped before it was finished. Best so far: int8."),
        ("interrupted", None, "Interrupted", "Nothing has beaten the baseline so far."),
    ],
)
def test_other_outcomes(outcome: str, winner: str | None, badge: str, sentence: str) -> None:
    text = render_report(make_result(outcome=outcome, winner_id=winner, verdict=["Said."], confirmation=None))
    assert sentence in headline(text)
    page = Page(text).text
    assert badge in page and "Said." in page and "Winner found" not in page


def test_a_winner_without_confirmation_or_verdict() -> None:
    text = render_report(make_result(confirmation=None, verdict=[], aa=None))
    assert headline(text) == "int8 + sdpa, compile is 1.54 times as fast as the baseline."
    assert "was not measured again" in text and "noise of this machine is unknown" in text


def test_verdict_is_not_said_twice() -> None:
    said = "Nothing beat the baseline beyond noise: keep it."
    text = render_report(make_result(outcome="baseline", winner_id="t0", verdict=[said]))
    assert text.count(said) == 1


@pytest.mark.parametrize("objective", ["tpot", "ttft", "throughput", "memory", "size"])
def test_the_objective_comes_first(objective: Any) -> None:
    result = make_result(goal=TuneGoal(objective=objective))
    first = re.search(r'class="what">([^<]*)<', render_report(result))
    wanted = {"memory": "Peak memory of the process", "size": "Weights in memory"}
    assert first and first.group(1) == wanted.get(objective, "Speed-up over the baseline")


def _unknown(value: Any) -> list[Any]:
    """The record once for each field in it that may be None, with None there."""
    made: list[Any] = []
    if isinstance(value, Record):
        hints = get_type_hints(type(value))
        for f in dataclasses.fields(value):
            inner = getattr(value, f.name)
            if inner is not None and type(None) in get_args(hints[f.name]):
                made.append(dataclasses.replace(value, **{f.name: None}))
            made += [dataclasses.replace(value, **{f.name: part}) for part in _unknown(inner)]
    elif isinstance(value, list):
        for i, part in enumerate(value):
            made += [[*value[:i], new, *value[i + 1 :]] for new in _unknown(part)]
    return made


def test_whatever_is_not_known_the_report_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from paretune.report import plots

    for name in ("pareto", "latency_bars", "bandwidth_curve"):  # drawn once each in the other tests
        monkeypatch.setattr(plots, name, lambda result: b"<svg></svg>")
    results = _unknown(make_result())
    assert len(results) > 50
    for result in results:
        assert "<h1>" in render_report(result)


def test_a_run_that_measured_nothing_still_renders() -> None:
    text = render_report(barest())
    assert "not measured" in text and "no memory" in text and "<h1>" in text


def test_many_that_were_not_reached_are_folded() -> None:
    late = [trial(f"x{i}", f"late {i}", "not_reached") for i in range(40)]
    page = Page(render_report(make_result(trials=trials() + late))).text
    assert "42 more candidates were not reached" in page
    assert all(f"late {i}" in page for i in range(40))


def test_write_report(tmp_path: Path) -> None:
    path = tmp_path / "plan" / "report.html"
    write_report(make_result(), path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    write_report(make_result(), path)
    assert path.read_text(encoding="utf-8") == text


def test_write_page(tmp_path: Path) -> None:
    path = tmp_path / "bench.html"
    part = section(
        "Times <b>",
        ["One sentence."],
        rows=[{"input_len": 128, "tpot_sec": 0.00123}],
        figures=[(loss_curve([{"step": 1, "loss": 2.0}]), "The loss.")],
        facts={"memory_bytes": 8.3e9},
    )
    write_page(path, "Bench", ["It is fast."], [part], again="paretune bench")
    text = path.read_text(encoding="utf-8")
    for wanted in ("Times &lt;b&gt;", "One sentence.", "1.23 ms", "The loss.", "8.30 GB", "paretune bench"):
        assert wanted in text
    assert text.count("<svg") == 1
