"""The sentences of the report on `tune`: what came out, how sure it is, what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretune.report.units import (
    dig,
    format_bytes,
    format_number,
    format_percent,
    format_rate,
    format_ratio,
    format_sec,
    number,
    plain,
)

Result = Mapping[str, Any]
Trial = Mapping[str, Any]

OBJECTIVES = {
    "tpot": "the time per output token",
    "ttft": "the time to the first token",
    "throughput": "the output tokens per second",
    "memory": "the memory in use",
    "size": "the bytes of the stored weights",
}
_PHASES = {"prefill": "reading the prompt", "decode": "writing the answer"}


def find_trial(result: Result, key: str) -> Trial | None:
    """The trial whose id stands under `key` ("winner_id", "baseline_id")."""
    wanted = result.get(key)
    return next((t for t in result.get("trials") or [] if wanted is not None and t.get("id") == wanted), None)


def name_of(trial: Trial | None) -> str:
    return plain((trial or {}).get("name") or (trial or {}).get("id") or "unnamed")


def speedup_of(result: Result, trial: Trial | None) -> Mapping[str, Any]:
    """The speed-up to report: for the chosen trial that of the confirmation in fresh processes."""
    confirmed = dig(result, "confirmation", "speedup")
    if trial is not None and trial.get("id") == result.get("winner_id") and confirmed:
        return confirmed
    return dig(trial, "speedup") or {}


def quality_of(result: Result, trial: Trial | None) -> Mapping[str, Any]:
    """The quality to report, by the same rule."""
    confirmed = dig(result, "confirmation", "quality")
    if trial is not None and trial.get("id") == result.get("winner_id") and confirmed:
        return confirmed
    return dig(trial, "quality") or {}


def top_of(result: Result) -> dict[str, Any]:
    """Badge, headline and sentences: the answer before anything else."""
    outcome, winner = result.get("outcome"), find_trial(result, "winner_id")
    said = [plain(s) for s in result.get("verdict") or [] if s]
    if outcome == "winner":
        badge, tone, headline = "Winner found", "good", said[0] if said else _winner_headline(result, winner)
    elif outcome == "baseline":
        badge, tone = "Keep the baseline", "same"
        headline = said[0] if said else "Nothing beat the baseline beyond noise: keep it."
    elif outcome == "none":
        badge, tone = "Nothing reaches the goal", "warn"
        limit, speed = number(dig(result, "goal", "max_ppl_increase")), number(dig(result, "goal", "min_speedup"))
        within = "" if limit is None else f" (perplexity may rise by at most {format_percent(limit)})"
        asked = "" if speed is None else f" the speed-up of {speed:g} that was asked for"
        headline = f"No candidate reached{asked or ' the goal'} within the quality limit{within}."
        if winner is not None:
            said.append(f"The best so far is {name_of(winner)}.")
    elif outcome == "interrupted":
        badge, tone = "Interrupted: partial result", "warn"
        headline = "The search was stopped before it was finished."
        headline += f" Best so far: {name_of(winner)}." if winner else " Nothing has beaten the baseline so far."
        said.append("The numbers below are real, but more candidates could have followed.")
    else:
        badge, tone, headline = (
            "Unknown outcome",
            "warn",
            said[0] if said else "The outcome was not recorded.",
        )
    faster = [peer for peer in result.get("peers") or [] if peer.get("verdict") == "faster"]
    if any(peer.get("keeps_bound") is not False for peer in faster):  # what breaks the bound is not a rival
        badge, tone = f"{badge}; another engine is faster", "warn"
    seen = {headline.strip(". ").lower()}
    sentences = []
    for sentence in said:
        if sentence.strip(". ").lower() not in seen:
            seen.add(sentence.strip(". ").lower())
            sentences.append(sentence)
    return {"badge": badge, "tone": tone, "headline": headline, "sentences": sentences}


def _winner_headline(result: Result, winner: Trial | None) -> str:
    speed = speedup_of(result, winner)
    value = number(speed.get("value"))
    if value is None:
        return f"{name_of(winner)} was chosen."
    return f"{name_of(winner)} is {value:.2f} times as fast as the baseline."


def goal_sentence(result: Result) -> str:
    """What was asked for, in one sentence."""
    goal = result.get("goal") or {}
    objective = OBJECTIVES.get(str(goal.get("objective")), plain(goal.get("objective") or "an unknown objective"))
    parts = [f"The goal was to improve {objective}"]
    if number(goal.get("max_ppl_increase")) is not None:
        limit = format_percent(goal["max_ppl_increase"])
        parts.append(f" while perplexity (how surprised the model is by real text) rises by at most {limit}")
    load = [
        f"{format_number(goal[key])} {what}"
        for key, what in (
            ("input_len", "prompt tokens"),
            ("output_len", "output tokens"),
        )
        if number(goal.get(key)) is not None
    ]
    batch = number(goal.get("batch_size"))
    if batch is not None:
        load.append("one request at a time" if batch == 1 else f"{format_number(batch)} requests at a time")
    parts.append(f"; workload: {', '.join(load)}" if load else "")
    used, budget = number(result.get("elapsed_sec")), number(goal.get("budget_sec"))
    if used is not None:
        parts.append(f"; the search took {format_sec(used)}")
        parts.append(f" of {format_sec(budget)} allowed" if budget is not None else "")
    return "".join(parts) + "."


def _card(what: str, value: str, detail: str) -> dict[str, str]:
    return {"what": what, "value": value, "detail": detail}


def _change_card(what: str, before: Any, after: Any, show: Any) -> dict[str, str] | None:
    old, new = number(before), number(after)
    if new is None:
        return None
    if old is None:
        return _card(what, show(new), "baseline: not measured")
    change = "as the baseline" if old == new or not old else f"{format_percent(new / old - 1, signed=True)}"
    return _card(what, show(new), f"baseline: {show(old)} ({change})" if old != new else change)


def cards_of(result: Result) -> list[dict[str, str]]:
    """The key numbers of the winner (or of the best so far), the objective first."""
    winner, baseline = find_trial(result, "winner_id"), find_trial(result, "baseline_id")
    shown = winner or baseline
    if shown is None:
        return []
    is_winner = winner is not None and winner is not baseline
    confirmed = result.get("confirmation") or {} if is_winner else {}
    cards: list[tuple[str, dict[str, str] | None]] = []
    if is_winner:
        speed = speedup_of(result, winner)
        low, high = number(speed.get("low")), number(speed.get("high"))
        interval = f"95 % interval: {low:.2f}x to {high:.2f}x" if low is not None and high is not None else ""
        cards.append(("speed", _card("Speed-up over the baseline", format_ratio(speed.get("value")), interval)))
        quality = quality_of(result, winner)
        increase, limit = number(quality.get("ppl_increase")), number(dig(result, "goal", "max_ppl_increase"))
        if increase is not None:
            detail = f"at most {format_percent(quality.get('ppl_increase_upper'), signed=True)}"
            detail += f"; limit {format_percent(limit, signed=True)}" if limit is not None else ""
            cards.append(("quality", _card("Perplexity", format_percent(increase, signed=True), detail)))
        elif winner is not None and winner.get("label") == "lossless":
            cards.append(("quality", _card("Quality", "unchanged", "shown to give the same output (lossless)")))
        else:
            cards.append(("quality", _card("Quality", "not measured", "")))
    for key, what in (("tpot", "Time per output token"), ("ttft", "Time to first token")):
        before = confirmed.get(f"baseline_{key}_sec") or dig(baseline, f"{key}_sec")
        after = confirmed.get(f"{key}_sec") or dig(shown, f"{key}_sec")
        cards.append((key, _change_card(what, before if is_winner else after, after, format_sec)))
    for key, part, what in (
        ("size", "weights_bytes", "Weights in memory"),
        ("memory", "rss_peak_bytes", "Peak memory of the process"),
    ):
        before, after = dig(baseline, "memory", part), dig(shown, "memory", part)
        cards.append((key, _change_card(what, before if is_winner else after, after, format_bytes)))
    objective = dig(result, "goal", "objective")
    cards.sort(key=lambda c: c[0] != ("speed" if objective in ("tpot", "ttft", "throughput") else objective))
    found = [card for _, card in cards if card is not None]
    if not is_winner:
        for card in found:
            card["what"] += " (baseline)"
            card["detail"] = ""
    return found


def certainty_of(result: Result) -> list[str]:
    """How far the numbers can be trusted, one thing a sentence."""
    out = []
    aa = result.get("aa") or {}
    if number(aa.get("value")) is not None:
        sentence = f"Resolution: the baseline timed against itself through the same procedure gave {aa['value']:.3f}x"
        if number(aa.get("low")) is not None and number(aa.get("high")) is not None:
            sentence += f" [{aa['low']:.3f}, {aa['high']:.3f}]"
        half = number(aa.get("half_width"))
        sentence += "" if half is None else f". Differences below {format_percent(half)} cannot be told apart here"
        out.append(sentence + ".")
    else:
        out.append("Resolution: the baseline was not timed against itself, so the noise of this machine is unknown.")
    out.append(
        "Method: in each block every candidate and the baseline are timed side by side in random order, so "
        "that slow drift and other programs hit all of them alike. Ranges are 95 % confidence intervals."
    )
    out.append(_confirmation_sentence(result))
    winner = find_trial(result, "winner_id")
    if winner is find_trial(result, "baseline_id"):
        winner = None  # the baseline compared with itself says nothing
    states = dig(result, "bandwidth", "states")
    if states:
        low, high = (format_rate(states.get(k)) for k in ("low", "high"))
        sentence = f"Memory speed: this machine switches between a slow state ({low}) and a fast state ({high})"
        by_state = dig(speedup_of(result, winner), "by_state")
        if by_state:
            slow, fast = (format_ratio(by_state.get(k)) for k in ("low", "high"))
            sentence += f"; the speed-up was {slow} in the slow one and {fast} in the fast one"
        out.append(sentence + ".")
    quality = quality_of(result, winner)
    if number(quality.get("n_windows")) is not None:
        sentence = (
            f"Quality: compared with the baseline on the same {format_number(quality['n_windows'])} windows "
            f"of text (protocol {plain(quality.get('protocol') or 'not recorded')})"
        )
        if quality.get("phase") in _PHASES:
            sentence += f"; the worse of reading and writing counts, here {_PHASES[quality['phase']]}"
        if number(quality.get("top1_agreement")) is not None:
            share = format_percent(quality["top1_agreement"])
            sentence += f"; the most likely next token is the same in {share} of the places"
        out.append(sentence + ".")
    return out


def _confirmation_sentence(result: Result) -> str:
    confirmation = result.get("confirmation")
    if not confirmation:
        if result.get("winner_id") is None or result.get("winner_id") == result.get("baseline_id"):
            return "Confirmation: nothing had to be confirmed, because nothing was chosen over the baseline."
        return "Confirmation: the choice was not measured again in fresh processes; take the speed-up with care."
    n = number(confirmation.get("n_processes"))
    where = f"{format_number(n)} fresh processes" if n else "fresh processes"
    sentence = f"Confirmation: the choice was measured again in {where} on new prompts"
    sentence += "; the numbers on top are from there"
    note = plain(confirmation.get("note") or "").rstrip(".")
    return f"{sentence}. {note}." if note else f"{sentence}."


_UNITS = {"tpot": "an output token", "ttft": "the first token", "throughput": "an output token of the whole batch"}


def peers_sentences(result: Result) -> list[str]:
    """How the other engines were compared, and what that does not say."""
    measured, limit = result.get("peers_measured") or {}, number(dig(result, "goal", "max_ppl_increase"))
    if number(measured.get("reference_sec")) is None:
        return ["Nothing was measured beside other engines; the table says why."]
    out = [
        "After the search, the plan's recipe, the baseline and each engine were timed again side by side in random "
        "order, in fresh processes on the same prompts. Times are for "
        f"{_UNITS.get(str(measured.get('kind')), 'a unit of work')}; above 1.00x the plan is faster."
    ]
    half = number(measured.get("aa_half_width"))
    if half is not None:
        out.append(f"The plan's recipe timed against itself there differed by up to {format_percent(half)}.")
    bound = "the perplexity bound" if limit is None else f"the perplexity bound of {format_percent(limit)}"
    out.append(
        "An engine has to agree with our fp32, on text that the model wrote itself, before it is timed. Same top "
        "token: positions at which its most likely token is ours. Logit error: root mean square of the difference of "
        "its logits from ours / that of ours."
    )
    if any(peer.get("perplexity") is not None for peer in result.get("peers") or []):
        out.append(
            "Loss at most: the one-sided 95 % bound of its increase of perplexity, on the windows on which the choice "
            f"is confirmed, each shown to it whole; it keeps {bound} where that is within it. What its decode steps "
            "would add is not measured."
        )
    return out


def space_sentence(result: Result) -> str:
    """How much of what could be tried was tried."""
    space = result.get("space") or {}
    parts = [
        f"{format_number(space[key])} {what}"
        for key, what in (
            ("n_legal", "combinations are possible here"),
            ("n_measured", "were measured"),
            ("n_failed", "failed"),
            ("n_excluded", "cannot win, by the figures beside them"),
            ("n_not_reached", "were planned and not reached"),
            ("n_illegal", "mechanisms or combinations cannot work here"),
        )
        if number(space.get(key)) is not None
    ]
    if not parts:
        return "The size of the search was not recorded."
    n_late = number(space.get("n_not_reached")) or 0
    rest = " The time ended before the others had their turn: a larger --budget reaches them." if n_late else ""
    return "; ".join(parts) + "." + rest


def illegal_groups(result: Result) -> list[tuple[str, str]]:
    """(reason, names) of what cannot work here: the same reason is said once."""
    groups: dict[str, list[str]] = {}
    for item in dig(result, "space", "illegal") or []:
        groups.setdefault(plain(item.get("reason") or "reason not recorded"), []).append(name_of(item))
    return [(reason, ", ".join(names)) for reason, names in groups.items()]
