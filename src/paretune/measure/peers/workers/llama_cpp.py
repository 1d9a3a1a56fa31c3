"""llama.cpp through the C interface of llama-cpp-python: a batch is B sequences of one `llama_batch`.

The GGUF file is written from the weights with the `gguf` package, without a vocabulary (tokens are numbers here), and
quantised by llama.cpp itself.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Engine, PeerTrial, Refused, serve
from .weights import Checkpoint, Linear, open_checkpoint

FILE = "model.gguf"
_FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "BF16": 32}
_BLOCKS = {"Q8_0": {"Q8_0"}, "Q4_0": {"Q4_0"}, "Q4_K_M": {"Q4_K", "Q6_K"}, "BF16": {"BF16"}, "F32": {"F32"}}
CONTEXT_STEP = 256  # llama.cpp pads the cache to it


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Writes `model.gguf` into `out`: from the weights for F32, else from the F32 file in the folder `base`."""
    out = Path(request["out"]) / FILE
    if request["format"] == "F32":
        _write(open_checkpoint(request), out)
        return {}
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = _FILE_TYPES[request["format"]]
    parameters.nthread = request["threads"]
    source = Path(request["base"]) / FILE
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    if code != 0 or not out.is_file():
        raise Refused(f"llama.cpp could not quantise to {request['format']} (code {code})")
    sizes = _bytes_by_type(out)
    if not _BLOCKS[request["format"]] & sizes.keys():
        raise Refused(
            f"no matrix of this model fits the blocks of {request['format']}: llama.cpp made {', '.join(sorted(sizes))}"
        )
    return {}


def _bytes_by_type(path: Path) -> dict[str, int]:
    import gguf

    sizes: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        sizes[name] = sizes.get(name, 0) + int(tensor.n_bytes)
    return sizes


