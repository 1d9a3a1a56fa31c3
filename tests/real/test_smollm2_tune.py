"""`tune` on the real model: a short run has a winner that is proven, and the plan answers a question."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from paretune.recipe import Recipe

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

BUDGET = "3m"


def paretune(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "paretune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def plan(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune") / "plan"
    done = paretune("tune", "smollm2", "--max-ppl-increase", "1%", "--budget", BUDGET, "-o", folder)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_proven_winner(plan):
    """The interval of newly executed processes lies above 1, and the upper bound of the quality within the limit."""
    written = json.loads((plan / "plan.json").read_text("utf-8"))
    assert written["outcome"] == "winner", written["verdict"]
    confirmed = written["confirmation"]
    assert confirmed["speedup"]["verdict"] == "faster" and confirmed["speedup"]["low"] > 1
    quality = confirmed["quality"]
    if Recipe.from_dict(written["recipe"]).changes_numbers:
        assert quality["within_bound"] and (quality["identical"] or quality["ppl_increase_upper"] <= 0.01)
    else:  # held to the reference's own tokens: there is no loss to measure
        assert quality is None or quality["identical"]
    assert written["recipe"]["engine"]["runner"] == "native", "eager forms do not win here by the roofline"


def test_the_plan_answers_and_stops(plan):
    question = ("--chat", "--prompt", "What is gravity?", "--max-new-tokens", "150", "--json")
    done = paretune("generate", plan, *question)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["finish_reason"] == "eos" and "force" in answer["text"].lower()
