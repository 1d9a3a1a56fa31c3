"""The process of one trial: loads a model under a recipe, proves it, and gives samples on request.

Speaks JSON lines: a request `{"do": NAME, ...}` on standard input, one answer a request on standard output. Everything
that libraries print goes to standard error. Started with `python -m paretune.measure.worker`; a higher floor adds verbs
by calling `serve` with more of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paretune import process
from paretune.process import Handler


class Trial:
    """What a worker holds between requests."""

    def __init__(self) -> None:
        self.loaded: Any = None
        self.bench: Any = None
        self.weights_bytes = 0
        self.rss_before = 0
        self.facts: dict[str, Any] = {}  # the answer to `load`

    def ready(self, request: dict[str, Any]) -> dict[str, Any]:
        """Imports what loading needs: many processes do this side by side, before any of them uses its threads."""
        import paretune.engine.load
        import paretune.measure.workload  # noqa: F401

        return {}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Loads, proves the effect, checks exactness; the answer is what the report says about the trial."""
        from paretune import clock, hardware
        from paretune.engine.load import check_exact, load_recipe, prove
        from paretune.measure import memory
        from paretune.measure.profile_facts import bytes_per_weight
        from paretune.measure.workload import Bench, Workload, step_weights_bytes
        from paretune.recipe import Recipe

        recipe = Recipe.from_dict(request["recipe"])
        threads = hardware.set_threads(recipe.engine.threads or request.get("threads"))
        device = request.get("device", "cpu")
        self.rss_before = process.rss_bytes()
        self.loaded = load_recipe(Path(request["folder"]), recipe, device, check=not request.get("is_checked"))
        runner = self.loaded.runner
        self.weights_bytes = memory.storage_bytes(runner.model)["total"]
        workload = Workload(**request["workload"])
        self.bench = Bench(runner, workload)
        # One shape of cache and batch for all that follows: what compiles, compiles once.
        shape = (workload.batch_size, self.bench.cache.capacity)
        before = clock.now()
        proof, observation = prove(self.loaded, *shape)
        first_sec = clock.now() - before
        exact = []
        if request.get("check_prompt") and (recipe.engine.runner != "eager" or any(t.exact for t in recipe.transforms)):
            exact = check_exact(self.loaded, request["check_prompt"], shape=shape)
        before = clock.now()
        self.bench.sample("ttft")
        self.bench.sample("tpot")
        compile_sec = first_sec + clock.now() - before if observation.compiled else 0.0
        self.facts = {
            "load_sec": self.loaded.load_sec,
            "compile_sec": compile_sec,
            "proof": proof + exact,
            "notes": [] if request.get("is_checked") else recipe.notes(device),
            "runner": observation.runner,
            "bytes_by_dtype": observation.bytes_by_dtype,
            "weights_bytes": self.weights_bytes,
            "step_weights_bytes": step_weights_bytes(runner.model),
            "bytes_per_weight": bytes_per_weight(runner.model),
            "compute_dtype": str(runner.dtype).removeprefix("torch."),
            "threads": threads,
        }
        return self.facts | self._of_shape()

    def _of_shape(self) -> dict[str, Any]:
        cache = self.bench.cache
        # A ring has fewer slots than its capacity says.
        per_token = {"kv_cache_bytes": cache.nbytes, "kv_bytes_per_token": cache.nbytes / cache.n_slots}
        return {**per_token, "attention_pattern": str(self.loaded.runner.config.attention_pattern)}

    def shape(self, request: dict[str, Any]) -> dict[str, Any]:
        """Another workload for the model that is loaded and proven; the answer as that of `load`."""
        from paretune.measure.workload import Bench, Workload

        self.bench = None  # its cache is free before the next one is made
        self.bench = Bench(self.loaded.runner, Workload(**request["workload"]))
        self.bench.sample("ttft")
        return self.facts | self._of_shape()

    def warm(self, request: dict[str, Any]) -> dict[str, Any]:
        """Samples until there is no trend."""
        from paretune import stats
        from paretune.measure.interleave import warm_up

        bench, kind = self.bench, request["kind"]

        class Alone:
            name = "self"

            def sample(self) -> float:
                return bench.sample(kind)

            def pause(self) -> None: ...

            def resume(self) -> None: ...

        timings = warm_up(Alone(), max_sec=request.get("max_sec", 10.0))
        return {"timings_sec": timings, "settled": not stats.has_trend(timings)}

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"sec": self.bench.sample(request["kind"])}

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        """Bytes in parts; activations are the peak of one whole request above the resting size."""
        from paretune.measure import memory

        process.give_back_free_memory()  # what earlier requests freed would make activations seem to take nothing
        is_reset = process.reset_peak_rss()
        resting = process.rss_bytes()
        self.bench.sample("throughput")
        peak = process.peak_rss_bytes()
        parts = memory.MemoryParts.take(
            weights_bytes=self.weights_bytes,
            kv_cache_bytes=self.bench.cache.nbytes,
            # Without the reset the peak is the one of loading: then nothing is known of the activations.
            activation_peak_bytes=max(0, peak - resting) + self.loaded.runner.buffer_bytes if is_reset else None,
            device=str(self.loaded.runner.device),
        )
        return parts.to_json()

    def handlers(self) -> dict[str, Handler]:
        own = (self.ready, self.load, self.shape, self.warm, self.sample, self.memory)
        return {handler.__name__: handler for handler in own}


def serve(handlers: dict[str, Handler]) -> None:
    """Answers requests until standard input closes."""
    from paretune.errors import ParetuneError

    process.serve(handlers, (ParetuneError,))


if __name__ == "__main__":
    serve(Trial().handlers())
