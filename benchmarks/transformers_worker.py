"""A trial process that runs eager `transformers`, behind the same protocol as our own worker.

Started by `against_transformers.py` as a module (this folder is on PYTHONPATH then). The loop is transformers' model
with its own DynamicCache, greedy, of fixed length, and asks for the last position's logits only, as its `generate`
does: without the overhead of `generate` itself, which would flatter us.
"""

from __future__ import annotations

from typing import Any

from paretune.measure.worker import serve


class HfTrial:
    """What the worker holds between requests."""

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch
        import transformers

        from paretune import clock, hardware
        from paretune.measure import memory
        from paretune.measure.workload import Workload

        transformers.logging.set_verbosity_error()
        threads = hardware.set_threads(request.get("threads"))
        self.workload = Workload(**request["workload"])
        started = clock.now()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            request["folder"], dtype=getattr(torch, request["dtype"]), attn_implementation="sdpa"
        ).eval()
        load_sec = clock.now() - started
        generator = torch.Generator().manual_seed(self.workload.seed)
        shape = (self.workload.batch_size, self.workload.input_len)
        self.prompts = torch.randint(0, self.model.config.vocab_size, shape, generator=generator)
        self.cache: Any = None
        self.first: Any = None
        self.sample({"kind": "ttft"})
        self.sample({"kind": "tpot"})
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters()})
        return {
            "load_sec": load_sec,
            "compile_sec": 0.0,
            "weights_bytes": memory.storage_bytes(self.model)["total"],
            "proof": [f"transformers {transformers.__version__}, {', '.join(dtypes)}, sdpa attention, DynamicCache"],
            "notes": [],
            "threads": threads,
        }

    def sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds per unit over one slice: the same rules and positions as `measure.workload.Bench`."""
        import torch

        from paretune import clock
        from paretune.measure.workload import DECODE_SLICE, MIN_SLICE_SEC

        n_decode = max(1, min(DECODE_SLICE, self.workload.output_len - 1))
        kind = request["kind"]
        run, n_units = {"ttft": (self._prefill, 1), "tpot": (lambda: self._decode(n_decode), n_decode)}[kind]
        with torch.inference_mode():
            if kind == "tpot" and self.first is None:
                self._prefill()
            n = 0
            with clock.quiet():
                started = clock.now()
                while True:
                    run()
                    n += 1
                    elapsed = clock.now() - started
                    if elapsed >= MIN_SLICE_SEC:
                        return {"sec": elapsed / (n * n_units)}

    def _step(self, tokens: Any) -> Any:
        out = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)[:, None]

    def _prefill(self) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.first = self._step(self.prompts)

    def _decode(self, n: int) -> None:
        # Back to the prompt. A view, no copy: microseconds, as our own cache's roll-back is. Negative: how many go.
        self.cache.crop(self.workload.input_len - self.cache.get_seq_length())
        step = self.first
        for _ in range(n):
            step = self._step(step)

    def memory(self, request: dict[str, Any]) -> dict[str, Any]:
        from paretune import process

        return {"rss_bytes": process.rss_bytes(), "rss_peak_bytes": process.peak_rss_bytes()}

    def handlers(self) -> dict[str, Any]:
        return {"load": self.load, "sample": self.sample, "memory": self.memory}


def main() -> None:
    serve(HfTrial().handlers())


if __name__ == "__main__":
    main()
