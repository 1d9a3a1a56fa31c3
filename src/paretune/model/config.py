"""What shapes a model, narrowed from a Hugging Face `config.json` so that nothing else ever reads that file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from paretune.errors import CheckpointError, UsageError
from paretune.model import entries, families
from paretune.ops.attention.pattern import CAUSAL, Pattern, Window, parse
from paretune.registry import FAMILIES

CONVERTED = "paretune"  # the entry of config.json that says how a model was converted
PRUNED = "paretune_pruned"  # the entry that says what was pruned, and the shapes that other entries cannot say
PRUNED_VERSION = 1
UNBOUNDED = 2**30  # tokens: as good as no limit, and still a number


class LayerShape(NamedTuple):
    """What a layer may have of its own."""

    n_head: int
    n_kv_head: int
    n_inner: int


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind` is `linear` or `llama3`."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes in the field's names; every family reads what it needs.

    Where layers differ (`layers`), `n_head`, `n_kv_head` and `n_inner` are the largest.
    """

    family: str  # its name in `registry.FAMILIES`; what it is like: `families.of`
    vocab_size: int  # rows of the embedding
    n_positions: int  # longest sequence, tokens
    n_layer: int
    n_head: int  # query heads
    n_kv_head: int  # key/value heads; n_head is a multiple of it
    n_embd: int  # width of the residual stream
    head_dim: int
    n_inner: int  # width of the MLP
    activation: str  # one of ACTIVATIONS' values
    norm_eps: float
    tied_head: bool  # head and embedding share one Weight
    attn_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # tokens a query sees, itself included
    scale_attn_weights: bool = True  # GPT-2: divide scores by sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # GPT-2: and by layer index + 1
    alibi: bool = False  # scores fall with the distance (`ops/attention/alibi.py`)
    has_positions: bool = True  # learned or rotary ones; False: converted to do without
    pattern: str | None = None  # of attention, in place of the architecture's own (`ops/attention/pattern.py`)
    layers: tuple[LayerShape, ...] = ()  # of each layer, where they differ
    pruned: tuple[str, ...] = ()  # what was pruned, as transforms spell it
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02
    own: tuple[tuple[str, Any], ...] = ()  # names and values of options that only its family knows
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the file as it was read

    def option(self, name: str) -> Any:
        """The value of an option in `own`."""
        return dict(self.own)[name]

    def layer(self, i: int) -> LayerShape:
        """The shape of layer `i`."""
        return self.layers[i] if self.layers else LayerShape(self.n_head, self.n_kv_head, self.n_inner)

    @property
    def all_kv_heads(self) -> int:
        """Key/value heads of all layers together."""
        return sum(self.layer(i).n_kv_head for i in range(self.n_layer))

    @property
    def is_regular(self) -> bool:
        """Whether the entries that everybody reads say all of its shapes."""
        return not self.layers and families.of(self).expresses(self)

    def reshaped(self, shapes: Sequence[LayerShape], n_embd: int | None = None) -> ModelConfig:
        """The same model with these layers, and of another width.

        Args:
            shapes: one a layer; there may be fewer than before.
        """
        alike = len(set(shapes)) == 1
        largest = LayerShape(*(max(values) for values in zip(*shapes, strict=True)))
        return replace(
            self,
            n_layer=len(shapes),
            n_embd=n_embd or self.n_embd,
            layers=() if alike else tuple(shapes),
            **largest._asdict(),
        )

    @property
    def gated_mlp(self) -> bool:
        return families.of(self).is_gated

    @property
    def has_learned_positions(self) -> bool:
        return self.has_positions and families.of(self).positions == "learned"

    @property
    def attention_pattern(self) -> Pattern:
        """Which keys a query sees, in every layer."""
        if self.pattern is not None:
            return parse(self.pattern)
        return CAUSAL if self.sliding_window is None else Window(self.sliding_window)

    @property
    def longest(self) -> int:
        """Tokens that a sequence may have: `n_positions`, or practically any number where nothing ends there.

        Nothing does without learned positions, where ALiBi says how far a key is or a window forgets it.
        """
        is_open = not self.has_learned_positions and (self.alibi or self.attention_pattern.kept.window is not None)
        return UNBOUNDED if is_open else self.n_positions

    @staticmethod
    def from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Narrows a Hugging Face config.

        Raises:
            CheckpointError: the architecture or one of its options is not known here.
        """
        converted = hf.get(CONVERTED)
        family = hf.get("model_type")
        if (converted is not None or PRUNED in hf) and isinstance(family, str):
            family = family.removeprefix(f"{CONVERTED}_")
        if family not in FAMILIES.names():
            raise CheckpointError(
                f"{where}: model_type {family!r} is not supported",
                f"Supported: {', '.join(FAMILIES.names())}",
            )
        try:
            config = families.get(family).read(hf, where)
            if converted is not None:
                config = _converted(config, hf)
            if hf.get(PRUNED) is not None:
                config = _pruned(config, entries.table(hf, PRUNED), where)
        except KeyError as missing:
            raise CheckpointError(
                f"{where} has no entry {missing}", "Take the config.json that belongs to this model"
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{where} has a wrong value: {error}", "Take the config.json that belongs to this model"
            ) from None
        _check(config, where)
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config as it was read, or a fresh one that `transformers` reads."""
        if self.hf:
            out = {k: v for k, v in self.hf.items() if k not in (CONVERTED, PRUNED)} | {"model_type": self.family}
            if self.pruned:  # its shapes are no longer those that were read
                out |= families.of(self).write(self)
        else:
            out = self._fresh_hf()
        if self.alibi or not self.has_positions or self.pattern is not None:
            # Another name of the architecture: tools that do not know the entry must not read it as the plain one.
            out["model_type"] = f"{CONVERTED}_{self.family}"
            out[CONVERTED] = {"alibi": self.alibi, "positions": self.has_positions, "pattern": self.pattern}
        if self.pruned:
            entry: dict[str, Any] = {"schema_version": PRUNED_VERSION, "done": list(self.pruned)}
            if not self.is_regular:
                out["model_type"] = f"{CONVERTED}_{self.family}"
                entry["head_dim"] = self.head_dim
                entry["shapes"] = [list(self.layer(i)) for i in range(self.n_layer)]
            out[PRUNED] = entry
        return out

    def _fresh_hf(self) -> dict[str, Any]:
        common: dict[str, Any] = {
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "initializer_range": self.initializer_range,
            "tie_word_embeddings": self.tied_head,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": entries.one_or_list(self.eos_token_ids),
        }
        family = families.of(self)
        return common | {"architectures": [family.architecture]} | family.write(self)

    def with_positions(self, n_positions: int) -> ModelConfig:
        """The same model for another longest sequence (random weights and length studies)."""
        key = families.of(self).n_positions_key
        return replace(self, n_positions=n_positions, hf={**self.hf, key: n_positions} if self.hf else {})


