from __future__ import annotations

import csv
import dataclasses
import io
import re

import pytest

from made_tune import make_result, trial
from paretune.report import tables
from paretune.report.tables import Column, to_csv, to_markdown, to_text
from paretune.report.trials import SHORT_COLUMNS, TRIAL_COLUMNS, trial_rows


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23e-3, "1.23 ms"),
        (0.0123, "12.3 ms"),
        (0.123, "123 ms"),
        (9.996e-3, "10.0 ms"),
        (0.9999, "1.00 s"),
        (2e-7, "200 ns"),
        (231.0, "3 min 51 s"),
        (240, "4 min"),
        (3725, "1 h 2 min"),
        (0, "0 s"),
        (None, "not measured"),
        (float("nan"), "not measured"),
        (True, "not measured"),
    ],
)
def test_format_sec(value: object, text: str) -> None:
    assert tables.format_sec(value) == text


def test_other_formats() -> None:
    assert [tables.format_bytes(v) for v in (0, 999, 1000, 7.3e6, 999.9e6)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "7.30 MB",
        "1.00 GB",
    ]
    assert tables.format_ratio(1.517, 1.48, 1.561) == "1.52x [1.48, 1.56]"
    assert tables.format_ratio(1.517) == "1.52x"
    assert tables.format_percent(0.01) == "1 %"
    assert tables.format_percent(0.0031, signed=True) == "+0.31 %"
    assert tables.format_percent(-0.002, signed=True) == "-0.2 %"
    assert tables.format_percent(1e-9, signed=True) == "0 %"
    assert tables.format_rate(12e9) == "12.0 GB/s"
    assert tables.format_count(7_100_000) == "7.10 million"
    assert tables.format_number(12033.0) == "12,033"


def test_order_of_rows() -> None:
    rows = trial_rows(make_result())
    assert rows[0].id == "t2" and rows[0].role == "chosen"
    status = [r.status for r in rows]
    assert status == ["measured"] * 8 + ["failed", "invalid", "failed"] + ["not_reached"] * 2
    speeds = [r.speedup for r in rows[1:8]]
    assert speeds == sorted(speeds, reverse=True)  # type: ignore[type-var]
    assert {r.id for r in rows} == {t.id for t in make_result().trials}


def test_judgement_and_cause() -> None:
    rows = {r.id: r for r in trial_rows(make_result())}
    assert rows["t0"].judgement == "baseline" and rows["t0"].speedup == 1.0
    assert rows["t5"].judgement == "no clear difference"
    assert rows["t6"].judgement == "over the quality limit" and "4.4%" in rows["t6"].cause
    assert rows["t8"].cause.startswith("out of memory")
    assert rows["t11"].cause == "the budget was used up before it was its turn"


def test_over_the_limit_is_not_called_bounded() -> None:
    row = next(r for r in trial_rows(make_result()) if r.id == "t6")
    guarantee = next(c for c in TRIAL_COLUMNS if c.key == "guarantee")
    assert guarantee.text(row) == "none"


def test_csv_round_trip() -> None:
    rows = trial_rows(make_result())
    keys = [f.name for f in dataclasses.fields(rows[0])]
    back = list(csv.DictReader(io.StringIO(to_csv(rows, keys))))
    assert len(back) == len(rows)
    for row, read in zip(rows, back, strict=True):
        for key in keys:
            value = getattr(row, key)
            if value is None:
                assert read[key] == ""
            elif isinstance(value, float):
                assert float(read[key]) == value
            else:
                assert read[key] == str(value)


def test_markdown_round_trip() -> None:
    rows = [{"name": "a|b <i>\n", "tpot_sec": 0.00123}, {"name": "c\\", "tpot_sec": None}]
    lines = to_markdown(rows).splitlines()
    cells = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:4]]
    assert cells == [["a|b &lt;i>", "1.23 ms"], ["c\\\\", "not measured"]]
    assert lines[1] == "|:---|---:|"
    assert any(line.startswith("- **TPOT**") for line in lines)


@pytest.mark.parametrize("width", [None, 120, 150])
def test_text_is_aligned_and_whole(width: int | None) -> None:
    rows = trial_rows(make_result())
    text = to_text(rows, TRIAL_COLUMNS, width=width, definitions=False)
    header, rule, *body = text.splitlines()
    ends = [m.end() for m in re.finditer("-+", rule)]
    assert header.index("Result") == ends[0] + 2
    for line in body:
        for end in ends[:-1]:
            assert line[end : end + 2].strip() == ""
    squeezed = " ".join(text.split())
    if width is None:
        assert all(r.name in squeezed and r.cause in squeezed for r in rows)


def test_short_columns_fit_a_terminal() -> None:
    text = to_text(trial_rows(make_result()), SHORT_COLUMNS, width=110)
    assert max(map(len, text.splitlines())) <= 110


def test_text_prints_definitions() -> None:
    text = to_text(trial_rows(make_result()), TRIAL_COLUMNS)
    assert "TTFT: time to first token" in text and "TPOT: time per output token" in text


def test_rows_of_other_verbs() -> None:
    rows = [
        {"input_len": 1024, "tpot_sec": 0.00123, "tokens_per_sec": 812.34567, "is_cold": True},
        {"input_len": 128, "tpot_sec": None},
    ]
    text = to_text(rows)
    assert "Tokens/s" in text and "812.3" in text and "1,024" in text and "yes" in text
    assert "Throughput:" in text
    own = Column("input_len", "Prompt", lambda r: f"{r['input_len']} tok")
    assert "1024 tok" in to_text(rows, [own, "tpot_sec"])
    assert to_text([]) == "\n"


def test_control_characters_are_harmless() -> None:
    rows = trial_rows(make_result(trials=[trial("a", "\x1b[31mred\nline", "failed")]))
    assert rows[0].name == "[31mred line"
    assert "\x1b" not in to_text(rows, TRIAL_COLUMNS)
