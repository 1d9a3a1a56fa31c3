"""The model itself in fewer bits proposes; the model verifies."""

from __future__ import annotations

from typing import Any, ClassVar

from paretune.engine.decode.drafts.base import Target
from paretune.engine.decode.drafts.model import ModelDraft, opened
from paretune.engine.runners.base import Runner
from paretune.errors import UsageError
from paretune.ops.weights.base import Weight


class SelfQuantised(ModelDraft):
    name = "self"
    argument: ClassVar[str] = "FORMAT"

    @classmethod
    def prepare(cls, argument: str, target: Target) -> Runner:
        if target.folder is None:
            raise UsageError("the model's folder is not known, so it cannot be loaded again", "Use another draft")
        return opened(target, str(target.folder), f"{target.runner_name}+{argument}").load()

    @classmethod
    def describe(cls, shared: Runner) -> dict[str, Any]:
        formats = {m.format for m in shared.model.modules() if isinstance(m, Weight)}
        return {"runner": shared.name, "weight_formats": sorted(formats)}
