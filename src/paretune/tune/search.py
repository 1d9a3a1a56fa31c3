"""The search: waves of candidates raced against the baseline, a quality gate, finals, and a confirmation.

    baseline and its twin -> waves (prove, warm up, race, drop what loses) -> gate the best on paired quality
    -> finals with corrected intervals -> the winner again in fresh processes, on fresh prompts and unseen text

The baseline wins unless it is beaten beyond noise. Ties go to the simpler recipe. Whatever happens, what was found so
far is written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paretune import hardware, stats
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.fidelity import Fidelity, windows_of
from paretune.evaluate.perplexity import MIN_BLOCKS, count_blocks
from paretune.evaluate.texts import read_text, text_of
from paretune.measure.environment import versions
from paretune.measure.interleave import Blocks
from paretune.measure.workload import Workload
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.tokenizer import Tokenizer
from paretune.recipe import Recipe
from paretune.tune import space as spaces
from paretune.tune.goal import Goal
from paretune.tune.journal import Journal
from paretune.tune.race import BASELINE, TWIN, Race, TrialState

WAVE = 6  # candidates at once: a block then takes about two seconds
SCREEN_BLOCKS = 6  # enough for a finite interval (stats.MIN_BLOCKS)
FINAL_LOOKS = stats.looks(14, 40)  # blocks after which a final may end
CONFIRM_ROUNDS, CONFIRM_BLOCKS = 2, 10
N_FINALISTS = 3
# Of the budget: the search, the quality gate, the finals have ended.
SEARCH_SHARE, GATE_SHARE, FINAL_SHARE = 0.5, 0.62, 0.78
SLICE_SEC = 0.45  # one slice with its probes, repeats and the change of processes, roughly
PROFILE_SEC = 5.0  # a quick profile of a trial that is loaded and warm, roughly
WINDOW_LEN = 257  # tokens: 128 scored in prefill, 128 in decode
MAX_WINDOWS = {"search": 40, "confirm": 48}  # many are scored in the search, one is confirmed
TOO_NOISY = 0.25  # A/A half width above which no verdict is given
MIN_BYTES_GAIN = 1.02


@dataclass
class Outcome:
    """What the search found, before it is told to anybody."""

    goal: Goal
    model_name: str
    model_folder: Path
    config: ModelConfig
    space: spaces.Space
    race: Race
    ceilings: hardware.Ceilings | None = None
    kind: str = "baseline"  # winner, baseline, none, interrupted
    winner: str | None = None
    qualities: dict[str, Fidelity] = field(default_factory=dict)
    confirmation: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)  # won the finals and did not hold
    too_noisy: bool = False
    peers: dict[str, Any] | None = None  # of `peers.compare`
    explanations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # of the winner and the baseline
    quality_len: int = WINDOW_LEN  # tokens of a window that quality was measured on
    regimes: dict[str, Any] | None = None  # of `regimes.explore`

    @property
    def resolution(self) -> float:
        """A/A half width over all blocks so far; infinite while there are too few."""
        return self.race.measured().aa_resolution(BASELINE, TWIN)

    def ratio(self, id: str, level: float = stats.LEVEL) -> stats.Interval:
        """How many times better than the baseline: speed, or bytes where the objective is in bytes."""
        if self.goal.in_bytes:
            value = objective_bytes(self.goal, self.race.trials[BASELINE]) / objective_bytes(
                self.goal, self.race.trials[id]
            )
            return stats.Interval(value, value, value, 1)
        return self.race.measured().ratio(BASELINE, id, level)

    def verdict(self, id: str, level: float = stats.LEVEL) -> str:
        if self.goal.in_bytes:
            value = self.ratio(id).value
            return "faster" if value >= MIN_BYTES_GAIN else "slower" if value < 1 else "indistinguishable"
        return stats.verdict(self.ratio(id, level), resolution=self.resolution)


def objective_bytes(goal: Goal, state: TrialState) -> float:
    """Stored weights ("size"), or weights, cache and activations ("memory")."""
    assert state.facts is not None
    memory = state.facts["memory"]
    if goal.objective == "size":
        return memory["weights_bytes"]
    return memory["weights_bytes"] + memory["kv_cache_bytes"] + (memory["activation_peak_bytes"] or 0)


class Search:
    """One `tune` run.

    Args:
        model: folder, hub id or `pocket`.
        text: file to evaluate on; None takes the project's own pieces.
        say: progress, a line at a time; never called while a sample is taken.
        prepare: makes room in `folder`; called when everything else is known to be right.
    """

    window_len = WINDOW_LEN  # tokens that quality is measured on

    def __init__(
        self,
        model: str,
        goal: Goal,
        folder: Path,
        *,
        text: Path | None,
        resume: bool,
        say: Callable[[str], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.goal, self.say = goal, say
        model_folder = checkpoint.resolve(model)
        config = checkpoint.read_config(model_folder)
        checkpoint.weight_files(model_folder)
        Workload(goal.input_len, goal.output_len, goal.batch_size).check(config.n_positions)
        check_device(goal.device)
        self.tokenizer = Tokenizer(model_folder)
        self.text_name = "pieces" if text is None else Path(text).stem
        n_tokens = goal.input_len + goal.output_len
        if spaces.mechanism_reason(config, n_tokens) is None:
            # A window loses what lies beyond it: its quality is that of sequences as long as the request.
            self.window_len = max(WINDOW_LEN, n_tokens + 1)
        self.windows = self._windows(config, text)
        files = [p.stat() for p in checkpoint.weight_files(model_folder)]
        key = {
            "model": str(model),
            "weights": [(f.st_size, f.st_mtime_ns) for f in files],
            "goal": goal.to_json(),
            "text": hashlib.sha256(b"".join(w.numpy().tobytes() for w in self.windows.values())).hexdigest(),
            # Numbers of two machines, or of two versions, never share a row.
            "machine": hardware.fingerprint_id(hardware.fingerprint()),
            "versions": versions(),
        }
        space = spaces.build(goal.device, config, n_tokens)  # before the clock of the budget runs
        prepare()
        self.journal = Journal(folder, key, resume)
        race = Race(goal, folder, model_folder, self.journal, say)
        # Long enough for what a window skips to be among what is checked.
        n_check = 48 if self.window_len == WINDOW_LEN else spaces.WINDOW + 48
        race.check_prompt = self.windows["search"][0, :n_check].tolist()
        self.out = Outcome(goal, model, model_folder, config, space, race)
        self.out.quality_len = self.windows["search"].size(1)

    def _windows(self, config: ModelConfig, text: Path | None) -> dict[str, torch.Tensor]:
        """Disjoint windows for search and confirmation.

        Raises:
            ParetuneError: the text is too short for a bound.
        """
        length = min(self.window_len, config.n_positions)
        if text is None:
            ids = {split: self.tokenizer.encode(text_of(split)) for split in ("search", "confirm")}  # type: ignore[arg-type]
        else:
            whole = self.tokenizer.encode(read_text(text))
            ids = {"search": whole[: len(whole) // 2], "confirm": whole[len(whole) // 2 :]}
        out = {}
        for split, tokens in ids.items():
            n = len(tokens) // length
            needed = 1
            while min(count_blocks(needed, s) for s in (length // 2, length - 1 - length // 2)) < MIN_BLOCKS:
                needed += 1
            if n < needed:
                raise ParetuneError(
                    f"the text gives {n} windows of {length} tokens to {split} on, a bound needs {needed}",
                    f"Pass a --text of at least {2 * needed * length} tokens",
                )
            most = MAX_WINDOWS[split] * WINDOW_LEN // max(length, WINDOW_LEN)  # as many tokens, if windows are longer
            out[split] = windows_of(tokens, length)[: max(needed, most)]
        if max(int(w.max()) for w in out.values()) >= config.vocab_size:
            raise UsageError("the tokenizer gives tokens that the model does not know", "Use the model's own tokenizer")
        return out

    # -- the run

    def run(self) -> Outcome:
        """Searches; on Ctrl-C returns what is known."""
        try:
            self._run()
        except KeyboardInterrupt:
            self.out.kind = "interrupted"
            self.out.winner = self._best_so_far()
        finally:
            self.out.race.stop_all()
        return self.out

    def _run(self) -> None:
        race, goal = self.out.race, self.goal
        self.say("measuring the limits of this machine")
        known = self.journal.find("ceilings")
        if known:
            self.out.ceilings = hardware.Ceilings.from_json(known["ceilings"])
        else:
            hardware.set_threads(goal.threads)
            self.out.ceilings = hardware.ceilings(goal.device, quick=True)
            self.journal.record("ceilings", ceilings=self.out.ceilings.to_json())
        base = spaces.baseline()
        race.add(BASELINE, base)
        race.add(TWIN, base)
        race.start([i for i in (BASELINE, TWIN) if race.trials[i].facts is None])
        failure = race.trials[BASELINE].failure or race.trials[TWIN].failure
        if failure:
            raise ParetuneError(f"the baseline itself does not run: {failure}", "Try `paretune generate` on the model")
        self.journal.start_clock()
        self._waves()
        finalists = self._gate()
        winner = self._finals(finalists)
        self._confirm(winner, finalists)

    def _left(self, share: float) -> float:
        return share * self.goal.budget_sec - self.journal.elapsed_sec

    # -- waves

    def _waves(self) -> None:
        race = self.out.race
        index = 0
        while True:
            known = self.journal.find("wave", index=index)
            if known:
                by_id = {c.id: c for c in self.out.space.legal}
                wave = [by_id[i] for i in known["trials"] if i in by_id]  # a compiler may be gone since
            else:
                room = self._room()
                # A wave that starts has time for its blocks too, or its rows would say nothing.
                left = self._left(SEARCH_SHARE) - SCREEN_BLOCKS * SLICE_SEC * (2 + room)
                if left <= 0:
                    return
                tried = set(race.trials)
                wave = spaces.next_wave(self.out.space, tried, self._singles(), self._start_secs(), left, room)
                if not wave:
                    return
                self.journal.record("wave", index=index, trials=[c.id for c in wave])
            ids = [race.add(c.id, c.recipe).id for c in wave]
            deadline = self.goal.budget_sec * (SEARCH_SHARE + 0.05)
            if not race.is_whole(f"wave {index}") and self.journal.elapsed_sec < deadline:
                race.start(ids)
            self.say(f"racing {len(race.alive(ids))} candidates against the baseline")
            race.blocks(f"wave {index}", [BASELINE, TWIN, *ids], SCREEN_BLOCKS, deadline)
            if race.trials[BASELINE].failure:  # without it no block can be judged
                cause = race.trials[BASELINE].failure
                raise ParetuneError(f"the baseline failed: {cause}", "Free memory and try again")
            self._drop_losers()
            index += 1

    def _room(self) -> int:
        """How many candidates fit into memory beside those that are kept alive."""
        state = self.out.race.trials[BASELINE]
        assert state.facts is not None
        # A proof holds the model three times: itself, its reference form, the fp32 original.
        each = state.facts["memory"]["rss_peak_bytes"] + 2 * state.facts["weights_bytes"]
        return max(1, min(WAVE, int(0.8 * hardware.available_memory_bytes() / max(each, 1))))

    def _drop_losers(self) -> None:
        """Ends the processes of trials that cannot win any more; their rows stay."""
        scores = {i: self.out.ratio(i) for i in self._rows()}
        best_low = max([1.0] + [r.low for r in scores.values()])
        ranked = sorted(scores, key=lambda i: -scores[i].value)
        for id in ranked:
            if scores[id].high < best_low or id not in ranked[: 2 * N_FINALISTS]:
                self.out.race.stop(id)

    def _rows(self) -> list[str]:
        """Trials that have been measured, the baseline and its twin aside."""
        race, blocks = self.out.race, self.out.race.measured()
        return [
            i
            for i, s in race.trials.items()
            if i not in (BASELINE, TWIN)
            and not i.startswith("confirm")
            and not s.failure
            and i in blocks.subjects
            # The deadline may have cut a first block before the baseline's turn: that compares with nothing.
            and len(blocks.paired(BASELINE, i)[0])
        ]

    def _singles(self) -> dict[tuple[str, str | None], float]:
        rows = set(self._rows())
        failed = {i for i, s in self.out.race.trials.items() if s.failure}
        out: dict[tuple[str, str | None], float] = {}
        for c in self.out.space.legal:
            if change := c.single:
                if c.id in rows:
                    gain = math.log(self.out.ratio(c.id).value)
                    # What runs natively alone is compared with the native runner by itself.
                    alone = gain if len(c.changes) == 1 else gain - out.get(("runner", "native"), 0.0)
                    out[change] = max(alone, out.get(change, -math.inf))  # a mechanism is seen eager and native
                elif c.id in failed:
                    out.setdefault(change, -10.0)  # what fails alone is not tried in company first
        return out

    def _start_secs(self) -> dict[str, float]:
        """Start-up seconds by runner as seen here; a runner not seen yet scales with those that were."""
        seen: dict[str, list[float]] = {}
        for c in self.out.space.legal:
            state = self.out.race.trials.get(c.id)
            if state and state.start_sec:
                seen.setdefault(c.choice[3], []).append(state.start_sec)
        out = {runner: max(times) for runner, times in seen.items()}
        defaults = spaces.DEFAULT_START_SEC
        scale = max([out[r] / defaults[r] for r in out], default=1.0)
        return {r: out.get(r, defaults[r] * max(1.0, scale)) for r in defaults}

    # -- gate and finals

    def _ranked(self) -> list[str]:
        return sorted(self._rows(), key=lambda i: -self.out.ratio(i).value)

    def _gate(self) -> list[str]:
        """The best candidates whose paired quality is within the bound, at most `N_FINALISTS`."""
        known = self.journal.find("finalists")
        if known:  # decided by what had been measured then: a resumed run does not decide anew
            return [i for i in known["trials"] if i in self.out.race.trials and self._quality(i) is not None]
        passed: list[str] = []
        for id in self._ranked():
            if len(passed) == N_FINALISTS or self._left(GATE_SHARE) <= 0:
                break
            if self.out.ratio(id).high < 1 or self.out.verdict(id) == "slower":
                continue
            quality = self._quality(id)
            if quality is None:
                continue
            if quality.within_bound:
                passed.append(id)
            else:
                self.out.race.stop(id)
        self.journal.record("finalists", trials=passed)
        return passed

    def _quality(self, id: str) -> Fidelity | None:
        quality = self.out.race.quality(id, BASELINE, "search", self.windows["search"], f"{self.text_name}/search")
        if quality is not None:
            self.out.qualities[id] = quality
        return quality

    def _finals(self, finalists: Sequence[str]) -> str | None:
        """Races the finalists until each is decided; returns the winner."""
        race, goal = self.out.race, self.goal
        if not finalists:
            return None
        level = stats.LEVEL
        if not goal.in_bytes:
            done = 0
            for i, n in enumerate(FINAL_LOOKS):
                level = stats.look_level(i, len(FINAL_LOOKS))
                self.say(f"finals: {len(race.alive(finalists))} candidates, {n} blocks")
                whole = race.blocks(f"final {i}", [BASELINE, TWIN, *finalists], n - done, FINAL_SHARE * goal.budget_sec)
                done = n
                if not whole or all(self.out.verdict(f, level) != "undecided" for f in race.alive(finalists)):
                    break
        # Without a resolution (too few blocks) it was the budget, not the noise.
        self.out.too_noisy = not goal.in_bytes and TOO_NOISY < self.out.resolution < math.inf
        if self.out.too_noisy:
            return None
        return self._choose(race.alive(finalists), level)

    def _choose(self, ids: Sequence[str], level: float) -> str | None:
        """The best that is surely better than the baseline; among equals the simpler one."""
        out, blocks = self.out, self.out.race.measured()
        better = [i for i in ids if out.verdict(i, level) == "faster"]
        if not better:
            return None
        if not out.goal.in_bytes:
            delta = max(stats.DELTA, out.resolution)
            p_values = [stats.faster_p_value(*blocks.paired(BASELINE, i), delta) for i in better]
            better = [i for i, sure in zip(better, stats.holm(p_values), strict=True) if sure]
            if not better:
                return None
        best = max(better, key=lambda i: out.ratio(i).value)
        if out.goal.in_bytes:
            equal = [i for i in better if out.ratio(i).value * MIN_BYTES_GAIN > out.ratio(best).value]
        else:
            equal = [i for i in better if i == best or not _surely_better(blocks, best, i)]
        wanted = out.goal.min_speedup or 0.0  # a simpler recipe that misses it is no equal of one that reaches it
        if out.ratio(best).value >= wanted:
            equal = [i for i in equal if out.ratio(i).value >= wanted]
        simplest = min(equal, key=lambda i: (out.race.trials[i].recipe.complexity, -out.ratio(i).value))
        if simplest != best:
            names = (out.race.trials[simplest].recipe.name, out.race.trials[best].recipe.name)
            out.notes.append(f"{names[0]} and {names[1]} cannot be told apart: the simpler one was taken.")
        return simplest

    # -- confirmation

    def _confirm(self, winner: str | None, finalists: Sequence[str]) -> None:
        """Measures the winner again; where it does not hold, the next one has its turn."""
        left = [f for f in finalists if f != winner]
        while winner is not None:
            for id in list(self.out.race.trials):
                self.out.race.stop(id)
            confirmation, cause = self._confirmed(winner)
            name = self.out.race.trials[winner].recipe.name
            if confirmation is not None:
                out, wanted = self.out, self.goal.min_speedup or 0
                value = confirmation["speedup"]["value"]
                if out.confirmation is None or value > out.confirmation["speedup"]["value"]:
                    out.winner, out.confirmation = winner, confirmation
                out.kind = "winner" if value >= wanted else "none"
                if out.kind == "winner":
                    return
                out.notes.append(f"{name} reached {value:.2f}x in fresh processes, not the {wanted:g}x asked for.")
            else:
                self.out.refused.add(winner)
                self.out.notes.append(
                    f"{name} won the finals but did not hold in fresh processes ({cause}): not taken."
                )
            better = [f for f in left if self.out.verdict(f) == "faster" and not self.out.race.trials[f].failure]
            winner = max(better, key=lambda i: self.out.ratio(i).value) if better and self._left(0.9) > 0 else None
            left = [f for f in left if f != winner]
        if BASELINE not in self.out.explanations:
            self._explain(BASELINE, BASELINE)
        if self.out.confirmation is None:
            wanted = (self.goal.min_speedup or 0) > 1 and not self.out.too_noisy
            self.out.kind = "none" if wanted else "baseline"

    def _confirmed(self, winner: str) -> tuple[dict[str, Any] | None, str]:
        """The winner and the baseline in fresh processes, on fresh prompts and unseen text; or why it does not hold."""
        race, goal = self.out.race, self.goal
        recipe = race.trials[winner].recipe
        pairs: list[tuple[Any, Any]] = []
        values: dict[str, list[float]] = {"ours": [], "base": []}
        quality: Fidelity | None = None
        for round in range(CONFIRM_ROUNDS):
            done = self.journal.find("stage", stage=f"confirm {winner} {round}")
            if round and not done and self._left(1.0) < race.trials[winner].start_sec:
                self.out.notes.append("The budget allowed one confirmation round, not two.")
                break
            base, ours = f"confirm-{winner}-{round}-baseline", f"confirm-{winner}-{round}"
            self.say(f"confirming {recipe.name} in fresh processes ({round + 1} of {CONFIRM_ROUNDS})")
            race.add(base, race.trials[BASELINE].recipe, seed=goal.seed + 1000 + round)
            race.add(ours, recipe, seed=goal.seed + 1000 + round)
            race.blocks(f"confirm {winner} {round}", [base, ours], CONFIRM_BLOCKS, None)
            if failure := race.trials[ours].failure:
                return None, failure
            if failure := race.trials[base].failure:
                return None, f"the baseline beside it failed: {failure}"
            blocks = race.measured()
            pairs.append(blocks.paired(base, ours))
            values["base"] += blocks.values(base).tolist()
            values["ours"] += blocks.values(ours).tolist()
            if quality is None:
                quality = race.quality(ours, base, "confirm", self.windows["confirm"], f"{self.text_name}/confirm")
                self._explain(BASELINE, base)
                self._explain(winner, ours)
            sides = {i: race.trials[i].facts for i in (base, ours)}
            race.stop(base)
            race.stop(ours)
        import numpy as np

        a, b = (np.concatenate([p[k] for p in pairs]) for k in (0, 1))
        speed = stats.speed_ratio(a, b)
        verdict = stats.verdict(speed, resolution=min(self.out.resolution, TOO_NOISY))
        if quality is None or not quality.within_bound:
            return None, quality.reason if quality else "it could not be scored"
        if not goal.in_bytes and verdict != "faster":
            return None, f"{speed.value:.2f} times as fast, {speed.low:.2f} to {speed.high:.2f}: {verdict}"
        facts, base_facts = sides[ours], sides[base]
        assert facts is not None and base_facts is not None
        median = {k: float(np.median(v)) for k, v in values.items()}
        result: dict[str, Any] = {
            "speedup": {"value": speed.value, "low": speed.low, "high": speed.high, "n_blocks": speed.n},
            "quality": quality.to_json(),
            "n_processes": len(pairs),
            "median_sec": median,
            "note": f"{len(pairs)} fresh {'pair' if len(pairs) == 1 else 'pairs'} of processes, fresh prompts, "
            "text that the search did not see",
        }
        result["speedup"]["verdict"] = verdict
        for kind in ("ttft", "tpot"):
            timed = goal.sample_kind == kind
            result[f"{kind}_sec"] = median["ours"] if timed else facts["side_sec"][kind]
            result[f"baseline_{kind}_sec"] = median["base"] if timed else base_facts["side_sec"][kind]
        return result, ""

    def _explain(self, id: str, process: str) -> None:
        """Why a trial is as fast as it is, from a profile in the process of its twin `process`, if time is left."""
        assert self.out.ceilings is not None
        if self._left(1.0) < PROFILE_SEC and not self.journal.find("why", trial=process):
            return
        found = self.out.race.why(process, self.out.ceilings)
        if found is not None:
            self.out.explanations[id] = found

    def _best_so_far(self) -> str | None:
        """For an interrupted run: the best row that is surely better and was gated."""
        passed = [i for i, q in self.out.qualities.items() if q.within_bound and i in self._rows()]
        sure = [i for i in passed if self.out.verdict(i) == "faster"]
        return max(sure, key=lambda i: self.out.ratio(i).value) if sure else None


def check_device(device: str) -> None:
    """Raises UsageError where there is no such device."""
    if not (device == "cpu" or (device.partition(":")[0] == "cuda" and hardware.has_cuda())):
        raise UsageError(f"there is no device {device!r} here", "Use --device cpu")


def _surely_better(blocks: Blocks, best: str, other: str) -> bool:
    if len(blocks.paired(other, best)[0]) < stats.MIN_BLOCKS:
        return True
    return blocks.ratio(other, best).low > 1.0


def baseline_recipe(out: Outcome) -> Recipe:
    return out.race.trials[BASELINE].recipe if BASELINE in out.race.trials else spaces.baseline()
