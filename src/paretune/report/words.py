"""The sentences of the report on `tune`: what came out, how sure it is, what was left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from paretune.records.evaluation import Fidelity
from paretune.records.tune import Ratio, States, TrialMeasured, TrialSpeedup, TuneResult, TuneTrial
from paretune.report.units import (
    format_bytes,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_sec,
    number,
    plain,
)

OBJECTIVES = {
    "tpot": "the time per output token",
    "ttft": "the time to the first token",
    "throughput": "the output tokens per second",
    "memory": "the memory in use",
    "size": "the bytes of the stored weights",
}
_PHASES = {"prefill": "reading the prompt", "decode": "writing the answer"}


@dataclass(frozen=True)
class Top:
    """The answer before anything else. `tone`: of the badge's colour."""

    badge: str
    tone: str
    headline: str
    sentences: list[str]


@dataclass(frozen=True)
class Card:
    """One key number."""

    what: str
    value: str
    detail: str


def measured_of(trial: TuneTrial | None) -> TrialMeasured | None:
    return None if trial is None else trial.measured


def speedup_of(result: TuneResult) -> Ratio | None:
    """The winner's speed-up: that of the confirmation in fresh processes where there is one."""
    if result.winner is not None and result.confirmation is not None:
        return result.confirmation.speedup
    found = measured_of(result.winner)
    return found.speedup if found else None


def quality_of(result: TuneResult) -> Fidelity | None:
    """The winner's quality, by the same rule."""
    if result.winner is not None and result.confirmation is not None and result.confirmation.quality is not None:
        return result.confirmation.quality
    found = measured_of(result.winner)
    return found.quality if found else None


def top_of(result: TuneResult) -> Top:
    """Badge, headline and sentences."""
    outcome, winner = result.outcome, result.winner
    said = [plain(s) for s in result.verdict if s]
    if outcome == "winner":
        badge, tone, headline = "Winner found", "good", said[0] if said else _winner_headline(result)
    elif outcome == "baseline":
        badge, tone = "Keep the baseline", "same"
        headline = said[0] if said else "Nothing beat the baseline beyond noise: keep it."
    elif outcome == "none":
        badge, tone, speed = "Nothing reaches the goal", "warn", result.goal.min_speedup
        within = f" (perplexity may rise by at most {format_percent(result.goal.max_ppl_increase)})"
        asked = "" if speed is None else f" the speed-up of {speed:g} that was asked for"
        headline = f"No candidate reached{asked or ' the goal'} within the quality limit{within}."
        if winner is not None:
            said.append(f"The best so far is {plain(winner.name)}.")
    else:
        badge, tone = "Interrupted: partial result", "warn"
        headline = "The search was stopped before it was finished."
        best = f" Best so far: {plain(winner.name)}." if winner else " Nothing has beaten the baseline so far."
        headline += best
        said.append("The numbers below are real, but more candidates could have followed.")
    faster = [peer for peer in result.peers if peer.verdict == "faster"]
    if any(peer.quality is None or peer.quality.keeps_bound is not False for peer in faster):
        badge, tone = f"{badge}; another engine is faster", "warn"  # what breaks the bound is not a rival
    seen = {headline.strip(". ").lower()}
    sentences = []
    for sentence in said:
        if sentence.strip(". ").lower() not in seen:
            seen.add(sentence.strip(". ").lower())
            sentences.append(sentence)
    return Top(badge, tone, headline, sentences)


def _winner_headline(result: TuneResult) -> str:
    speed, name = speedup_of(result), plain(result.winner.name) if result.winner else "unnamed"
    if speed is None or speed.value is None:
        return f"{name} was chosen."
    return f"{name} is {speed.value:.2f} times as fast as the baseline."


def goal_sentence(result: TuneResult) -> str:
    """What was asked for, in one sentence."""
    goal = result.goal
    batch = "one request" if goal.batch_size == 1 else f"{format_number(goal.batch_size)} requests"
    return (
        f"The goal was to improve {OBJECTIVES[goal.objective]} while perplexity (how surprised the model is by real "
        f"text) rises by at most {format_percent(goal.max_ppl_increase)}; workload: "
        f"{format_number(goal.input_len)} prompt tokens, {format_number(goal.output_len)} output tokens, {batch} at a "
        f"time; the search took {format_sec(result.elapsed_sec)} of {format_sec(goal.budget_sec)} allowed."
    )


