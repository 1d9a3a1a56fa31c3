"""What every test shares: the real data where it is present, fixed seeds, tiny models."""

from __future__ import annotations

import contextlib
import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: tests never touch the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes on the same cores: a thread that waits gives its core away
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Before Triton is imported, which asks once: without a GPU its kernels are interpreted.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

from paretune import native_build
from paretune.model import checkpoint

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent

TINY_CONFIGS = {
    "gpt2": {"vocab_size": 131, "n_positions": 64, "n_embd": 48, "n_layer": 2, "n_head": 4},
    "llama": {
        "vocab_size": 137,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "mistral": {
        "vocab_size": 139,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "sliding_window": 8,
    },
}


def pytest_configure(config):
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _native_code():
    """Compiled before the first test: a command says when it compiles, and tests look at what commands say."""
    with contextlib.suppress(native_build.NativeUnavailable):
        for name in ("probe", "step", "attend"):
            native_build.load(name)


@pytest.fixture(scope="session")
def cache_with_native_code(_native_code):
    """Makes a cache folder that shares only what was compiled: to compile it again takes most of a minute."""
    compiled = native_build.cache_folder() / "native"

    def make(folder):
        folder.mkdir(parents=True)
        if compiled.is_dir():
            (folder / "native").symlink_to(compiled, target_is_directory=True)
        return str(folder)

    return make


@pytest.fixture(autouse=True)
def _seeds():
    """Each test starts from the same random state, alone or in the whole run."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data; without it a test is skipped, except on CI, where its absence is a failure."""
    folder = Path(os.environ.get("PARETUNE_DATA") or REPOSITORY.parent / "shared" / "data")
    if folder.is_dir():
        return folder
    reason = f"no real data at {folder} (set PARETUNE_DATA)"
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must not skip these tests")
    pytest.skip(reason)


def make_hf(family: str, seed: int = 0, **changes):
    """A transformers model with random weights everywhere, biases and norms included.

    transformers initialises biases to 0 and norms to 1, which would hide a bias that is never added.
    """
    import transformers

    config_class, model_class = {
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[family]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = model_class(config_class(**(TINY_CONFIGS[family] | special | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + 0.1 * noise if is_norm else 0.15 * noise)
    return model


def save_hf(model, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory) -> Path:
    """A tiny random GPT-2 as transformers writes it. Read only: copy it before you change it."""
    return save_hf(make_hf("gpt2"), tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory) -> Path:
    """A tiny random Llama (grouped-query attention, untied head). Read only."""
    return save_hf(make_hf("llama"), tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_mistral_folder(tmp_path_factory) -> Path:
    """A tiny random Mistral (sliding window of 8 tokens). Read only."""
    return save_hf(make_hf("mistral"), tmp_path_factory.mktemp("tiny_mistral"))


@pytest.fixture
def tiny(tmp_path_factory) -> Callable:
    """`tiny(family, **config changes) -> (our model, transformers model, folder)`: fp32, the same weights."""
    return _build_tiny(tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_factory(tmp_path_factory) -> Callable:
    """`tiny` for fixtures that live longer than a test. What it gives is read only."""
    return functools.cache(_build_tiny(tmp_path_factory))


def _build_tiny(tmp_path_factory) -> Callable:
    def build(family: str, **changes):
        hf = make_hf(family, **changes)
        folder = save_hf(hf, tmp_path_factory.mktemp(f"tiny_{family}"))
        return checkpoint.load(folder), hf, folder

    return build


@pytest.fixture
def tiny_tokens() -> torch.Tensor:
    """Token ids `[2, 23]` that every tiny model knows."""
    return torch.randint(0, 131, (2, 23), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def pocket_folder() -> Path:
    return checkpoint.resolve("pocket")
