"""ONNX Runtime: a graph built here, with its grouped-query attention over a cache that is updated in place.

`int8` and `int4` pack the matrices for `MatMulNBits`: blocks of 32, a scale each, inputs rounded to 8 bits by block.
`int8_dynamic` quantises them with `quantize_dynamic`: weights by channel and unsigned, because signed ones saturate in
sums of 16 bits on processors without a dot-product instruction; inputs with one scale for a whole tensor. Models whose
inputs have outliers do not survive the latter; Llama's have them at the first token (Sun et al. 2024, "Massive
activations in large language models", arXiv:2402.17762). The embedding stays fp32 in all, as ONNX Runtime's own tools
leave it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Engine, PeerTrial, Refused, folder_bytes, serve
from .weights import Checkpoint, Linear, open_checkpoint

FILE = "model.onnx"
BLOCK = 32
OPSET = 20
BITS = {"int8": 8, "int4": 4}  # of what `MatMulNBits` multiplies
_OPERATORS = {"fp32": "MatMul", "int8_dynamic": "MatMulInteger", "int8": "MatMulNBits", "int4": "MatMulNBits"}
_GATES = {"silu": "Sigmoid"}  # x * sigmoid(x): fused by the session


def convert(request: dict[str, Any]) -> dict[str, Any]:
    import onnx

    out = Path(request["out"]) / FILE
    if request["format"] == "int8_dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            Path(request["base"]) / FILE,
            out,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,  # signed ones saturate where no dot-product instruction is
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return {}
    model = Graph(open_checkpoint(request), BITS.get(request["format"])).build()
    onnx.save(model, out, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{FILE}.data")
    return {}


class Graph:
    """The model as ONNX: tokens `[B, T]` and the caches `[B, Hkv, capacity, D]` in, logits from `start` on out.

    Args:
        bits: of the weights in `MatMulNBits`; None keeps them fp32.
    """

    def __init__(self, checkpoint: Checkpoint, bits: int | None) -> None:
        import onnx

        self.onnx, self.checkpoint, self.bits = onnx, checkpoint, bits
        self.c = checkpoint.config
        if self.c["activation"] not in (_GATES if checkpoint.is_gated else ("gelu_tanh", "gelu")):
            raise Refused(f"activation {self.c['activation']} is not in this graph")
        if self.c["scale_attn_by_inverse_layer_idx"] or not self.c["scale_attn_weights"]:
            raise Refused("attention scaled by layer is not in this graph")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def build(self) -> Any:
        c, helper, kinds = self.c, self.onnx.helper, self.onnx.TensorProto
        x = self.op("Gather", self.constant("embedding", self.checkpoint.embedding), "tokens")
        if self.checkpoint.has_learned_positions:
            table = self.constant("position_table", self.checkpoint.positions)
            x = self.op("Add", x, self.op("Gather", table, "positions"))
        if self.checkpoint.is_rotary:
            angles = np.arange(c["n_positions"])[:, None] * self.checkpoint.rope_frequencies()[None].astype(np.float64)
            self.constant("cos", np.cos(angles).astype(np.float32))
            self.constant("sin", np.sin(angles).astype(np.float32))
        caches, updated = [], []
        for i in range(c["n_layer"]):
            x = self.block(i, x)
            shape = ["B", c["n_kv_head"], "capacity", c["head_dim"]]
            for part in ("key", "value"):
                caches.append(helper.make_tensor_value_info(f"past_{part}_{i}", kinds.FLOAT, shape))
                updated.append(helper.make_tensor_value_info(f"present_{part}_{i}", kinds.FLOAT, shape))
        ends = self.constant("ends", np.array([np.iinfo(np.int64).max]))
        x = self.op("Slice", x, "start", ends, self.constant("time_axis", np.array([1])))
        x = self.norm(x, self.checkpoint.norm, "norm")
        head = self.checkpoint.head
        # The transposed table is a matrix of its own here, also where the embedding is the same numbers.
        self.matmul(x, (self.checkpoint.embedding if head is None else head, None), "head", out="logits")
        inputs = [
            helper.make_tensor_value_info("tokens", kinds.INT64, ["B", "T"]),
            helper.make_tensor_value_info("start", kinds.INT64, [1]),
            helper.make_tensor_value_info("last_index", kinds.INT32, ["B"]),
            helper.make_tensor_value_info("total_length", kinds.INT32, []),
        ]
        if self.checkpoint.has_learned_positions:
            inputs.append(helper.make_tensor_value_info("positions", kinds.INT64, ["T"]))
        logits = helper.make_tensor_value_info("logits", kinds.FLOAT, ["B", "T_out", c["vocab_size"]])
        graph = helper.make_graph(self.nodes, "model", inputs + caches, [logits, *updated], self.constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def block(self, i: int, x: str) -> str:
        c, layer = self.c, self.checkpoint.layer(i)
        h = self.norm(x, layer.norm_1, f"{i}.norm_1")
        qkv = self.matmul(h, layer.qkv, f"{i}.qkv")
        caches = [f"past_key_{i}", f"past_value_{i}"]
        rope = ["cos", "sin"] if self.checkpoint.is_rotary else []
        y = self.op(
            "GroupQueryAttention",
            *(qkv, "", "", *caches, "last_index", "total_length", *rope),
            outputs=[f"{i}.mixed", f"present_key_{i}", f"present_value_{i}"],
            domain="com.microsoft",
            num_heads=c["n_head"],
            kv_num_heads=c["n_kv_head"],
            do_rotary=int(bool(rope)),
            rotary_interleaved=0,
        )
        x = self.op("Add", x, self.matmul(y, layer.o, f"{i}.o"))
        h = self.norm(x, layer.norm_2, f"{i}.norm_2")
        up = self.matmul(h, layer.up, f"{i}.up")
        if layer.gate is None:
            kind = "tanh" if c["activation"] == "gelu_tanh" else "none"
            h = self.op("Gelu", up, approximate=kind)
        else:
            gate = self.matmul(h, layer.gate, f"{i}.gate")
            h = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        return self.op("Add", x, self.matmul(h, layer.down, f"{i}.down"))

    def norm(self, x: str, values: Linear, name: str) -> str:
        weight = self.constant(f"{name}.weight", values[0])
        if values[1] is None:
            # ONNX Runtime's own operator, which it keeps in the standard domain.
            return self.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=self.c["norm_eps"])
        bias = self.constant(f"{name}.bias", values[1])
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=self.c["norm_eps"])

    def matmul(self, x: str, values: Linear, name: str, out: str = "") -> str:
        weight, bias = values
        direct = [out] if out and bias is None else None
        if self.bits is not None:
            packed, scales = pack(weight, self.bits)
            y = self.op(
                "MatMulNBits",
                *(x, self.constant(f"{name}.packed", packed), self.constant(f"{name}.scales", scales)),
                outputs=direct,
                domain="com.microsoft",
                K=weight.shape[1],
                N=weight.shape[0],
                bits=self.bits,
                block_size=BLOCK,
                accuracy_level=4,
            )
        else:
            y = self.op("MatMul", x, self.constant(f"{name}.weight", np.ascontiguousarray(weight.T)), outputs=direct)
        return y if bias is None else self.op("Add", y, self.constant(f"{name}.bias", bias))

    def op(self, kind: str, *inputs: str, outputs: list[str] | None = None, domain: str = "", **attributes: Any) -> str:
        outputs = outputs or [f"{kind}_{len(self.nodes)}"]
        name = f"{kind}_{len(self.nodes)}"
        node = self.onnx.helper.make_node(kind, list(inputs), outputs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values: np.ndarray) -> str:
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name


def pack(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """`weight [N, K]` in blocks: `([N, blocks, BLOCK * bits / 8] uint8, [N, blocks] fp32)`, low half first in 4 bits.

    The offset is half of the levels. The largest value of a block keeps its sign and becomes the lowest level, so that
    all of them are used, as in llama.cpp's Q4_0.
    """
    n, k = weight.shape
    blocks = -(-k // BLOCK)
    half = 1 << (bits - 1)
    padded = np.zeros((n, blocks * BLOCK), dtype=np.float32)
    padded[:, :k] = weight
    grouped = padded.reshape(n, blocks, BLOCK)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
    scales = (extreme / -half).astype(np.float32)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    levels = np.clip(np.rint(grouped * inverse[..., None]) + half, 0, 2 * half - 1).astype(np.uint8)
    return (levels[..., 0::2] | levels[..., 1::2] << 4) if bits == 4 else levels, scales


class OnnxRuntime(Engine):
    def __init__(self, request: dict[str, Any]) -> None:
        import onnxruntime

        self.library, c = onnxruntime, request["config"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request["threads"]
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        path = str(Path(request["converted"]) / FILE)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.n_rows, self.n_vocab = request["workload"]["batch_size"], c["vocab_size"]
        self.takes_positions = c["facts"]["positions"] == "learned"
        shape = (self.n_rows, c["n_kv_head"], request["capacity"], c["head_dim"])
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.caches = {
            f"{part}_{i}": value(np.zeros(shape, np.float32)) for i in range(c["n_layer"]) for part in ("key", "value")
        }
        self.last = np.zeros((self.n_rows, 1, self.n_vocab), np.float32)
        self.length = self.n_prompt = 0

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        self.length = 0
        chosen = self._run(np.array(prompts, dtype=np.int64))
        self.n_prompt = self.length
        return chosen

    def step(self, chosen: np.ndarray) -> np.ndarray:
        return self._run(chosen[:, None])

    def rewind(self) -> None:
        self.length = self.n_prompt  # what lies behind it in the cache is written over

    def logits(self, tokens: list[int]) -> np.ndarray:
        self.length = 0
        out = np.zeros((self.n_rows, len(tokens), self.n_vocab), np.float32)
        self._forward(np.array([tokens] * self.n_rows, dtype=np.int64), out)
        return out[0]

    def _run(self, tokens: np.ndarray) -> np.ndarray:
        self._forward(tokens, self.last)
        return self.last[:, 0].argmax(-1)

    def _forward(self, tokens: np.ndarray, out: np.ndarray) -> None:
        n, before = tokens.shape[1], self.length
        self.length = before + n
        binding = self.session.io_binding()
        feeds = {
            "tokens": tokens,
            "start": np.array([n - out.shape[1]], dtype=np.int64),
            "last_index": np.full(self.n_rows, self.length - 1, dtype=np.int32),
            "total_length": np.array(self.length, dtype=np.int32),
        }
        if self.takes_positions:
            feeds["positions"] = np.arange(before, self.length)
        for name, values in feeds.items():
            binding.bind_cpu_input(name, values)
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        binding.bind_output("logits", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        self.session.run_with_iobinding(binding)


def open_engine(request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    import onnx

    engine = OnnxRuntime(request)
    version = engine.library.__version__
    used = engine.session.get_session_options().intra_op_num_threads
    assert used == request["threads"], f"asked ONNX Runtime for {request['threads']} threads and got {used}"
    model = onnx.load(Path(request["converted"]) / FILE, load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    wanted = _OPERATORS[request["format"]]
    count = kinds.count(wanted)
    if not count:
        raise Refused(f"the converted graph holds no {wanted}")
    return engine, {
        "version": version,
        "weights_bytes": folder_bytes(request["converted"]),
        "threads": {"threads": used},
        "proof": [f"ONNX Runtime {version}, {count} {wanted} nodes, GroupQueryAttention with a cache updated in place"],
    }


def main() -> None:
    serve(PeerTrial(open_engine, convert).handlers())
