"""CTranslate2: its own `generate_batch`, whose callback tells when each token was chosen.

The specification is filled here from the weights, as its converters do, so that the environment needs no PyTorch.

`int8` rounds weights and inputs by row. On processors other than Intel's its products are oneDNN's. Without a
dot-product instruction those add pairs of products in 16 bits, which saturates (oneDNN's guide, "Nuances of int8
computations").
CT2_USE_MKL=1 asks for MKL's, which do not, and which took ten times as long on a Zen 3: the library's own choice stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .protocol import Engine, PeerTrial, Refused, clock, folder_bytes, serve
from .weights import open_checkpoint

_QUANTIZATION = {"fp32": "float32", "int8": "int8"}
_ACTIVATIONS = {"gelu_tanh": "GELUTanh", "gelu": "GELU", "quick_gelu": "GELUSigmoid", "relu": "RELU", "silu": "SWISH"}


def convert(request: dict[str, Any]) -> dict[str, Any]:
    from ctranslate2.specs import attention_spec, common_spec, transformer_spec

    checkpoint = open_checkpoint(request)
    c = checkpoint.config
    if not c["scale_attn_weights"] or c["scale_attn_by_inverse_layer_idx"]:
        raise Refused("CTranslate2 divides the scores by sqrt(head size) in every layer, this model does not")
    options: dict[str, Any] = {
        "activation": getattr(common_spec.Activation, _ACTIVATIONS[c["activation"]]),
        "ffn_glu": checkpoint.is_gated,
        "rms_norm": checkpoint.has_rms_norm,
    }
    scaling = c["rope_scaling"]
    if checkpoint.is_rotary:
        kinds = attention_spec.RotaryScalingType
        kind = None if scaling is None else {"linear": kinds.Linear, "llama3": kinds.Llama3}[scaling["kind"]]
        if (
            scaling
            and scaling["kind"] == "llama3"
            and (scaling["factor"], scaling["original_n_positions"]) != (8, 8192)
        ):
            raise Refused("CTranslate2 fixes llama3 scaling at a factor of 8 over 8192 tokens")
        options |= {
            "rotary_dim": c["head_dim"],
            "rotary_interleave": False,
            "rotary_base": c["rope_theta"],
            "rotary_scaling_type": kind,
            "rotary_scaling_factor": scaling["factor"] if scaling else 1,
            "num_heads_kv": c["n_kv_head"] if c["n_kv_head"] != c["n_head"] else None,
            "head_dim": c["head_dim"],
        }
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(c["n_layer"], c["n_head"], pre_norm=True, **options)
    spec.config.layer_norm_epsilon = c["norm_eps"]
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = checkpoint.embedding
    decoder.projection.weight = checkpoint.embedding if checkpoint.head is None else checkpoint.head
    if checkpoint.has_learned_positions:
        decoder.position_encodings.encodings = checkpoint.positions
    _norm(decoder.layer_norm, checkpoint.norm)
    for i, into in enumerate(decoder.layer):
        layer = checkpoint.layer(i)
        _norm(into.self_attention.layer_norm, layer.norm_1)
        _norm(into.ffn.layer_norm, layer.norm_2)
        _linear(into.self_attention.linear[0], layer.qkv)
        _linear(into.self_attention.linear[1], layer.o)
        if layer.gate is None:
            _linear(into.ffn.linear_0, layer.up)
        else:
            _linear(into.ffn.linear_0, layer.gate)
            _linear(into.ffn.linear_0_noact, layer.up)
        _linear(into.ffn.linear_1, layer.down)
        if scaling and scaling["kind"] == "llama3":
            into.self_attention.rotary_low_freq_factor = np.float32(scaling["low_freq_factor"])
            into.self_attention.rotary_high_freq_factor = np.float32(scaling["high_freq_factor"])
    spec.register_vocabulary([f"<{i}>" for i in range(c["vocab_size"])])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "<0>"
    spec.validate()
    spec.optimize(quantization=_QUANTIZATION[request["format"]])
    spec.save(request["out"])
    return {}


def _norm(spec: Any, values: Any) -> None:
    spec.gamma = values[0]
    if values[1] is not None:
        spec.beta = values[1]


def _linear(spec: Any, values: Any) -> None:
    spec.weight = values[0]
    if values[1] is not None:
        spec.bias = values[1]


class CTranslate2(Engine):
    def __init__(self, request: dict[str, Any]) -> None:
        import ctranslate2

        self.library = ctranslate2
        self.generator = ctranslate2.Generator(
            request["converted"],
            device="cpu",
            inter_threads=1,
            intra_threads=request["threads"],
            compute_type=_QUANTIZATION[request["format"]],
        )

    def phases(self, prompts: list[list[int]], n_steps: int) -> tuple[float, float, list[list[int]]]:
        """The callback comes once a row and token: a step ends with its last row."""
        moments: dict[int, float] = {}

        def on_token(result: Any) -> bool:
            moments[result.step] = clock.now()
            return False

        words = [[f"<{i}>" for i in prompt] for prompt in prompts]
        started = clock.now()
        done = self.generator.generate_batch(
            words,
            max_length=n_steps + 1,
            min_length=n_steps + 1,
            include_prompt_in_result=False,
            sampling_topk=1,
            end_token=[],
            callback=on_token,
        )
        rows = [result.sequences_ids[0] for result in done]
        assert all(len(row) == n_steps + 1 for row in rows), "fewer tokens than asked for"
        times = sorted(moments.values())
        assert len(times) == n_steps + 1, f"{len(times)} steps were reported, not {n_steps + 1}"
        return times[0] - started, times[-1] - times[0], rows

    def prefill_sec(self, prompts: list[list[int]]) -> float:
        return self.phases(prompts, 0)[0]

    def decode_sec(self, prompts: list[list[int]], n_steps: int) -> float:
        return self.phases(prompts, n_steps)[1]

    def request_sec(self, prompts: list[list[int]], n_steps: int) -> float:
        prefill, decode, _ = self.phases(prompts, n_steps)
        return prefill + decode

    def logits(self, tokens: list[int]) -> np.ndarray:
        out = self.generator.forward_batch([[f"<{i}>" for i in tokens]], return_log_probs=False)
        return np.asarray(out)[0]


def open_engine(request: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    engine = CTranslate2(request)
    version = engine.library.__version__
    used = engine.generator.compute_type
    # Of its two libraries for x86 only MKL has products of 16 bits: where they are offered, it is MKL that multiplies.
    has_mkl = "int16" in engine.library.get_supported_compute_types("cpu")
    return engine, {
        "version": version,
        "weights_bytes": folder_bytes(request["converted"]),
        "threads": {"threads": request["threads"]},
        "proof": [f"CTranslate2 {version} computes in {used}{', products by MKL' if has_mkl else ''}"],
    }


def main() -> None:
    serve(PeerTrial(open_engine, convert).handlers())
