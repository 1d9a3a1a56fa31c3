"""Changes what attention computes: ALiBi in place of positions, a sparse pattern in place of all keys, or both.

The weights stay; what the model says does not, so its quality is measured, and short fine-tuning recovers it. By which
code it runs is another transform's matter (`attention`). A converted model saves to a folder that loads again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from paretune.errors import UsageError
from paretune.model.base import LanguageModel
from paretune.model.config import ModelConfig
from paretune.ops.attention import alibi
from paretune.ops.attention.pattern import parse
from paretune.option import Option
from paretune.transforms.attention import attention_layers
from paretune.transforms.base import Context, Observation, Stage, Transform, ensure

POSITIONS = ("removed", "kept")


WINDOW = 256  # that is tried, in tokens


@dataclass(frozen=True)
class Mechanism(Transform):
    """ALiBi: Press et al. 2022, arXiv:2108.12409. Patterns: `ops/attention/pattern.py`.

    Args:
        alibi: scores fall with the distance, by a fixed slope a head.
        positions: what becomes of learned or rotary positions under ALiBi, `removed` or `kept`.
        pattern: which keys a query sees, such as `prefix:16+window:256`; "" leaves the model's own.
    """

    name: ClassVar[str] = "mechanism"
    stage: ClassVar[Stage] = Stage.MECHANISM
    axis: ClassVar[str] = "mechanism"
    bare: ClassVar[bool] = False
    main: ClassVar[str | None] = "pattern"
    terms: ClassVar[Mapping[str, Mapping[str, Any]]] = {"alibi": {"alibi": True}}
    per_weight: ClassVar[bool] = True  # it changes none
    trainable: ClassVar[bool] = True
    alibi: bool = False
    positions: str = "removed"
    pattern: str = ""

    @classmethod
    def options(cls, config: ModelConfig | None, device: str, n_tokens: int) -> Sequence[Option]:
        if config is None:
            return ()
        reason = reason_to_keep(config, n_tokens)
        names = (f"mechanism(window:{WINDOW})", f"mechanism(prefix:16+window:{WINDOW})", "alibi")
        return [Option(name, reason, beside=("quantize",), differs_after=WINDOW) for name in names]

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise UsageError(f"positions is {self.positions!r}", f"Known: {', '.join(POSITIONS)}")
        if self.pattern:
            object.__setattr__(self, "pattern", str(parse(self.pattern)))
        if not self.alibi and not self.pattern:
            raise UsageError("a mechanism that changes nothing", 'Set alibi = true or a pattern such as "window:256"')
        if not self.alibi and self.positions != "removed":
            raise UsageError("positions are always kept without ALiBi", "Leave `positions` out, or set alibi = true")

    @property
    def title(self) -> str:
        words = ["alibi" if self.positions == "removed" else "alibi+positions"] if self.alibi else []
        return " ".join([*words, self.pattern]).strip()

    def fits(self, config: ModelConfig) -> str | None:
        if self.alibi and config.alibi:
            return "the model has ALiBi already"
        try:
            if self.pattern:
                parse(self.pattern).check(config.n_positions)
        except UsageError as error:
            return error.cause
        return None

    def changed(self, config: ModelConfig) -> ModelConfig:
        if self.pattern:
            config = replace(config, pattern=self.pattern)
        return replace(config, alibi=True, has_positions=self.positions == "kept") if self.alibi else config

    def apply(self, model: LanguageModel, ctx: Context) -> LanguageModel:
        """Raises `UsageError` where the pattern does not fit the context or the model has no positions to replace."""
        if reason := self.fits(model.config):
            raise UsageError(reason, "Name another pattern, or leave the transform `mechanism` out of the recipe")
        model.config = config = self.changed(model.config)
        if self.alibi and not config.has_positions:
            model.drop_positions_()
        slopes = alibi.slopes(config.n_head) if config.alibi else None
        for module in attention_layers(model):
            module.spec = replace(module.spec, pattern=config.attention_pattern, slopes=slopes)  # type: ignore[type-var]
        return model

    def verify(self, model: LanguageModel, probe: Observation) -> list[str]:
        config, layers = model.config, attention_layers(model)
        ensure(bool(layers), self, "the model has no attention layer")
        specs = [m.spec for m in layers]
        said = []
        if self.alibi:
            slopes = alibi.slopes(config.n_head)
            ensure(all(s.slopes == slopes for s in specs), self, "some layers have other slopes")  # type: ignore[union-attr]
            table = model.family.modules.get("positions")
            left = [n for n, _ in model.named_parameters() if table is not None and n.startswith(f"{table}.")]
            ensure(self.positions == "kept" or not (left or config.has_positions), self, "positions are still added")
            what = "no positions are added" if self.positions == "removed" else "positions are added as before"
            said.append(f"all {len(layers)} layers fall by {slopes[0]:.3g} to {slopes[-1]:.3g} a token; {what}")
        if self.pattern:
            pattern = parse(self.pattern)
            ensure(all(s.pattern == pattern for s in specs), self, "some layers have another pattern")  # type: ignore[union-attr]
            share = pattern.work_share(config.n_positions)
            ensure(share < 1, self, f"{self.pattern} skips nothing in a context of {config.n_positions} tokens")
            dense = f"{share:.1%} of the dense pairs at {config.n_positions} tokens"
            said.append(f"all {len(layers)} layers see {self.pattern}: {dense}")
        return said


def reason_to_keep(config: ModelConfig, n_tokens: int) -> str | None:
    """Why no other mechanism is tried on a model for requests of `n_tokens`, or None."""
    if config.alibi or not config.attention_pattern.is_dense:
        return "the model has a mechanism of its own"
    if n_tokens <= WINDOW:
        return f"a window of {WINDOW} skips nothing in a request of {n_tokens} tokens, and ALiBi is for long ones"
    return None
