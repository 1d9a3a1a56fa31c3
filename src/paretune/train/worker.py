"""The process of one training cost: a model under a mechanism, and one update at a time.

Its peak memory can be read off the system because nothing else ran in it: batch sizes come in ascending order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paretune.measure.worker import serve


class Training:
    """What the worker holds between requests."""

    def __init__(self) -> None:
        self.model: Any = None
        self.optimizer: Any = None
        self.dtype, self.device = "fp32", "cpu"

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch

        from paretune import hardware
        from paretune.engine.load import load_recipe
        from paretune.measure import memory
        from paretune.recipe import Recipe
        from paretune.train.schedule import check_trainable, parameter_groups

        threads = hardware.set_threads(request.get("threads"))
        self.device, self.dtype = request["device"], request["dtype"]
        recipe = Recipe.from_dict(request["recipe"])
        self.model = load_recipe(Path(request["folder"]), recipe, self.device, check=False).runner.model
        check_trainable(self.model)
        self.model.float().train().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=1e-6, fused=True)
        return {"threads": threads, "rss_bytes": memory.rss_bytes()}

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        """One update on `batch_size` windows of random tokens, `micro` at a time. Seconds and the peak so far."""
        import torch

        from paretune import clock
        from paretune.measure import memory
        from paretune.train.objective import summed_loss

        batch_size, micro, length = request["batch_size"], request["micro"], request["length"]
        shape = (batch_size, length + 1)
        generator = torch.Generator().manual_seed(request.get("seed", 0))
        tokens = torch.randint(0, self.model.config.vocab_size, shape, generator=generator).to(self.device)
        kind = torch.device(self.device).type
        if kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with clock.quiet():
            clock.synchronize(kind)
            began = clock.now()
            self.optimizer.zero_grad(set_to_none=True)
            for start in range(0, batch_size, micro):
                part = tokens[start : start + micro]
                loss = summed_loss(self.model, part[:, :-1], part[:, 1:], self.dtype, None)
                (loss / (batch_size * length)).backward()
            self.optimizer.step()
            clock.synchronize(kind)
            sec = clock.now() - began
        device = memory.device_memory(self.device)
        return {"sec": sec, "peak_bytes": device.get("device_allocated_bytes") or memory.peak_rss_bytes()}


def preload() -> None:
    import paretune.train.objective
    import paretune.train.schedule  # noqa: F401
    from paretune.measure import worker

    worker.preload()


def main() -> None:
    training = Training()
    serve({"load": training.load, "step": training.step})


if __name__ == "__main__":
    main()
