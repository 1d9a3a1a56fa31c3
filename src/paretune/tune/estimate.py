"""What a recipe costs before anything is loaded: its bytes from the config, and the least time they take here.

An estimate orders candidates and shows that some cannot win. It is never a result.
"""

from __future__ import annotations

from torch.nn import Module

from paretune import hardware
from paretune.engine.cache_formats import position_bytes
from paretune.engine.runners.base import CACHE_DTYPES
from paretune.measure import roofline
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.model.layers import Embedding, Linear
from paretune.ops.attention.pattern import Pattern, parse
from paretune.recipe import Recipe
from paretune.transforms.mechanism import Mechanism
from paretune.transforms.quantize import Chosen, Quantize, matrices
from paretune.tune.goal import Goal


class Estimator:
    """Bytes and least times of recipes on one model, for one request.

    Args:
        ceilings: what was measured of this machine.
    """

    def __init__(self, config: ModelConfig, goal: Goal, ceilings: hardware.Ceilings) -> None:
        self.config, self.goal, self.ceilings = config, goal, ceilings
        self._known: dict[ModelConfig, _Shapes] = {}  # of the model, and of what is left of it where it is pruned

    def weights_bytes(self, recipe: Recipe, *, of_a_step: bool = False) -> float:
        """Stored bytes of the weights.

        Args:
            of_a_step: without tables of which a decode step reads single rows.
        """
        width = CACHE_DTYPES[recipe.dtype or "fp32"].itemsize
        quantizers = [t for t in recipe.transforms if isinstance(t, Quantize)]
        taken: dict[int, float] = {}
        shapes = self._shapes(recipe)
        for transform in quantizers:
            for chosen in transform.chosen(shapes.model):
                taken.setdefault(id(chosen.weight), float(transform.expected_bytes(chosen)))
        total = float(width * shapes.n_vectors)
        for each in shapes.matrices:
            if not (of_a_step and id(each.weight) in shapes.looked_up):
                total += taken.get(id(each.weight), width * _n_values(each))
        return total

    def _shapes(self, recipe: Recipe) -> _Shapes:
        config = changed(recipe, self.config)
        if config not in self._known:
            self._known[config] = _Shapes(config)
        return self._known[config]

    def step_bytes(self, recipe: Recipe) -> float:
        """Bytes that a decode step in the middle of the request reads: weights, keys and values."""
        goal, config = self.goal, changed(recipe, self.config)
        context = goal.input_len + goal.output_len / 2
        seen = min(context, roofline.keys_seen(_pattern(recipe, config), context))
        dtype = CACHE_DTYPES[recipe.engine.cache_dtype or recipe.dtype or "fp32"]
        each = 2 * position_bytes(dtype, config.all_kv_heads, config.head_dim)
        return self.weights_bytes(recipe, of_a_step=True) + goal.batch_size * seen * each

    def floor_sec(self, recipe: Recipe) -> float | None:
        """The least seconds of the goal's unit: reading the bytes (tokens), or doing the arithmetic (first token).

        None where no ceiling was measured for it: integer products have no rate here.
        """
        goal, ceilings = self.goal, self.ceilings
        if goal.sample_kind == "ttft":
            if any(isinstance(t, Quantize) for t in recipe.transforms):
                return None
            rate = ceilings.matrix_rates.get(recipe.dtype or "fp32")
            config = changed(recipe, self.config)
            pattern = _pattern(recipe, config)
            flops = goal.batch_size * roofline.prefill_flops(config, goal.input_len, pattern=pattern)
            return flops / rate if rate else None
        n_bytes = self.step_bytes(recipe)
        step_sec = n_bytes / ceilings.bandwidth_at(n_bytes)
        if goal.sample_kind == "tpot":
            return step_sec
        return step_sec * max(0, goal.output_len - 1) / goal.output_len / goal.batch_size


class _Shapes:
    """The matrices of a config, on the meta device: shapes without memory."""

    def __init__(self, config: ModelConfig) -> None:
        self.model = checkpoint.build(config)
        self.matrices = matrices(self.model)
        self.looked_up = _looked_up(self.model)
        inside = {id(p) for c in self.matrices for p in c.weight.parameters()}
        self.n_vectors = sum(p.numel() for p in self.model.parameters() if id(p) not in inside)


def changed(recipe: Recipe, config: ModelConfig) -> ModelConfig:
    """The config of the model that a recipe leaves, as far as shapes go."""
    for transform in recipe.transforms:
        if transform.changes_weights:
            config = transform.changed(config)
    return config


def _n_values(chosen: Chosen) -> int:
    return chosen.weight.out_features * chosen.weight.in_features


def _looked_up(model: Module) -> set[int]:
    """Weights of embeddings that are not a linear layer's too."""
    products = {id(m.weight) for m in model.modules() if isinstance(m, Linear)}
    return {id(m.weight) for m in model.modules() if isinstance(m, Embedding)} - products


def _pattern(recipe: Recipe, config: ModelConfig) -> Pattern:
    own = next((t.pattern for t in recipe.transforms if isinstance(t, Mechanism) and t.pattern), None)
    return parse(own) if own else config.attention_pattern
