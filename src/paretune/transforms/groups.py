"""4 or 8 bits in groups, each with an fp16 scale (Q4_0, Q4_1 and Q8_0 of llama.cpp), rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops import grouping
from paretune.ops.weights.base import Weight
from paretune.ops.weights.int_groups import GROUPS, LAYOUT_BYTES, IntGroups
from paretune.option import ALL_QUANTISED, OWN_KERNELS, Option
from paretune.transforms.base import Observation
from paretune.transforms.formats import GROUPS_ENDS, Format
from paretune.transforms.quantize import Chosen, Quantize, fast_kernel

# Groups of 64 lose half of what rows lose, at 3 % more bytes; groups of 32 lose a little less, at twice that.
TRIED = ("int4", "int8_groups(group=64)", "w8a8", "w7a7")
# Kernels of a GPU multiply in 16 bits.
NOTHING_ON_A_GPU = "inputs of {} bits are multiplied in 16 on a GPU: they save nothing over int8"


@dataclass(frozen=True)
class Groups(Quantize):
    """Every `group` neighbouring inputs of a row share a scale.

    Args:
        bits: of a weight: 4, 8, or 7, which are stored in 8 and leave room to add byte products in 16 bits (AVX2).
        group: 32, 64 or 128; the last group of a row is shorter where it does not divide the width.
        minimum: also a smallest value a group (the integers then cover exactly the range that is there).
        head_bits: of the embeddings and the head: 4, 8, or 0 to leave them as they are; their groups are `group` too.
        activation_bits: what native code rounds inputs to: 16 (as good as exact), 8 or 7 (faster where the processor
            multiplies bytes, AVX2 among them with 7; measured like every change of numbers).
    """

    name: ClassVar[str] = "groups"
    terms: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "int4": {"bits": 4},
        "int8_groups": {"bits": 8},
        "q8_0": {"bits": 8, "group": 32},
        "q4_0": {"bits": 4, "group": 32, "head_bits": 4},
        "w8a8": {"bits": 8, "group": 128, "activation_bits": 8},
        "w8a7": {"bits": 8, "group": 128, "activation_bits": 7},
        "w7a7": {"bits": 7, "group": 128, "activation_bits": 7},
    }
    formats: ClassVar[Mapping[str, Format]] = {
        "int8_groups": Format("8 bits in groups with fp16 scales", 8, GROUPS_ENDS, {"bits": 8}, "group"),
        "int4": Format("4 bits in groups, embeddings and head in 8", 8, GROUPS_ENDS, {"bits": 4}, "group"),
        "q8_0": Format("the numbers of llama.cpp's Q8_0", 8, GROUPS_ENDS, {"bits": 8, "group": 32}),
        "q4_0": Format("the numbers of llama.cpp's Q4_0 in all layers", 4, GROUPS_ENDS, {"bits": 4, "group": 32}),
    }
    format: ClassVar[str] = IntGroups.format
    bits: int = 4
    group: int = 32
    minimum: bool = False
    head_bits: int = 8
    activation_bits: int = 16

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        is_gpu = device.startswith("cuda")
        # Through PyTorch on a CPU every call would dequantise.
        needs = frozenset() if is_gpu else frozenset({OWN_KERNELS})
        made = []
        for name in TRIED:
            term = cls.terms.get(name.partition("(")[0])
            if term is None:
                continue  # forms with another rounding have no such names
            bits = term.get("activation_bits")
            reason = NOTHING_ON_A_GPU.format(bits) if is_gpu and bits else cls.cannot_pay(device)
            made.append(Option(name, reason, frozenset({ALL_QUANTISED}), needs, log_gain=0.5))
        return made

    def __post_init__(self) -> None:
        allowed = {
            "bits": (4, 7, 8),
            "group": GROUPS,
            "head_bits": (0, 4, 8),
            "activation_bits": (7, 8, 16),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise UsageError(f"{self.name}: {name} is {getattr(self, name)}", f"It has to be one of {known}")

    def notes(self, device: str) -> list[str]:
        said = super().notes(device)
        if device.startswith("cuda") and self.activation_bits < 16:
            said.append(f"inputs of {self.activation_bits} bits are multiplied in 16 on a GPU: they save nothing there")
        return said

    @property
    def title(self) -> str:
        head = "" if self.head_bits == max(self.bits, 8) else f" head{self.head_bits or 'plain'}"
        inputs = "" if self.activation_bits == 16 else f"-a{self.activation_bits}"
        return f"int{self.bits}-g{self.group}{'-min' if self.minimum else ''}{inputs}{head}{self.of_layers}"

    @property
    def format_title(self) -> str:  # type: ignore[override]
        return f"groups of {self.group}"

    @property
    def weight_width(self) -> float:
        return self.bits / 8 + 0.2  # scales; the head may be kept at 8 bits

    def wants(self, is_end: bool) -> bool:
        return bool(self.bits_of(is_end))

    def bits_of(self, is_end: bool) -> int:
        return self.head_bits if is_end else self.bits

    def quantize(self, layer: Chosen) -> Weight:
        return IntGroups.quantize(
            layer.weight.dequantize(),
            self.bits_of(layer.is_end),
            self.group,
            minimum=self.minimum,
            activation_bits=self.activation_bits,
        )

    def is_mine(self, layer: Chosen) -> bool:
        form = (layer.weight.bits, layer.weight.group)
        return super().is_mine(layer) and form == (stored_bits(self.bits_of(layer.is_end)), self.group)

    def expected_bytes(self, layer: Chosen) -> float:
        # The integers, two bytes a group for each number, and what their layout is.
        numbers = 2 if self.minimum else 1
        weight = layer.weight
        row = weight.padded_inputs * stored_bits(self.bits_of(layer.is_end)) / 8
        row += 2 * numbers * grouping.count(weight.in_features, self.group)
        return weight.padded_rows * row + LAYOUT_BYTES

    def proof_of_kernel(self, model: LanguageModel, probe: Observation) -> list[str]:
        # What is not an end is most of the model; where the ends alone are chosen, theirs is the kernel.
        inner = [c for c in self.chosen(model) if not c.is_end]
        kernel = f"native::int{stored_bits(self.bits if inner else self.head_bits)}"
        return fast_kernel(self, model, probe, kernel)


def stored_bits(bits: int) -> int:
    """Bits that a number takes; 7 are stored in 8."""
    return 4 if bits == 4 else 8