def _change_card(what: str, before: float | None, after: float, show: Callable[[float], str]) -> Card:
    if before is None:
        return Card(what, show(after), "baseline: not measured")
    change = "as the baseline" if before == after or not before else format_percent(after / before - 1, signed=True)
    return Card(what, show(after), f"baseline: {show(before)} ({change})" if before != after else change)


def cards_of(result: TuneResult) -> list[Card]:
    """The key numbers of the winner (or of the best so far), the objective first."""
    winner, baseline = result.winner, result.baseline
    shown = winner or baseline
    if shown is None:
        return []
    is_winner = winner is not None and winner is not baseline
    ours, theirs = measured_of(shown), measured_of(baseline if is_winner else shown)
    confirmed = result.confirmation if is_winner else None
    before: tuple[float | None, float | None] = (theirs.tpot_sec, theirs.ttft_sec) if theirs else (None, None)
    if confirmed:
        before = confirmed.baseline_tpot_sec, confirmed.baseline_ttft_sec
    cards = [("speed", _speed_card(result)), ("quality", _quality_card(result))] if is_winner else []
    if times := confirmed or ours:
        cards += [
            ("tpot", _change_card("Time per output token", before[0], times.tpot_sec, format_sec)),
            ("ttft", _change_card("Time to first token", before[1], times.ttft_sec, format_sec)),
        ]
    if ours:
        was = theirs.memory if theirs else None
        sizes = was.weights_bytes if was else None, ours.memory.weights_bytes
        peaks = was.rss_peak_bytes if was else None, ours.memory.rss_peak_bytes
        cards += [
            ("size", _change_card("Weights in memory", *sizes, format_bytes)),
            ("memory", _change_card("Peak memory of the process", *peaks, format_bytes)),
        ]
    first = result.goal.objective if result.goal.objective in ("memory", "size") else "speed"
    cards.sort(key=lambda card: card[0] != first)
    if is_winner:
        return [card for _, card in cards]
    return [replace(card, what=f"{card.what} (baseline)", detail="") for _, card in cards]


def _speed_card(result: TuneResult) -> Card:
    speed = speedup_of(result)
    value, low, high = (speed.value, speed.low, speed.high) if speed else (None, None, None)
    interval = f"95 % interval: {low:.2f}x to {high:.2f}x" if low is not None and high is not None else ""
    return Card("Speed-up over the baseline", format_ratio(value), interval)


def _quality_card(result: TuneResult) -> Card:
    quality = quality_of(result)
    if quality is not None and number(quality.ppl_increase) is not None:
        detail = f"at most {format_percent(quality.ppl_increase_upper, signed=True)}"
        detail += f"; limit {format_percent(result.goal.max_ppl_increase, signed=True)}"
        return Card("Perplexity", format_percent(quality.ppl_increase, signed=True), detail)
    if result.winner is not None and result.winner.label == "lossless":
        return Card("Quality", "unchanged", "shown to give the same output (lossless)")
    return Card("Quality", "not measured", "")


def certainty_of(result: TuneResult) -> list[str]:
    """How far the numbers can be trusted, one thing a sentence."""
    out, aa = [], result.aa
    if aa is not None and aa.value is not None:
        sentence = f"Resolution: the baseline timed against itself through the same procedure gave {aa.value:.3f}x"
        if aa.low is not None and aa.high is not None:
            sentence += f" [{aa.low:.3f}, {aa.high:.3f}]"
        out.append(f"{sentence}. Differences below {format_percent(aa.half_width)} cannot be told apart here.")
    else:
        out.append("Resolution: the baseline was not timed against itself, so the noise of this machine is unknown.")
    out.append(
        "Method: in each block every candidate and the baseline are timed side by side in random order, so "
        "that slow drift and other programs hit all of them alike. Ranges are 95 % confidence intervals."
    )
    out.append(_confirmation_sentence(result))
    is_baseline = result.winner is result.baseline  # compared with itself it says nothing
    if states := result.bandwidth.states:
        speed = None if is_baseline else speedup_of(result)
        out.append(_states_sentence(states, speed.by_state if isinstance(speed, TrialSpeedup) else None))
    quality = None if is_baseline else quality_of(result)
    if quality is not None:
        sentence = (
            f"Quality: compared with the baseline on the same {format_number(quality.n_windows)} windows "
            f"of text (protocol {plain(quality.protocol or 'not recorded')})"
        )
        if quality.phase in _PHASES:
            sentence += f"; the worse of reading and writing counts, here {_PHASES[quality.phase]}"
        share = format_percent(quality.top1_agreement)
        out.append(f"{sentence}; the most likely next token is the same in {share} of the places.")
    return out


