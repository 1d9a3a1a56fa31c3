"""What became of each engine beside the winner of `tune`, in plain words."""

from __future__ import annotations

import math

from paretune.records.peers import Comparison, PeerQuality, PeerRow, Ratio

WHAT = {"tpot": "decodes a token", "ttft": "gives its first token", "throughput": "produces tokens"}
KINDS = {"tpot": "time per output token", "ttft": "time to the first token", "throughput": "output tokens per second"}


def sentences(peers: Comparison | None, max_ppl_increase: float, objective: str) -> list[str]:
    """What became of each peer.

    Args:
        max_ppl_increase: the bound of the goal, a fraction.
        objective: of the goal.
    """
    if peers is None:
        return []
    measured, said = peers.measured, []
    for row in peers.rows:
        said += _about(row, measured.reference, max_ppl_increase)
    if objective not in KINDS:
        said.append(f"Peers are compared in {KINDS['tpot']} only, not in {objective}.")
    if measured.too_noisy:
        said.append("This machine was too noisy while the peers were measured to judge them.")
    return said


def _quality(found: PeerQuality, max_ppl_increase: float) -> str:
    """What it does to perplexity, and whether that is within the bound of the goal."""
    bound = f"your perplexity bound of {max_ppl_increase * 100:g} %"
    if found.keeps_bound is None:
        return f"Whether it keeps {bound} is not known: {found.quality_reason}."
    if found.ppl_increase_upper is None or found.ppl_increase is None:
        return f"It does not keep {bound}: {found.quality_reason}."
    change = (
        f"its perplexity on the text of the confirmation is {found.perplexity:.4g}, {found.ppl_increase:+.2%} "
        f"against the baseline and with 95 % confidence at most {found.ppl_increase_upper:+.2%}"
    )
    if found.keeps_bound:
        return f"It keeps {bound}: {change}."
    if found.ppl_increase <= max_ppl_increase:
        return f"It is not shown to keep {bound}: {change}."
    return f"It does not keep {bound}: {change}."


def _about(row: PeerRow, ours: str, max_ppl_increase: float) -> list[str]:
    engine, ratio = row.engine, row.ratio
    if row.verdict is None or ratio is None or ratio.value is None:
        return [f"{engine} was not compared: {(row.cause or 'it was not measured').rstrip('.')}."]
    what, found = WHAT[row.kind], row.quality or PeerQuality.unknown("it was not scored")
    against = f"{engine} {what} {1 / ratio.value:.2f} times as fast as {ours} {_interval(_flipped(ratio))}"
    quality = _quality(found, max_ppl_increase)
    if row.verdict == "indistinguishable":
        return [f"{engine} and {ours}: no difference beyond noise. {against}.", quality]
    if row.verdict == "slower":
        return [f"{engine} is slower: {ours} {what} {ratio.value:.2f} times as fast {_interval(ratio)}.", quality]
    if row.verdict != "faster":
        return [f"{engine} against {ours} is undecided: {against}.", quality]
    agreement = row.agreement
    measured = "with a logit error that was not measured"
    if agreement is not None:
        measured = f"with a logit error of {agreement.logits_rel_rms:.2%}"
    top = ""
    if agreement is not None:
        top = f" (the same most likely token at {agreement.top1_share:.1%} of the positions)"
    return [
        f"{engine} {'is faster' if found.keeps_bound is False else 'won'}: {against}.",
        f"It computes in the format {row.format}, {measured} against our fp32{top}.",
        quality,
        f"A plan cannot run {engine.partition(':')[0]}: this plan runs the best of our own recipes, {ours}.",
    ]


def _flipped(ratio: Ratio) -> Ratio:
    return Ratio(inverse(ratio.value), inverse(ratio.high), inverse(ratio.low))


def inverse(value: float | None) -> float | None:
    """1 / value; None where there is none."""
    return 1 / value if value and math.isfinite(value) else None


def _interval(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return "(too few samples for an interval)"
    return f"(95 % interval {ratio.low:.2f} to {ratio.high:.2f}, in fresh processes)"
