"""The process of one trial: loads a model under a recipe, proves it, and gives samples on request.

Speaks JSON lines: a request `{"do": NAME, ...}` on standard input, one answer a request on standard output. Everything
that libraries print goes to standard error. Started with `python -m paretune.measure.worker`; a higher layer adds verbs
by calling `serve` with more of them.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune import clock, process
from paretune.process import Handler

WARM_UP_SEC = 10.0  # at most
# Slices as long as these settle within fewer: they average over as many steps, and what settles does so in seconds.
SLOW_SLICE_SEC, SLOW_WINDOW = 0.1, 4
RANDOM_TEXT = "speculation: prompts are random here, so what is accepted is not what text would have accepted"


class Trial:
    """What a worker holds between requests."""

    def __init__(self) -> None:
        self.loaded: Any = None
        self.bench: Any = None
        self.speculator: Any = None
        self.weights_bytes = 0
        self.prompt_sec = 0.0  # of the prompt that has just been run, where one has
        self.facts: dict[str, Any] = {}  # the answer to `load`
        self.parts_sec: dict[str, float] = {}  # of the start

    def ready(self, request: dict[str, Any]) -> dict[str, Any]:
        """Imports what loading needs: newly executed processes do this side by side, before any of them uses its
        threads. One that was forked has it all."""
        preload()
        return {}

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        """Everything before the first timed sample: loads, proves, checks, measures memory, warms up.

        Args (beside those of `load`):
            kinds: what is warmed up, each until it shows no trend.
            warm_sec: for each at most.
            side: kinds of which a short figure is given; it is shown but never compared.

        The answer is that of `load`, with `memory`, `warm` and `side_sec` by kind, and `start_parts_sec`: the seconds
        of each part. Of these `convert`, `calibrate` and `compile` are done once for a plan, and not at every start.
        """
        answer = self.load(request)
        with self._part("memory"):
            parts = self.memory({})
        with self._part("warm"):
            warm = self._warm_all(request)
            side = {kind: self._side(kind, warm) for kind in request.get("side", ())}
        return answer | {"memory": parts, "warm": warm, "side_sec": side, "start_parts_sec": dict(self.parts_sec)}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Loads, proves the effect, checks exactness; the answer is what the report says about the trial."""
        from paretune import hardware
        from paretune.engine.exact import check_exact
        from paretune.engine.load import load_recipe, prove
        from paretune.engine.speculation import for_recipe
        from paretune.measure import memory
        from paretune.measure.profile_facts import bytes_per_weight
        from paretune.measure.workload import Bench, Workload, step_weights_bytes
        from paretune.recipe import Recipe

        recipe = Recipe.from_dict(request["recipe"])
        threads = hardware.set_threads(recipe.engine.threads or request.get("threads"))
        device = request.get("device", "cpu")
        self.parts_sec = {}
        self.loaded = load_recipe(Path(request["folder"]), recipe, device, check=not request.get("is_checked"))
        # The collector runs before each slice: what stays is not gone through again each time.
        gc.collect()
        gc.freeze()
        runner, once = self.loaded.runner, self.loaded.convert_sec + self.loaded.calibrate_sec
        self.parts_sec |= {"load": self.loaded.load_sec - once, "convert": self.loaded.convert_sec}
        self.parts_sec["calibrate"] = self.loaded.calibrate_sec
        self.weights_bytes = memory.storage_bytes(runner.model)["total"]
        workload = Workload(**request["workload"])
        self.speculator = for_recipe(recipe, runner, self.loaded.folder)
        self.bench = Bench(runner, workload, speculator=self.speculator)
        # One shape of cache and batch for all that follows: what compiles, compiles once.
        shape = (workload.batch_size, self.bench.cache.capacity)
        with self._part("prove"):
            proof, observation = prove(self.loaded, *shape)
        compile_sec = 0.0
        if observation.compiled:
            with self._part("compile"):
                self.bench.short_sample("ttft")
                self.bench.short_sample("tpot")
            compile_sec = self.parts_sec["compile"] = self.parts_sec.pop("prove") + self.parts_sec["compile"]
        exact = []
        if request.get("check_prompt") and (not runner.is_reference or any(t.exact for t in recipe.transforms)):
            store = Path(request["references"]) if request.get("references") else None
            with self._part("exact"):
                exact = check_exact(self.loaded, request["check_prompt"], shape=shape, store=store)
        self.facts = {
            "load_sec": self.loaded.load_sec,
            "compile_sec": compile_sec,
            "proof": proof + exact,
            "notes": [
                *self.loaded.notes,
                *([] if request.get("is_checked") else recipe.notes(device)),
                *([] if self.speculator is None else [RANDOM_TEXT]),
            ],
            "runner": observation.runner,
            "bytes_by_dtype": observation.bytes_by_dtype,
            "weights_bytes": self.weights_bytes,
            "step_weights_bytes": step_weights_bytes(runner.model),
            "bytes_per_weight": bytes_per_weight(runner.model),
            "compute_dtype": str(runner.dtype).removeprefix("torch."),
            "threads": threads,
        }
        return self.facts | self._of_shape()

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        before = clock.now()
        yield
        self.parts_sec[name] = clock.now() - before

    def _of_shape(self) -> dict[str, Any]:
        cache = self.bench.cache
        # A ring has fewer slots than its capacity says.
        per_token = {"kv_cache_bytes": cache.nbytes, "kv_bytes_per_token": cache.nbytes / cache.n_slots}
        return {**per_token, "attention_pattern": str(self.loaded.runner.config.attention_pattern)}

    def shape(self, request: dict[str, Any]) -> dict[str, Any]:
        """Another workload for the model that is loaded and proven, with `kinds` and `warm_sec` as for `start`; the
        answer is that of `load`, with `warm` by kind."""
        from paretune.measure.workload import Bench, Workload

        self.bench = None  # its cache is free before the next one is made
        self.bench = Bench(self.loaded.runner, Workload(**request["workload"]), speculator=self.speculator)
        return self.facts | self._of_shape() | {"warm": self._warm_all(request)}

    def _warm_all(self, request: dict[str, Any]) -> dict[str, Any]:
        max_sec = request.get("warm_sec", WARM_UP_SEC)
        return {kind: self.warm({"kind": kind, "max_sec": max_sec}) for kind in request.get("kinds", ())}

    def warm(self, request: dict[str, Any]) -> dict[str, Any]:
        """Short slices until there is no trend."""
        from paretune import stats
        from paretune.measure.interleave import warm_up

        bench, kind = self.bench, request["kind"]

        class Alone:
            name = "self"

            def sample(self) -> float:
                return bench.short_sample(kind)

            def pause(self) -> None: ...

            def resume(self) -> None: ...

        # The first slice says how long they are, and is the coldest: it is not one of those that are looked at. A long
        # prompt that was run for its memory was such a slice.
        first_sec, self.prompt_sec = self.prompt_sec, 0.0
        if kind != "ttft" or first_sec <= SLOW_SLICE_SEC:
            before = clock.now()
            bench.short_sample(kind)
            first_sec = clock.now() - before
        k = SLOW_WINDOW if first_sec > SLOW_SLICE_SEC else stats.TREND_WINDOW
        timings = warm_up(Alone(), k=k, min_n=k, max_sec=request.get("max_sec", WARM_UP_SEC))
        return {"timings_sec": timings, "settled": not stats.has_trend(timings, k)}

    def _side(self, kind: str, warm: dict[str, Any]) -> float:
        if kind in warm:
            return statistics.median(warm[kind]["timings_sec"][-SLOW_WINDOW:])
        return self.bench.short_sample(kind)

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"sec": self.bench.sample(request["kind"], request.get("min_sec"))}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Bytes in parts; activations are the peak of a request above the resting size."""
        from paretune.measure import memory
        from paretune.records.record import to_json

        process.give_back_free_memory()  # what earlier requests freed would make activations seem to take nothing
        is_reset = process.reset_peak_rss()
        resting = process.rss_bytes()
        self.prompt_sec = self.bench.request_peak()
        peak = process.peak_rss_bytes()
        parts = memory.take(
            weights_bytes=self.weights_bytes,
            kv_cache_bytes=self.bench.cache.nbytes,
            # Without the reset the peak is the one of loading: then nothing is known of the activations.
            activation_peak_bytes=max(0, peak - resting) + self.loaded.runner.buffer_bytes if is_reset else None,
            device=str(self.loaded.runner.device),
        )
        return to_json(parts)

    def handlers(self) -> dict[str, Handler]:
        own = (self.ready, self.start, self.load, self.shape, self.warm, self.sample, self.memory)
        return {handler.__name__: handler for handler in own}


def serve(handlers: dict[str, Handler]) -> None:
    """Answers requests until standard input closes."""
    from paretune.errors import ParetuneError

    process.serve(handlers, (ParetuneError,))


def preload() -> None:
    """Imports what a trial needs. It starts no threads (the fork server makes sure of it).

    PyTorch's compiler is not among it: that is as much again, and the trials that compile can wait for it.
    """
    import paretune.engine.exact
    import paretune.engine.load
    import paretune.measure.interleave
    import paretune.measure.profile_facts
    import paretune.measure.workload  # noqa: F401
    from paretune.registry import ATTENTION, FAMILIES, FORMATS, RUNNERS, TRANSFORMS

    for registry in (TRANSFORMS, RUNNERS, FORMATS, FAMILIES, ATTENTION):
        for _ in registry.working():  # imports each
            pass


def main() -> None:
    serve(Trial().handlers())


if __name__ == "__main__":
    main()
