"""A peer's worker for tests: our own model behind the peers' protocol, well or badly behaved by its format.

Started as a script: `python fake_peer.py`. `good` computes what we do; the others fail in one way each.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from paretune.measure.peers.workers.protocol import Engine, PeerTrial, Refused, serve
from paretune.model import checkpoint


class FakeEngine(Engine):
    def __init__(self, request):
        torch.set_num_threads(request["threads"])
        self.model = checkpoint.load(Path(request["folder"]), torch.float32)
        self.format = request["format"]
        self.n_prompt = 0

    @torch.inference_mode()
    def _logits(self, rows):
        out = self.model(torch.tensor(rows))
        return out.roll(1, -1) if self.format == "wrong" else out

    def prefill(self, prompts):
        self.rows, self.n_prompt = [list(p) for p in prompts], len(prompts[0])
        return self._logits(self.rows)[:, -1].argmax(-1).tolist()

    def step(self, chosen):
        self.rows = [[*row, token] for row, token in zip(self.rows, chosen, strict=True)]
        chosen = self._logits(self.rows)[:, -1].argmax(-1).tolist()
        return [(t + i) % 7 for i, t in enumerate(chosen)] if self.format == "mixed_rows" else chosen

    def rewind(self):
        self.rows = [row[: self.n_prompt] for row in self.rows]

    def logits(self, tokens):
        return self._logits([tokens])[0].numpy()


def convert(request):
    if request["format"] == "unconvertible":
        raise Refused("it has no such matrix")
    (Path(request["out"]) / "weights").write_bytes(np.zeros(100, np.uint8).tobytes())
    return {}


def open_engine(request):
    assert (Path(request["converted"]) / "weights").is_file()
    match request["format"]:
        case "dies":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        case "hangs":
            time.sleep(600)
    return FakeEngine(request), {"version": "1.2.3", "weights_bytes": 100, "threads": {"threads": request["threads"]}}


if __name__ == "__main__":
    serve(PeerTrial(open_engine, convert).handlers())
