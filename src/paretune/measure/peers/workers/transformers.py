"""transformers: its model with its own DynamicCache, greedy, the last position's logits only, as its `generate` does.

Without the overhead of `generate` itself, which would flatter us.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .protocol import Engine, PeerTrial, serve

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Transformers(Engine):
    def __init__(self, request: dict[str, Any]) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        self.torch, self.library = torch, transformers
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(request["threads"])
        self._no_grad = torch.inference_mode()
        self._no_grad.__enter__()  # for all that this process does
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            request["folder"], dtype=getattr(torch, _DTYPES[request["format"]]), attn_implementation="sdpa"
        ).eval()
        self.cache: Any = None
        self.n_prompt = 0
        self._prompts: tuple[Any, Any] = (None, None)

    def prefill(self, prompts: list[list[int]]) -> Any:
        if self._prompts[0] is not prompts:  # made once: the conversion is not the model's work
            self._prompts = (prompts, self.torch.tensor(prompts))
        self.cache = self.library.DynamicCache(config=self.model.config)
        self.n_prompt = len(prompts[0])
        return self.step(self._prompts[1])

    def step(self, chosen: Any) -> Any:
        out = self.model(chosen, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1)[:, None]

    def rewind(self) -> None:
        # A view, no copy. Negative: how many go.
        self.cache.crop(self.n_prompt - self.cache.get_seq_length())

    def logits(self, tokens: list[int]) -> np.ndarray:
        return self.model(self.torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def open_engine(request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    engine = Transformers(request)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in engine.model.parameters()})
    version = engine.library.__version__
    return engine, {
        "version": version,
        "weights_bytes": sum({p.data_ptr(): p.nbytes for p in engine.model.parameters()}.values()),
        "threads": {"threads": engine.torch.get_num_threads()},
        "proof": [f"transformers {version}, {', '.join(dtypes)}, sdpa attention, DynamicCache"],
    }


def main() -> None:
    serve(PeerTrial(open_engine).handlers())
