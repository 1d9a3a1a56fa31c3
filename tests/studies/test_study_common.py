"""What the studies share."""

from __future__ import annotations

import csv
import io
import json

import made_records
from paretune.model import checkpoint
from paretune.report import html, plots
from paretune.report.tables import to_csv
from paretune.studies import common


def test_published_rows_stand_beside_ours():
    published = {"Flash": {"sec": 0.073, "rouge1": 0.16}, "Standard": {"sec": 0.096, "rouge1": None}}
    rows = common.beside([{"name": "Flash", "sec": 1.0}, {"name": "Hybrid", "sec": 2.0}], published, "name")
    assert rows[0] == {"name": "Flash", "sec": 1.0, "published_sec": 0.073, "published_rouge1": 0.16}
    assert rows[1] == {"name": "Hybrid", "sec": 2.0, "published_sec": None, "published_rouge1": None}


def test_a_judged_row_says_why_it_has_no_ratio():
    measured = made_records.row("int8", prefill=made_records.phase(2.0, 1.9, 2.1, "faster"))
    assert common.judged(measured, "prefill") == {
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "verdict": "faster",
        "n_slices": 9,
    }
    failed = made_records.row("int8", cause="out of memory")
    assert common.judged(failed, "prefill")["verdict"] == "out of memory"
    for row in (None, made_records.row("int8")):
        assert common.judged(row, "decode") == {
            **dict.fromkeys(("speedup", "speedup_low", "speedup_high", "n_slices")),
            "verdict": "not reached",
        }


def test_tables_of_different_columns_make_one_csv():
    rows = common.flat({"speed": [{"name": "a", "sec": 1.5}], "quality": [{"name": "a", "rouge1": None}]})
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert read == [
        {"table": "speed", "row": "a", "name": "a", "sec": "1.5", "rouge1": ""},
        {"table": "quality", "row": "a", "name": "a", "sec": "", "rouge1": ""},
    ]


def test_the_files_of_a_study(tmp_path, tiny_gpt2_folder):
    _, config, _ = common.open_model(str(tiny_gpt2_folder))
    head = common.header("attention", "tiny", config, quick=True, seed=3)
    figure = common.picture(tmp_path, "loss", lambda fmt: plots.loss_curve([{"loss": 1.0}], fmt), "a caption")
    sections = [html.section("First", ["Words."], figures=[figure])]
    result = {**head, "noise": ["The machine was busy."]}
    common.write_results(tmp_path, result, {"t": [{"a": 1}]}, sections, ["The answer."], 2)
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "report.html", "results.csv", "results.json"}
    result = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert {"schema_version", "command", "seed", "versions", "hardware", "study", "quick"} <= set(result)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "tiny: the attention study" in page and "a caption" in page and "Machine" in page
    assert page.index("The machine was busy.") < page.index("The answer.") < page.index("Words.")


def test_a_report_never_prints_a_path(tiny_gpt2_folder):
    assert common.open_model("pocket")[2] == "pocket" and "pocket" in checkpoint.EMBEDDED
    assert common.open_model(str(tiny_gpt2_folder))[2] == tiny_gpt2_folder.name
