"""What every rule of the explanations uses: the explanation itself, and figures in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from paretune.engine.runners.base import Runner
from paretune.hardware import Ceilings
from paretune.measure.profile_parts import SUM_KEYS
from paretune.measure.roofline import quantity
from paretune.recipe import EngineOptions
from paretune.records.explanation import Explanation
from paretune.registry import RUNNERS, TRANSFORMS

LARGE = 0.4  # of the step: a cause that is called its bound
ABOVE_CEILING = 1.15  # a ceiling that is surpassed by more was not the machine's
NOTABLE = 0.15


Result = Mapping[str, Any]
Rule = Callable[[Result], Iterator[Explanation]]


def duration(sec: float) -> str:
    return quantity(sec * 1e6, "us") if sec < 1e-3 else f"{1e3 * sec:.3g} ms"


def gain_without(share: float) -> float:
    """Speed-up when `share` of the step is gone."""
    return 1 / max(0.01, 1 - min(share, 0.99))


def leaves_of(result: Result) -> list[Mapping[str, Any]]:
    """The parts of a profile without the sums of them."""
    return [row for row in result.get("parts") or () if row["part"] not in SUM_KEYS]


def class_share(result: Result, *kinds: str) -> float:
    """Share of the profiled step in kernels of these classes."""
    return sum(row["share"] for row in result.get("kernel_classes") or () if row["kind"] in kinds)


def runner_of(result: Result) -> type[Runner]:
    """What the runner of a profile declares; of one that is not known here, what every runner has."""
    name = ((result.get("recipe") or {}).get("engine") or {}).get("runner") or EngineOptions().runner
    return RUNNERS.get(name) if name in RUNNERS.names() else Runner


def is_on_cpu(result: Result) -> bool:
    return not str(result.get("device") or "cpu").startswith("cuda")


def is_training(result: Result) -> bool:
    return result.get("phase") == "train"


def can_be_native(result: Result) -> bool:
    """Whether native code could run what was profiled: a forward step on a CPU, with attention as it knows it."""
    if not is_on_cpu(result) or is_training(result):
        return False
    names = [t["name"] for t in (result.get("recipe") or {}).get("transforms") or ()]
    return not any(TRANSFORMS.get(name).replaces_attention for name in names if name in TRANSFORMS.names())


def runners_to_try(result: Result, native: str, compiled: str) -> str:
    """What to try: the words of the runners that are not in use and can run on the device; training has one."""
    used = runner_of(result)
    said = [native] if can_be_native(result) and not used.own_kernels else []
    said += [compiled] if used.is_reference and not is_training(result) else []
    return " or ".join(said) or "a larger --batch-size, whose tokens share this cost"


def ceilings_of(result: Result) -> Ceilings | None:
    return Ceilings.from_json(result["ceilings"]) if result.get("ceilings") else None
