"""The peers: what each needs, which formats and models it takes. A new peer is an entry here and a worker.

Versions are pinned to those that the workers were tried with; `envs` builds an environment for each.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from paretune.errors import UsageError
from paretune.model.config import ModelConfig

OURS = "paretune"


@dataclass(frozen=True)
class Format:
    """A number format of a peer.

    Args:
        bits: of a weight; how far the tokens have to agree follows from it.
        base: the format that is converted first and read by this conversion.
        stored_as: the format whose converted files this one runs from.
        inputs: what the engine rounds the inputs of its matrices to, where one scale serves many of them: a key of
            `INPUTS`. Outliers of a model can make that its largest error by far (`agreement.share_with_inputs`).
        saturates: its 8-bit products are added in 16 bits on x86 processors without a dot-product instruction.
    """

    bits: int
    base: str | None = None
    stored_as: str | None = None
    inputs: str | None = None
    saturates: bool = False


INPUTS = {"tensor": "8 bits with one scale for a whole tensor", "row": "8 bits with one scale a token"}


@dataclass(frozen=True, eq=False)  # one of each: compared and hashed by identity
class Peer:
    """Another engine.

    Args:
        worker: its module in `workers/`.
        modules: what has to be importable in its environment.
        requirements: for pip, pinned.
        formats: by the peer's own names.
        default: the formats of its bare name.
        families: model families that its worker can express.
        reads_checkpoint: it takes the Hugging Face folder as it is; nothing is converted.
        shares_interpreter: it may run in Paretune's own environment where that has its modules.
        pip_arguments, pip_environment: how it is built.
        effort: what an installation takes, for the user.
    """

    name: str
    worker: str
    modules: tuple[str, ...]
    requirements: tuple[str, ...]
    formats: Mapping[str, Format]
    default: tuple[str, ...]
    families: tuple[str, ...] = ("gpt2", "llama", "mistral")
    reads_checkpoint: bool = False
    shares_interpreter: bool = False
    pip_arguments: tuple[str, ...] = ()
    pip_environment: Mapping[str, str] = field(default_factory=dict)
    effort: str = "seconds to a minute"


_NUMPY = "numpy==2.4.6"
# The library alone, for this very processor: no tools, no examples, no image models.
_LLAMA_CPP_BUILD = (
    "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_CURL=OFF"
)

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "transformers",
            worker="transformers",
            modules=("torch", "transformers"),
            requirements=("torch==2.13.0", "transformers==5.23.0", _NUMPY),
            formats={"fp32": Format(32), "bf16": Format(16)},
            default=("fp32", "bf16"),
            reads_checkpoint=True,
            shares_interpreter=True,
            effort="a download of PyTorch, unless Paretune's own environment has transformers",
        ),
        Peer(
            "llama.cpp",
            worker="llama_cpp",
            modules=("llama_cpp", "gguf"),
            requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", _NUMPY),
            formats={
                "F32": Format(32),
                "BF16": Format(16, base="F32"),
                "Q8_0": Format(8, base="F32"),
                "Q4_0": Format(4, base="F32"),
                "Q4_K_M": Format(4, base="F32"),
            },
            default=("F32", "Q8_0", "Q4_K_M"),
            pip_arguments=("--no-binary", "llama-cpp-python"),
            pip_environment={"CMAKE_ARGS": _LLAMA_CPP_BUILD},
            effort="several minutes: it is compiled for this processor, with a C++ compiler",
        ),
        Peer(
            "ctranslate2",
            worker="ctranslate2",
            modules=("ctranslate2",),
            requirements=("ctranslate2==4.8.5", _NUMPY),
            formats={"fp32": Format(32), "int8": Format(8, inputs="row", saturates=True)},
            default=("fp32", "int8"),
        ),
        Peer(
            "onnxruntime",
            worker="onnxruntime",
            modules=("onnxruntime", "onnx"),
            requirements=("onnxruntime==1.31.1", "onnx==1.23.2", _NUMPY),
            formats={
                "fp32": Format(32),
                "int8": Format(8),
                "int8_dynamic": Format(8, base="fp32", inputs="tensor"),
                "int4": Format(4),
            },
            default=("fp32", "int8", "int4"),
        ),
        Peer(
            "openvino",
            worker="openvino",
            modules=("openvino",),
            requirements=("openvino==2026.4.1", _NUMPY),
            formats={
                "fp32": Format(32),
                "bf16": Format(16, stored_as="fp32"),
                "int8": Format(8),
                "int4": Format(4),
            },
            default=("fp32", "int8", "int4"),
        ),
    )
}


@dataclass(frozen=True)
class Engine:
    """A peer in one format: what a row of `bench` stands for."""

    peer: Peer
    format: str

    @property
    def name(self) -> str:
        return f"{self.peer.name}:{self.format}"

    @property
    def bits(self) -> int:
        return self.peer.formats[self.format].bits


def peer_of(name: str) -> Peer:
    """The peer of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PEERS:
        near = difflib.get_close_matches(name, PEERS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown engine {name!r}", f"{hint}Known: {', '.join([OURS, *PEERS])}")
    return PEERS[name]


def engines_of(text: str) -> tuple[bool, list[Engine]]:
    """Reads `paretune,llama.cpp:Q8_0,transformers`: whether our own configurations are among them, and the peers.

    A bare name stands for its default formats; formats are found whatever their case.

    Raises:
        UsageError: an unknown engine or format, or nothing at all.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError("--engine is empty", f"Known: {', '.join([OURS, *PEERS])}")
    engines: list[Engine] = []
    for part in parts:
        name, colon, wanted = part.partition(":")
        if name == OURS:
            if colon:
                raise UsageError(f"{part!r}: formats of {OURS} are configurations", "Name them with --config")
            continue
        peer = peer_of(name)
        by_case = {known.lower(): known for known in peer.formats}
        if colon and wanted.lower() not in by_case:
            known = ", ".join(f"{name}:{format}" for format in peer.formats)
            raise UsageError(f"{name} has no format {wanted!r} here", f"Known: {known}")
        engines += [Engine(peer, format) for format in ([by_case[wanted.lower()]] if colon else peer.default)]
    return OURS in parts, list(dict.fromkeys(engines))


def refusal(engine: Engine, config: ModelConfig, n_tokens: int) -> str | None:
    """Why this model at this length is not for that peer, as a clause; None where it is.

    Args:
        n_tokens: the longest sequence, prompt and output.
    """
    peer = engine.peer
    if config.family not in peer.families:
        return f"{peer.name} is not measured with {config.family} models"
    if config.hf.get("quantization_config"):
        return f"the checkpoint is already quantised in Paretune's own form, which {peer.name} cannot read"
    if config.sliding_window is not None and n_tokens > config.sliding_window:
        # Its cache would forget what the next slice needs, or its form of the model has no window.
        return (
            f"{n_tokens} tokens exceed the sliding window of {config.sliding_window}, beyond which {peer.name} "
            "is not measured"
        )
    return None