def _write(checkpoint: Checkpoint, out: Path) -> None:
    import gguf

    c, form = checkpoint.config, checkpoint.gguf
    theirs = f"llama.cpp's {form['title']}"
    if c["activation"] != form["activation"]:
        raise Refused(f"{theirs} has no activation {c['activation']}")
    if not c["scale_attn_weights"] or c["scale_attn_by_inverse_layer_idx"]:
        raise Refused(f"{theirs} divides the scores by sqrt(head size) in every layer, this model does not")
    writer = gguf.GGUFWriter(out, form["architecture"])
    writer.add_file_type(_FILE_TYPES["F32"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["n_positions"])
    writer.add_embedding_length(c["n_embd"])
    writer.add_feed_forward_length(c["n_inner"])
    writer.add_block_count(c["n_layer"])
    writer.add_head_count(c["n_head"])
    writer.add_head_count_kv(c["n_kv_head"])

    def add(name: str, values: Linear) -> None:
        writer.add_tensor(f"{name}.weight", values[0])
        if values[1] is not None:
            writer.add_tensor(f"{name}.bias", values[1])

    add("token_embd", (checkpoint.embedding, None))
    add("output_norm", checkpoint.norm)
    head = checkpoint.head
    if head is not None:
        add("output", (head, None))
    if checkpoint.has_rms_norm:
        writer.add_layer_norm_rms_eps(c["norm_eps"])
    else:
        writer.add_layer_norm_eps(c["norm_eps"])
    if checkpoint.has_learned_positions:
        add("position_embd", (checkpoint.positions, None))
    if checkpoint.is_rotary:
        writer.add_rope_dimension_count(c["head_dim"])
        writer.add_key_length(c["head_dim"])
        writer.add_value_length(c["head_dim"])
        writer.add_rope_freq_base(c["rope_theta"])
        scaling = c["rope_scaling"]
        if scaling and scaling["kind"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling["factor"])
        elif scaling:
            writer.add_tensor("rope_freqs.weight", checkpoint.rope_factors())
    for i in range(c["n_layer"]):
        layer = checkpoint.layer(i)
        block = f"blk.{i}."
        add(f"{block}attn_norm", layer.norm_1)
        add(f"{block}ffn_norm", layer.norm_2)
        if checkpoint.has_fused_qkv:
            add(f"{block}attn_qkv", layer.qkv)
        else:
            is_swapped = {role: role in form["interleaved"] for role in ("q", "k")}
            add(f"{block}attn_q", _interleaved(layer.q, c["n_head"]) if is_swapped["q"] else layer.q)
            add(f"{block}attn_k", _interleaved(layer.k, c["n_kv_head"]) if is_swapped["k"] else layer.k)
            add(f"{block}attn_v", layer.v)
        if layer.gate is not None:
            add(f"{block}ffn_gate", layer.gate)
        add(f"{block}attn_output", layer.o)
        add(f"{block}ffn_up", layer.up)
        add(f"{block}ffn_down", layer.down)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(values: Linear, n_head: int) -> Linear:
    """llama.cpp rotates dimension 2i with 2i + 1, Hugging Face's i with i + D/2."""

    def swap(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(n_head, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))

    return swap(values[0]), None if values[1] is None else swap(values[1])


class LlamaCpp(Engine):
    def __init__(self, request: dict[str, Any]) -> None:
        import llama_cpp

        self.library = llama_cpp
        self.path = Path(request["converted"]) / FILE
        self.n_rows, self.n_vocab = request["workload"]["batch_size"], request["config"]["vocab_size"]
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(self.path).encode(), model_parameters)
        if not self.model:
            raise Refused("llama.cpp cannot load the converted file")
        parameters = llama_cpp.llama_context_default_params()
        capacity = -(-request["capacity"] // CONTEXT_STEP) * CONTEXT_STEP
        self.n_batch = max(self.n_rows * request["workload"]["input_len"], request["capacity"])
        parameters.n_ctx = capacity * self.n_rows
        parameters.n_batch = self.n_batch
        parameters.n_seq_max = self.n_rows
        parameters.n_threads = parameters.n_threads_batch = request["threads"]
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise Refused("llama.cpp cannot make a context for this model")
        self.memory = llama_cpp.llama_get_memory(self.context)
        # Their size is fixed: one for prompts, one for steps.
        self.prompt_batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)
        self.step_batch = llama_cpp.llama_batch_init(self.n_rows, 0, 1)
        self.position = self.n_prompt = 0

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        self.library.llama_memory_clear(self.memory, False)
        batch, n = self.prompt_batch, 0
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(batch, n, token, position, row, position + 1 == len(prompt))
                n += 1
        batch.n_tokens = n
        self._decode(batch)
        length = len(prompts[0])
        self.position = self.n_prompt = length
        return [self._argmax((row + 1) * length - 1) for row in range(len(prompts))]

    def step(self, chosen: list[int]) -> list[int]:
        batch = self.step_batch
        for row, token in enumerate(chosen):
            self._put(batch, row, token, self.position, row, True)
        batch.n_tokens = len(chosen)
        self._decode(batch)
        self.position += 1
        return [self._argmax(row) for row in range(len(chosen))]

    def rewind(self) -> None:
        for row in range(self.n_rows):
            self.library.llama_memory_seq_rm(self.memory, row, self.n_prompt, -1)
        self.position = self.n_prompt

    def logits(self, tokens: list[int]) -> np.ndarray:
        self.library.llama_memory_clear(self.memory, False)
        for position, token in enumerate(tokens):
            self._put(self.prompt_batch, position, token, position, 0, True)
        self.prompt_batch.n_tokens = len(tokens)
        self._decode(self.prompt_batch)
        return np.stack([self._row(i).copy() for i in range(len(tokens))])

    def _put(self, batch: Any, i: int, token: int, position: int, row: int, wants_logits: bool) -> None:
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, row

    def _decode(self, batch: Any) -> None:
        code = self.library.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")

    def _row(self, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.library.llama_get_logits_ith(self.context, i), shape=(self.n_vocab,))

    def _argmax(self, i: int) -> int:
        return int(self._row(i).argmax())


def open_engine(request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    engine = LlamaCpp(request)
    sizes = _bytes_by_type(engine.path)
    shown = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(sizes.items(), key=lambda s: -s[1]))
    version = engine.library.__version__
    used = engine.library.llama_n_threads(engine.context)
    assert used == request["threads"], f"asked llama.cpp for {request['threads']} threads and got {used}"
    return engine, {
        "version": version,
        "weights_bytes": int(engine.library.llama_model_size(engine.model)),
        "threads": {"threads": used},
        "proof": [f"llama-cpp-python {version}, flash attention, fp16 cache; stored: {shown}"],
    }


def main() -> None:
    serve(PeerTrial(open_engine, convert).handlers())
