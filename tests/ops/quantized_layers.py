"""The weights that quantised linear layers are tested with, by name."""

from __future__ import annotations

from paretune.ops.weights.int8_rows import Int8Rows
from paretune.ops.weights.int_groups import IntGroups
from paretune.ops.weights.nf4 import NF4

MAKE = {
    "int8 rows": Int8Rows.quantize,
    "int8 groups": lambda w: IntGroups.quantize(w, 8, 32),
    "int8 groups with minimum": lambda w: IntGroups.quantize(w, 8, 128, minimum=True),
    "int4": lambda w: IntGroups.quantize(w, 4, 32),
    "int4 with minimum": lambda w: IntGroups.quantize(w, 4, 128, minimum=True),
    "nf4": NF4.quantize,
}