def _converted(config: ModelConfig, hf: Mapping[str, Any]) -> ModelConfig:
    """What `transforms.mechanism` changed and `to_hf` wrote down."""
    entry = entries.table(hf, CONVERTED)
    unknown = set(entry) - {"alibi", "positions", "pattern"}
    if unknown:
        raise ValueError(f"{CONVERTED} has an entry {min(unknown)!r}, which this version does not know")
    pattern = entry.get("pattern")
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern is {pattern!r}, not a text")
    try:
        pattern = None if pattern is None else str(parse(pattern))
    except UsageError as error:
        raise ValueError(error.cause) from None
    return replace(
        config,
        alibi=entries.flag(entry, "alibi", False),
        has_positions=entries.flag(entry, "positions", True),
        pattern=pattern,
    )


def _pruned(config: ModelConfig, entry: Mapping[str, Any], where: str) -> ModelConfig:
    """What `transforms.prune` changed and `to_hf` wrote down."""
    version = entries.count(entry, "schema_version")
    if version > PRUNED_VERSION:
        raise CheckpointError(
            f"{where}: the model was pruned by a newer version of Paretune (schema {version}, known {PRUNED_VERSION})",
            "Install the newer version",
        )
    done = entry.get("done")
    if not isinstance(done, list) or not done or not all(isinstance(text, str) for text in done):
        raise ValueError(f"{PRUNED} does not say what was pruned")
    config = replace(config, pruned=tuple(done))
    if "shapes" not in entry:
        return config
    rows = entry["shapes"]
    is_table = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows)
    if not is_table or len(rows) != config.n_layer or any(type(n) is not int or n < 1 for row in rows for n in row):
        raise ValueError(f"{PRUNED}: shapes is no table of {config.n_layer} rows of three numbers")
    shapes = [LayerShape(*row) for row in rows]
    if any(shape.n_head % shape.n_kv_head for shape in shapes):
        raise ValueError(f"{PRUNED}: query heads are no multiple of key/value heads")
    return replace(config, head_dim=entries.count(entry, "head_dim")).reshaped(shapes)


def _check(c: ModelConfig, where: str) -> None:
    sizes = ("vocab_size", "n_positions", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "n_inner")
    bad = [name for name in sizes if getattr(c, name) < 1]
    if bad:
        raise CheckpointError(f"{where}: {bad[0]} is {getattr(c, bad[0])}", "It has to be 1 or more")
    if c.n_head % c.n_kv_head:
        raise CheckpointError(
            f"{where}: {c.n_head} query heads cannot share {c.n_kv_head} key/value heads",
            "The first has to be a multiple of the second",
        )
    families.of(c).check(c, where)
