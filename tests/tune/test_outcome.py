"""One judgement of each candidate, whatever the words and pictures make of it."""

from __future__ import annotations

from made_outcome import candidate, outcome

from paretune.tune.outcome import WORDS
from paretune.tune.race import BASELINE

NATIVE = ("sdpa", None, None, "native", None)
INT8 = ("sdpa", None, "int8", "native", None)
INT4 = ("sdpa", None, "int4", "native", None)
SLOW = ("eager", None, None, "eager", None)
SAME = ("sdpa", None, None, "native", "bf16")
BROKEN = ("sdpa", "fp16", None, "eager", None)
LATE = ("sdpa", "bf16", None, "eager", None)


class Quality:
    def __init__(self, within_bound):
        self.within_bound = within_bound


def made():
    out = outcome(
        {NATIVE: 0.004, INT8: 0.001, INT4: 0.0008, SLOW: 0.013, SAME: 0.0100},
        failures={BROKEN: "the process crashed with SIGILL"},
    )
    out.qualities[candidate(*INT8).id] = Quality(True)
    out.rejected[candidate(*INT4).id] = "perplexity rises by at least +20.0% after 3 windows; the limit is +1.00%"
    return out


def word(out, choice):
    return out.standing(candidate(*choice).id).word


def test_every_candidate_has_one_word():
    out = made()
    assert out.leader() == candidate(*INT8).id
    assert out.standing(BASELINE).word == "baseline"
    assert word(out, NATIVE) == word(out, INT8) == "faster, within the limit"
    assert word(out, INT4) == "over the quality limit"
    assert word(out, SLOW) == "slower" and word(out, SAME) == "no clear difference"
    assert word(out, BROKEN) == "failed" and word(out, LATE) == "not reached"
    out.kind, out.winner = "winner", candidate(*INT8).id
    assert word(out, INT8) == "chosen"
    assert out.standing(candidate(*NATIVE).id).why == "not as fast as the one chosen"
    assert {word(out, c) for c in (NATIVE, INT8, INT4, SLOW, SAME, BROKEN, LATE)} <= set(WORDS)


def test_faster_without_a_judgement_of_its_quality_is_not_called_within_the_limit():
    out = made()
    del out.qualities[candidate(*INT8).id]
    assert word(out, INT8) == "faster, quality not judged"
    assert out.leader() == candidate(*NATIVE).id  # lossless


def test_what_did_not_hold_leads_no_more_and_says_why():
    out = made()
    out.refused[candidate(*INT8).id] = "0.98 times as fast"
    assert out.standing(candidate(*INT8).id).word == "did not hold"
    assert out.standing(candidate(*INT8).id).why == "0.98 times as fast"
    assert out.leader() == candidate(*NATIVE).id


def test_a_candidate_that_cannot_win_says_why():
    out = made()
    out.excluded[candidate(*LATE).id] = "reading its 14 MB a token takes 1.4 ms here"
    standing = out.standing(candidate(*LATE).id)
    assert (standing.word, standing.why) == ("excluded", "reading its 14 MB a token takes 1.4 ms here")


def test_the_headline_never_says_that_nothing_was_faster_where_something_was():
    from paretune.report.verdict import not_taken
    from paretune.tune.result import result_of

    out = made()
    del out.qualities[candidate(*INT8).id]
    out.refused[candidate(*NATIVE).id] = "0.99 times as fast, 0.97 to 1.01: undecided"
    out.winner, out.kind = None, "baseline"
    result = result_of(out)
    said = result.verdict
    text = " ".join(said)
    assert "Nothing" not in text and "although others were faster" in said[0]
    assert "was 12.5" in text.replace("12.4", "12.5") and "over the quality limit" in text
    assert "10.0" in text and "quality not judged" in text
    assert "did not hold: 0.99 times as fast" in text
    assert len(not_taken(result)) == 3
