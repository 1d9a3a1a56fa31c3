"""OpenVINO: a stateful graph built here in the form that its CPU plugin fuses (cache, attention, packed weights).

`fp32` and `bf16` run from the same file; `int8` holds a scale a row, `int4` a scale for each group of 64 and 8 bits in
the embedding and the head, as its own tools do. The plugin computes those two in what it takes to be best here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Engine, PeerTrial, Refused, folder_bytes, serve
from .weights import Checkpoint, Linear, open_checkpoint

FILE = "model.xml"
GROUP = 64
_FAR = 2**31 - 1  # the end of a slice that has none
_ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")


def convert(request: dict[str, Any]) -> dict[str, Any]:
    import openvino

    graph = Graph(open_checkpoint(request), request["format"])  # alive until it is written: it holds the packed bytes
    openvino.save_model(graph.build(), Path(request["out"]) / FILE, compress_to_fp16=False)
    return {}


class Graph:
    """The model with its cache as state: tokens `[B, T]` in, logits from `start` on out.

    Args:
        format: fp32, int8 or int4.
    """

    def __init__(self, checkpoint: Checkpoint, format: str) -> None:
        import openvino
        from openvino import opset13

        self.ov, self.op, self.checkpoint, self.format = openvino, opset13, checkpoint, format
        self.c = checkpoint.config
        if self.c["activation"] not in _ACTIVATIONS:
            raise Refused(f"activation {self.c['activation']} is not in this graph")
        if self.c["scale_attn_by_inverse_layer_idx"] or not self.c["scale_attn_weights"]:
            raise Refused("attention scaled by layer is not in this graph")
        self.tokens = self.input([-1, -1], np.int64, "tokens")
        self.positions = self.input([-1], np.int64, "positions")
        self.mask = self.input([1, 1, -1, -1], np.float32, "mask")
        self.rows = self.input([-1], np.int32, "rows")  # which row goes on from which: the plugin looks for it
        self.start = self.input([1], np.int64, "start")
        self.assigned: list[Any] = []
        self.packed: list[np.ndarray] = []

    def build(self) -> Any:
        op, c, checkpoint = self.op, self.c, self.checkpoint
        table = self.weight(checkpoint.embedding, is_large=True)
        x = op.gather(table, self.tokens, self.ints(0))
        if checkpoint.has_learned_positions:
            x = op.add(x, op.gather(op.constant(checkpoint.positions), self.positions, self.ints(0)))
        if checkpoint.is_rotary:
            angles = np.arange(c["n_positions"])[:, None] * checkpoint.rope_frequencies()[None].astype(np.float64)
            angles = np.concatenate([angles, angles], -1)
            tables = [op.constant(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
            self.rope = [op.gather(table, self.positions, self.ints(0)) for table in tables]  # [T, D]
        for i in range(c["n_layer"]):
            layer = checkpoint.layer(i)
            h = self.norm(x, layer.norm_1)
            x = op.add(x, self.linear(self.attention(i, h, layer), layer.o))
            h = self.norm(x, layer.norm_2)
            if layer.gate is None:
                h = self.activation(self.linear(h, layer.up))
            else:
                h = op.multiply(self.activation(self.linear(h, layer.gate)), self.linear(h, layer.up))
            x = op.add(x, self.linear(h, layer.down))
        x = op.slice(x, self.start, self.ints([_FAR]), self.ints([1]), self.ints([1]))
        x = self.norm(x, checkpoint.norm)
        head = checkpoint.head
        shared = table if head is None else self.weight(head, is_large=True)
        logits = op.matmul(x, shared, transpose_a=False, transpose_b=True)
        inputs = [self.tokens, self.positions, self.mask, self.rows, self.start]
        return self.ov.Model([op.result(logits)], self.assigned, inputs, "model")

    def attention(self, i: int, h: Any, layer: Any) -> Any:
        op, c = self.op, self.c
        H, Hkv, D = c["n_head"], c["n_kv_head"], c["head_dim"]
        q = self.heads(self.linear(h, layer.q), H)
        k = self.heads(self.linear(h, layer.k), Hkv)
        v = self.heads(self.linear(h, layer.v), Hkv)
        if self.checkpoint.is_rotary:
            q, k = self.rotate(q), self.rotate(k)
        k, v = self.remember(f"key_{i}", k), self.remember(f"value_{i}", v)
        if Hkv != H:
            k, v = self.repeat(k), self.repeat(v)
        y = op.scaled_dot_product_attention(q, k, v, self.mask)
        return op.reshape(op.transpose(y, self.ints([0, 2, 1, 3])), self.ints([0, 0, H * D]), special_zero=True)

    def heads(self, x: Any, n: int) -> Any:
        """[B, T, n * D] -> [B, n, T, D]."""
        split = self.op.reshape(x, self.ints([0, 0, n, self.c["head_dim"]]), special_zero=True)
        return self.op.transpose(split, self.ints([0, 2, 1, 3]))

    def rotate(self, x: Any) -> Any:
        op, D = self.op, self.c["head_dim"]
        cos, sin = self.rope
        ends, axis, one = self.ints([D // 2]), self.ints([-1]), self.ints([1])
        low = op.slice(x, self.ints([0]), ends, one, axis)
        high = op.slice(x, ends, self.ints([D]), one, axis)
        turned = op.concat([op.multiply(high, op.constant(np.float32(-1))), low], axis=-1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))

    def remember(self, name: str, new: Any) -> Any:
        """The cache of one layer with the new entries behind it, [B, Hkv, S, D]."""
        op, shape = self.op, [-1, self.c["n_kv_head"], -1, self.c["head_dim"]]
        n_rows = op.gather(op.shape_of(self.tokens), self.ints([0]), self.ints(0))
        empty = op.concat([n_rows, self.ints([shape[1], 0, shape[3]])], axis=0)
        start = op.broadcast(op.constant(np.float32(0)), empty)
        past = op.read_value(start, name, np.float32, shape)
        past = op.gather(past, self.rows, self.ints(0))
        whole = op.concat([past, new], axis=2)
        self.assigned.append(op.assign(whole, name))
        return whole

    def repeat(self, x: Any) -> Any:
        """Key/value heads for each of the query heads that share them."""
        op, c = self.op, self.c
        n = c["n_head"] // c["n_kv_head"]
        wide = op.unsqueeze(x, self.ints([2]))
        shape = op.concat(
            [
                op.gather(op.shape_of(x), self.ints([0, 1]), self.ints(0)),
                self.ints([n]),
                op.gather(op.shape_of(x), self.ints([2, 3]), self.ints(0)),
            ],
            axis=0,
        )
        wide = op.broadcast(wide, shape, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(wide, self.ints([0, c["n_head"], -1, c["head_dim"]]), special_zero=True)

    def norm(self, x: Any, values: Linear) -> Any:
        op, eps = self.op, self.c["norm_eps"]
        weight = op.constant(values[0])
        if values[1] is not None:
            plain = op.mvn(x, self.ints([-1]), True, eps, "inside_sqrt")
            return op.add(op.multiply(plain, weight), op.constant(values[1]))
        mean = op.reduce_mean(op.power(x, op.constant(np.float32(2))), self.ints([-1]), keep_dims=True)
        root = op.sqrt(op.add(mean, op.constant(np.float32(eps))))
        return op.multiply(op.multiply(x, op.divide(op.constant(np.float32(1)), root)), weight)

    def activation(self, x: Any) -> Any:
        op, name = self.op, self.c["activation"]
        if name in ("gelu_tanh", "gelu"):
            return op.gelu(x, "tanh" if name == "gelu_tanh" else "erf")
        return op.relu(x) if name == "relu" else op.swish(x)

    def linear(self, x: Any, values: Linear) -> Any:
        y = self.op.matmul(x, self.weight(values[0]), transpose_a=False, transpose_b=True)
        return y if values[1] is None else self.op.add(y, self.op.constant(values[1]))

    def weight(self, values: np.ndarray, is_large: bool = False) -> Any:
        """[N, K] as it is stored, and how it is read."""
        op = self.op
        if self.format == "fp32":
            return op.constant(values)
        if self.format == "int8" or is_large or values.shape[1] % GROUP:
            scales = np.maximum(np.abs(values).max(-1, keepdims=True), 1e-12) / 127
            levels = np.rint(values / scales).astype(np.int8)
            return op.multiply(op.convert(op.constant(levels), "f32"), op.constant(scales.astype(np.float32)))
        n, k = values.shape
        grouped = values.reshape(n, k // GROUP, GROUP)
        extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
        scales = extreme / -8  # the largest value of a group becomes -8: all 16 levels are used
        safe = np.where(scales == 0, 1, scales)
        levels = np.clip(np.rint(grouped / safe), -8, 7).astype(np.int8).view(np.uint8).reshape(-1) & 15
        packed = levels[0::2] | levels[1::2] << 4
        self.packed.append(packed)  # the tensor only points at it
        tensor = self.ov.Tensor(packed, self.ov.Shape(grouped.shape), self.ov.Type.i4)
        scaled = op.multiply(op.convert(op.constant(tensor), "f32"), op.constant(scales.astype(np.float32)))
        return op.reshape(scaled, self.ints([n, k]), special_zero=False)

    def input(self, shape: list[int], dtype: Any, name: str) -> Any:
        made = self.op.parameter(shape, dtype, name)
        made.output(0).get_tensor().set_names({name})
        return made

    def ints(self, values: Any) -> Any:
        return self.op.constant(np.array(values, dtype=np.int64))


class OpenVino(Engine):
    def __init__(self, request: dict[str, Any]) -> None:
        import openvino

        self.library = openvino
        config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": request["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            # 8 bits in the cache beside 8 and 4 bits in the weights, as the plugin would choose.
            "KV_CACHE_PRECISION": "f16" if request["format"] in ("fp32", "bf16") else "u8",
        }
        if request["format"] in ("fp32", "bf16"):
            config["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[request["format"]]
        path = Path(request["converted"]) / FILE
        self.compiled = openvino.Core().compile_model(path, "CPU", config)
        self.request = self.compiled.create_infer_request()
        self.n_rows = request["workload"]["batch_size"]
        self.rows = np.arange(self.n_rows, dtype=np.int32)
        self.length = 0
        self.prompts: list[list[int]] = []

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        self.prompts = prompts
        self._reset()
        return self._run(np.array(prompts, dtype=np.int64), self.rows, 1)[:, 0].argmax(-1)

    def step(self, chosen: np.ndarray) -> np.ndarray:
        return self._run(chosen[:, None], self.rows, 1)[:, 0].argmax(-1)

    def rewind(self) -> None:
        self.prefill(self.prompts)  # a state has no way back; this is not timed

    def logits(self, tokens: list[int]) -> np.ndarray:
        self._reset()
        return self._run(np.array([tokens], dtype=np.int64), self.rows[:1], len(tokens))[0].copy()

    def _reset(self) -> None:
        self.request.reset_state()
        self.length = 0

    def _run(self, tokens: np.ndarray, rows: np.ndarray, n_logits: int) -> np.ndarray:
        """Logits of the last `n_logits` positions; a view that the next call writes over."""
        n, before = tokens.shape[1], self.length
        self.length = total = before + n
        mask = np.zeros((1, 1, n, total), np.float32)
        if n > 1:
            mask[0, 0] = np.triu(np.full((n, total), -np.inf, np.float32), k=before + 1)
        feeds = {
            "tokens": tokens,
            "positions": np.arange(before, total),
            "mask": mask,
            "rows": rows,
            "start": np.array([n - n_logits]),
        }
        self.request.infer(feeds, share_inputs=True)
        return self.request.get_output_tensor(0).data


def open_engine(request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    engine = OpenVino(request)
    version = engine.library.__version__.partition("-")[0]
    used = engine.compiled.get_property("INFERENCE_NUM_THREADS")
    assert used == request["threads"], f"asked OpenVINO for {request['threads']} threads and got {used}"
    computes = engine.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if request["format"] == "bf16" and computes != "bf16":
        raise Refused(f"OpenVINO has no bf16 on this processor: it would compute in {computes}")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in engine.compiled.get_runtime_model().get_ops()]
    count = kinds.count("FullyConnected")
    if "ScaledDotProductAttention" not in kinds or not count:
        raise Refused("OpenVINO did not fuse attention or matrices of this graph")
    return engine, {
        "version": version,
        "weights_bytes": folder_bytes(request["converted"]),
        "threads": {"threads": used},
        "proof": [f"OpenVINO {version} computes in {computes}; {count} matrices and the attention are fused"],
    }


def main() -> None:
    serve(PeerTrial(open_engine, convert).handlers())