def _states_sentence(states: States, by_state: States | None) -> str:
    low, high = format_rate(states.low), format_rate(states.high)
    sentence = f"Memory speed: this machine switches between a slow state ({low}) and a fast state ({high})"
    if by_state:
        slow, fast = format_ratio(by_state.low), format_ratio(by_state.high)
        sentence += f"; the speed-up was {slow} in the slow one and {fast} in the fast one"
    return f"{sentence}."


def _confirmation_sentence(result: TuneResult) -> str:
    confirmation = result.confirmation
    if not confirmation:
        if result.winner_id is None or result.winner_id == result.baseline_id:
            return "Confirmation: nothing had to be confirmed, because nothing was chosen over the baseline."
        return "Confirmation: the choice was not measured again in fresh processes; take the speed-up with care."
    sentence = (
        f"Confirmation: the choice was measured again in {format_number(confirmation.n_processes)} fresh processes on "
        "new prompts; the numbers on top are from there"
    )
    note = plain(confirmation.note).rstrip(".")
    return f"{sentence}. {note}." if note else f"{sentence}."


_UNITS = {"tpot": "an output token", "ttft": "the first token", "throughput": "an output token of the whole batch"}


def peers_sentences(result: TuneResult) -> list[str]:
    """How the other engines were compared, and what that does not say."""
    measured, limit = result.peers_measured, result.goal.max_ppl_increase
    if measured is None or measured.reference_sec is None:
        return ["Nothing was measured beside other engines; the table says why."]
    out = [
        "After the search, the plan's recipe, the baseline and each engine were timed again side by side in random "
        "order, in fresh processes on the same prompts. Times are for "
        f"{_UNITS.get(measured.kind, 'a unit of work')}; above 1.00x the plan is faster."
    ]
    half = measured.aa_half_width
    if half is not None:
        out.append(f"The plan's recipe timed against itself there differed by up to {format_percent(half)}.")
    out.append(
        "An engine has to agree with our fp32, on text that the model wrote itself, before it is timed. Same top "
        "token: positions at which its most likely token is ours. Logit error: root mean square of the difference of "
        "its logits from ours / that of ours."
    )
    if any(peer.quality is not None and peer.quality.perplexity is not None for peer in result.peers):
        out.append(
            "Loss at most: the one-sided 95 % bound of its increase of perplexity, on the windows on which the choice "
            f"is confirmed, each shown to it whole; it keeps the perplexity bound of {format_percent(limit)} where "
            "that is within it. What its decode steps would add is not measured."
        )
    return out


def space_sentence(result: TuneResult) -> str:
    """How much of what could be tried was tried."""
    space = result.space
    parts = [
        f"{format_number(n)} {what}"
        for n, what in (
            (space.n_legal, "combinations are possible here"),
            (space.n_measured, "were measured"),
            (space.n_failed, "failed"),
            (space.n_excluded, "cannot win, by the figures beside them"),
            (space.n_not_reached, "were planned and not reached"),
            (space.n_illegal, "mechanisms or combinations cannot work here"),
        )
    ]
    late = " The time ended before the others had their turn: a larger --budget reaches them."
    return "; ".join(parts) + "." + (late if space.n_not_reached else "")


def illegal_groups(result: TuneResult) -> list[tuple[str, str]]:
    """(reason, names) of what cannot work here: the same reason is said once."""
    groups: dict[str, list[str]] = {}
    for item in result.space.illegal:
        groups.setdefault(plain(item.reason), []).append(plain(item.name))
    return [(reason, ", ".join(names)) for reason, names in groups.items()]
