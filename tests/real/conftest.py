"""The real model: what `paretune get smollm2` fetched. `make real` fetches it and runs these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.model.tokenizer import Tokenizer

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    """Without `-m real` they are skipped: they take minutes, and half a gigabyte of the cache."""
    if "real" in (config.option.markexpr or ""):
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="a suite of its own: run `make real`"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model's folder: dense fp32."""
    try:
        return checkpoint.resolve("smollm2")
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2) -> Path:
    """The file that the folder was made from, in its own blocks."""
    from paretune.model.downloads import DOWNLOADS

    path = DOWNLOADS["smollm2"].gguf
    if not path.is_file():
        pytest.skip(f"{path} is gone: run `paretune get smollm2` after removing {smollm2}")
    return path


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="session")
def theirs(smollm2):
    """transformers' model of the same folder, fp32."""
    import torch
    import transformers

    return transformers.LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
