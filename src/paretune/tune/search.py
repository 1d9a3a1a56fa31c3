"""The search: waves of candidates raced against the baseline, a quality gate after each, finals, and a confirmation.

    baseline and its twin -> [propose a wave -> race it in blocks -> gate what leads on paired quality] ...
    -> finals with corrected intervals -> the winner again in fresh processes, on fresh prompts and unseen text

From the first candidate that is surely faster and keeps the quality on there is an answer, and it can only get better.
The baseline wins unless it is beaten beyond noise. Ties go to the simpler recipe. Whatever happens, what was found so
far is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from paretune import hardware, stats
from paretune.errors import ParetuneError, UsageError
from paretune.evaluate.fidelity import windows_of
from paretune.evaluate.perplexity import MIN_BLOCKS, count_blocks
from paretune.evaluate.texts import read_text, text_of
from paretune.measure.environment import versions
from paretune.measure.grid import n_parameters, shared_and_own_bytes, trial_bytes
from paretune.measure.interleave import Blocks
from paretune.measure.workload import DECODE_SLICE, MIN_SLICE_SEC, Workload
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.tokenizer import Tokenizer
from paretune.records.bench import Cell
from paretune.records.judge import MIN_BYTES_GAIN, is_noisy
from paretune.records.record import to_json
from paretune.tune import space as spaces
from paretune.tune.confirm import CONFIRM_BLOCKS, CONFIRM_ROUNDS, Confirmer
from paretune.tune.estimate import Estimator
from paretune.tune.gate import Gate
from paretune.tune.goal import Goal
from paretune.tune.journal import Journal
from paretune.tune.outcome import Outcome
from paretune.tune.propose import Proposer
from paretune.tune.race import BASELINE, TWIN, Race

WAVE = 6  # candidates at once: a block then takes about two seconds
SCREEN_BLOCKS = 6  # enough for a finite interval (stats.MIN_BLOCKS)
TWIN_BLOCKS = 18  # from here on the twin rests until the finals: what the machine resolves is known
FINAL_LOOKS = stats.looks(14, 40)  # blocks after which a final may end
N_FINALISTS = 3
MOST_RESERVED = 0.5  # of the budget, for finals and confirmation: a short budget searches too
OVERHEAD_SEC = 0.15  # of a slice: its probes, repeats and the change of processes, roughly
IMPORT_SEC = 4.0  # a newly executed process more than a forked one, roughly
WINDOW_LEN = 257  # tokens: 128 scored in prefill, 128 in decode
MAX_WINDOWS = {"search": 40, "confirm": 48}  # many are scored in the search, one is confirmed


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
        hardware.check_device(goal.device)
        self.tokenizer = Tokenizer(model_folder)
        self.text_name = "pieces" if text is None else Path(text).stem
        n_tokens = goal.input_len + goal.output_len
        differs_after = spaces.differs_after(goal.device, config, n_tokens)
        if differs_after:
            # A window loses what lies beyond it: its quality is that of sequences as long as the request.
            self.window_len = max(WINDOW_LEN, n_tokens + 1)
        self.windows = self._windows(config, text)
        files = [p.stat() for p in checkpoint.weight_files(model_folder)]
        key = {
            "model": str(model),
            "weights": [(f.st_size, f.st_mtime_ns) for f in files],
            "goal": to_json(goal),
            "text": hashlib.sha256(b"".join(w.numpy().tobytes() for w in self.windows.values())).hexdigest(),
            # Numbers of two machines, or of two versions, never share a row.
            "machine": hardware.fingerprint_id(hardware.fingerprint()),
            "versions": versions(),
        }
        self.has_room_for_twin = _check_memory(config, goal)
        space = spaces.build(goal.device, config, n_tokens, goal.allow)  # before the clock of the budget runs
        prepare()
        self.journal = Journal(folder, key, resume)
        race = Race(goal, folder, model_folder, self.journal, say)
        # Long enough for what a window skips to be among what is checked.
        n_check = differs_after + 48
        race.check_prompt = self.windows["search"][0, :n_check].tolist()
        self.out = Outcome(goal, str(model), model_folder, config, space, race)
        self.out.quality_len = self.windows["search"].size(1)
        self.gate = Gate(self.out, self.windows["search"], self.text_name, say, any_scorer=self.has_room_for_twin)

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
            self.out.winner = self.out.leader()
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
        self.proposer = Proposer(self.out, Estimator(self.out.config, goal, self.out.ceilings))
        base = spaces.baseline()
        race.add(BASELINE, base)
        race.add(TWIN, base)
        race.start([i for i in (BASELINE, TWIN) if race.trials[i].facts is None])
        failure = race.trials[BASELINE].failure or race.trials[TWIN].failure
        if failure:
            raise ParetuneError(f"the baseline itself does not run: {failure}", "Try `paretune generate` on the model")
        self.journal.start_clock()
        if not self.has_room_for_twin:  # what the machine resolves is measured first, and the twin's place is free then
            race.blocks("twin", [BASELINE, TWIN], TWIN_BLOCKS, 0.25 * goal.budget_sec)
            race.stop(TWIN)
        confirmer = Confirmer(self.out, self.gate, self.windows["confirm"], self.text_name, self.say)
        index = 0
        while True:
            index = self._search(index)
            finalists = self._finalists(index)
            winner = self._finals(index, finalists)
            if confirmer.confirm(winner, finalists) or winner not in self.out.refused or self._left() <= 0:
                return
            index += 1  # nobody held: others, and what was left out because of them, may win after all

    def _left(self) -> float:
        """Seconds of the budget that the search may still use: finals and confirmation have theirs."""
        return self.goal.budget_sec - self._reserved_sec() - self.journal.elapsed_sec

    def _reserved_sec(self) -> float:
        """What finals and confirmation take, from what this run has seen of starts, slices and scores."""
        out = self.out
        leader = out.leader() or BASELINE
        base, ours = (self._slice_sec(i) for i in (BASELINE, leader))
        start = sum(out.race.trials[i].start_sec + IMPORT_SEC for i in (BASELINE, leader))
        confirm = CONFIRM_ROUNDS * (start + CONFIRM_BLOCKS * (base + ours))
        finals = 0.0 if self.goal.in_bytes else FINAL_LOOKS[0] * (2 * base + N_FINALISTS * ours)
        scoring = sum(self._window_sec(i) for i in (out.scorer, leader)) * self.windows["confirm"].size(0)
        return min(MOST_RESERVED * self.goal.budget_sec, confirm + finals + scoring)

    def _slice_sec(self, id: str) -> float:
        """Seconds that a slice of a trial takes in a block, its probes included."""
        goal = self.goal
        values = self.out.race.measured().values(id) if id in self.out.race.measured().subjects else np.array([])
        if not len(values):
            return MIN_SLICE_SEC + OVERHEAD_SEC
        units = {
            "tpot": min(DECODE_SLICE, max(1, goal.output_len - 1)),
            "throughput": goal.batch_size * goal.output_len,
        }
        return max(MIN_SLICE_SEC, float(np.median(values)) * units.get(goal.sample_kind, 1)) + OVERHEAD_SEC

    def _window_sec(self, id: str) -> float:
        """Seconds to score one window with a trial, as seen; 0 where it scored none."""
        seen = [e for e in self.journal.all("scored") if e["trial"] == id and "score_sec" in e]
        return max((e["score_sec"] / max(1, e["stop"] - e["start"]) for e in seen), default=0.0)

    # -- waves

    def _search(self, index: int) -> int:
        """Waves until the space or the time for them is used up; gives the index of the wave that was not."""
        race = self.out.race
        while True:
            wave = self._wave(index)
            if not wave:
                return index
            ids = [race.add(c.id, c.recipe).id for c in wave]
            stage = f"wave {index}"
            deadline = self.goal.budget_sec - 0.5 * self._reserved_sec()
            if not race.is_whole(stage):
                ids = self._start(ids, deadline)
            self.say(f"racing {len(race.alive(ids))} candidates against the baseline")
            race.blocks(stage, [*self._yardsticks(), *ids], SCREEN_BLOCKS, deadline)
            if race.trials[BASELINE].failure:  # without it no block can be judged
                cause = race.trials[BASELINE].failure
                raise ParetuneError(f"the baseline failed: {cause}", "Free memory and try again")
            before = self._say_leader(None)
            self._gate_wave(index)
            self._say_leader(before)
            self._drop_losers()
            index += 1

    def _start(self, ids: Sequence[str], deadline_sec: float) -> list[str]:
        """Starts a wave one by one, as long as there is time to measure what was started; gives those."""
        started: list[str] = []
        for id in ids:
            blocks_sec = SCREEN_BLOCKS * sum(self._slice_sec(i) for i in [*self._yardsticks(), *started, id])
            if self.journal.elapsed_sec + blocks_sec > deadline_sec:
                break
            self.out.race.start([id])
            started.append(id)
        return started

    def _yardsticks(self) -> list[str]:
        """The baseline, and its twin while the resolution of this machine is not known well."""
        blocks = self.out.race.measured()
        n = len(blocks.paired(BASELINE, TWIN)[0]) if TWIN in blocks.subjects else 0
        return [BASELINE, TWIN] if n < TWIN_BLOCKS and self.has_room_for_twin else [BASELINE]

    def _wave(self, index: int) -> list[spaces.Candidate]:
        """The candidates of a wave: those of the journal, or the next ones that the time is enough for."""
        known = self.journal.find("wave", index=index)
        if known:
            by_id = {c.id: c for c in self.out.space.legal}
            return [by_id[i] for i in known["trials"] if i in by_id]  # a compiler may be gone since
        if self.journal.find("searched", index=index):
            self._propose()  # for what it says of the candidates that are left out
            return []
        wave = self._propose()
        if wave:
            self.journal.record("wave", index=index, trials=[c.id for c in wave])
        else:
            self.journal.record("searched", index=index)
        return wave

    def _propose(self) -> list[spaces.Candidate]:
        slices = sum(self._slice_sec(i) for i in self._yardsticks())
        left = self._left() - SCREEN_BLOCKS * slices
        sec_of = self._start_secs() | {"blocks": SCREEN_BLOCKS * (MIN_SLICE_SEC + OVERHEAD_SEC)}
        return self.proposer.next_wave(left, self._room(), sec_of)

    def _room(self) -> int:
        """How many candidates fit into memory beside those that are kept alive."""
        state = self.out.race.trials[BASELINE]
        assert state.facts is not None
        memory = state.facts.memory
        # A proof holds the model three times: itself, its reference form, the fp32 original. What is shared is there.
        own = memory.rss_peak_bytes - (memory.shared_bytes or 0)
        each = own + 2 * state.facts.weights_bytes
        return max(1, min(WAVE, int(0.8 * hardware.available_memory_bytes() / max(each, 1))))

    def _drop_losers(self) -> None:
        """Ends the processes of trials that cannot win any more; their rows stay."""
        out = self.out
        scores = {i: out.ratio(i) for i in out.rows()}
        leader = out.leader()
        least = max(1.0, scores[leader].low) if leader else 1.0
        ranked = sorted((i for i in scores if i not in out.rejected), key=lambda i: -scores[i].value)
        for id, score in scores.items():
            kept = self.has_room_for_twin and id in ranked[: 2 * N_FINALISTS] and score.high >= least
            if not kept and id != out.scorer:
                out.race.stop(id)

    def _start_secs(self) -> dict[str, float]:
        """Start-up seconds by runner as seen here; a runner not seen yet scales with those that were."""
        declared = {name: runner.start_sec for name, runner in self.out.space.runners.items()}
        known = [(c.runner.name, c.id) for c in self.out.space.legal]
        known += [(c.runner.name, BASELINE) for c in self.out.space.legal if c.is_plain][:1]
        seen: dict[str, list[float]] = {}
        for runner, id in known:
            state = self.out.race.trials.get(id)
            if state and state.start_sec:
                seen.setdefault(runner, []).append(state.start_sec)
        out = {runner: float(np.median(times)) for runner, times in seen.items()}
        scale = max([out[r] / declared[r] for r in out], default=1.0)
        return {r: out.get(r, sec * max(1.0, scale)) for r, sec in declared.items()}

    # -- gate and finals

    def _gate_wave(self, index: int) -> None:
        """Judges the quality of what is ahead of the leader, the fastest first, until one of them keeps it."""
        known = self.journal.find("gate", index=index)
        if known:  # decided by what had been measured then; the scores lie on disk
            for id in known["trials"]:
                if id in self.out.race.trials and not self.out.race.trials[id].failure:
                    self.gate.judge(id)
            return
        judged: list[str] = []
        # What a candidate needs to be turned away is little; a whole judgement is the confirmation's time at most.
        limit = self.goal.budget_sec - 0.5 * self._reserved_sec()
        for id in self._ahead():
            verdict = self.gate.judge(id, lambda: self.journal.elapsed_sec < limit)
            judged.append(id)
            if verdict is not False:
                break
        self.journal.record("gate", index=index, trials=judged)

    def _ahead(self) -> list[str]:
        """Candidates that look better than the leader and were not turned away, the best first."""
        out = self.out
        leader = out.leader()
        least = out.ratio(leader).value if leader else 1.0
        ids = [i for i in out.rows() if i not in out.rejected and i not in out.refused and i != leader]
        ids = [i for i in ids if out.ratio(i).value > least and out.verdict(i) != "slower"]
        return sorted(ids, key=lambda i: -out.ratio(i).value)

    def _say_leader(self, said: str | None) -> str | None:
        """Says what would be taken now, unless it is what was `said` last; gives it."""
        leader = self.out.leader()
        if leader and leader != said:
            ratio, name = self.out.ratio(leader), self.out.race.trials[leader].recipe.name
            self.say(f"best so far: {name}, {ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]")
        return leader

    def _finalists(self, index: int) -> list[str]:
        """The best candidates that keep the quality, at most `N_FINALISTS`."""
        out = self.out
        known = self.journal.find("finalists", index=index)
        if known:  # decided by what had been measured then: a resumed run does not decide anew
            return [i for i in known["trials"] if i in out.race.trials and self.gate.judge(i)]
        passed: list[str] = []
        leader = out.leader()
        least = out.ratio(leader).low if leader else 1.0
        for id in sorted(out.rows(), key=lambda i: -out.ratio(i).value):
            if len(passed) == N_FINALISTS:
                break
            if id in out.rejected or id in out.refused or out.verdict(id) == "slower" or out.ratio(id).high < least:
                continue
            is_known = out.is_accepted(id) or self._left() > 0
            if is_known and self.gate.judge(id, lambda: self._left() > 0):
                passed.append(id)
        self.journal.record("finalists", index=index, trials=passed)
        return passed

    def _finals(self, index: int, finalists: Sequence[str]) -> str | None:
        """Races the finalists until each is decided; returns the winner."""
        race, goal, out = self.out.race, self.goal, self.out
        if not finalists:
            out.too_noisy = not goal.in_bytes and is_noisy(out.resolution) and not self._any_verdict()
            return None
        level = stats.LEVEL
        if not goal.in_bytes:
            done = 0
            deadline = goal.budget_sec - (self._reserved_sec() - self._finals_sec(finalists))
            for i, n in enumerate(FINAL_LOOKS):
                level = stats.look_level(i, len(FINAL_LOOKS))
                self.say(f"finals: {len(race.alive(finalists))} candidates, {n} blocks")
                yardsticks = [BASELINE, TWIN] if self.has_room_for_twin else [BASELINE]
                whole = race.blocks(f"final {index} {i}", [*yardsticks, *finalists], n - done, deadline)
                done = n
                if not whole or all(out.verdict(f, level) != "undecided" for f in race.alive(finalists)):
                    break
        winner = self._choose(race.alive(finalists), level)
        # Without a resolution (too few blocks) it was the budget, not the noise.
        noisy = not goal.in_bytes and is_noisy(out.resolution)
        out.too_noisy = noisy and winner is None and not self._any_verdict()
        return winner

    def _any_verdict(self) -> bool:
        """Whether anything was told apart from the baseline: then the noise did not hide it."""
        return any(self.out.verdict(i) in ("faster", "slower") for i in self.out.rows())

    def _finals_sec(self, finalists: Sequence[str]) -> float:
        return FINAL_LOOKS[0] * (2 * self._slice_sec(BASELINE) + sum(self._slice_sec(f) for f in finalists))

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
        wanted = out.goal.min_speedup or 0.0  # a simpler recipe that misses it is not the equal of one that reaches it
        if out.ratio(best).value >= wanted:
            equal = [i for i in equal if out.ratio(i).value >= wanted]
        simplest = min(equal, key=lambda i: (out.race.trials[i].recipe.complexity, -out.ratio(i).value))
        if simplest != best:
            names = (out.race.trials[simplest].recipe.name, out.race.trials[best].recipe.name)
            out.notes.append(f"{names[0]} and {names[1]} cannot be told apart: the simpler one was taken.")
        return simplest


def _check_memory(config: ModelConfig, goal: Goal) -> bool:
    """Whether the baseline, its twin and a candidate fit into memory side by side.

    Raises:
        ParetuneError: not even the baseline and a candidate do.
    """
    if goal.device != "cpu":
        return True  # what a GPU holds is its own affair: a trial that does not fit is a row with its cause
    shared, own = shared_and_own_bytes(())  # a candidate that compiles takes for itself what the others share
    each = trial_bytes(config, n_parameters(config), Cell(goal.input_len, goal.output_len, goal.batch_size), own)
    free = hardware.available_memory_bytes()
    if shared + 2 * each > free:
        raise ParetuneError(
            f"the baseline and a candidate have to fit side by side, in fp32 {(shared + 2 * each) / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free",
            "Free memory, or use a machine with more",
        )
    return shared + 3 * each <= free


def _surely_better(blocks: Blocks, best: str, other: str) -> bool:
    if len(blocks.paired(other, best)[0]) < stats.MIN_BLOCKS:
        return True
    return blocks.ratio(other, best).low > 1.0
