"""What MODEL can be, said alike by every verb."""

from __future__ import annotations

from paretune.model.downloads import DOWNLOADS

_NAMES = f"`pocket`, or {', '.join(f'`{name}`' for name in DOWNLOADS)} (`paretune get`)"
MODEL = f"Folder, GGUF file, hub id, {_NAMES}."
MODEL_OR_PLAN = f"Folder, plan, GGUF file, hub id, {_NAMES}."
