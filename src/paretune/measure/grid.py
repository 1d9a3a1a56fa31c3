"""The grid of workloads of `bench`: its cells, what a process takes of memory in one, and how long it may take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paretune.errors import UsageError
from paretune.measure import forkserver
from paretune.measure.workload import MIN_SLICE_SEC, Workload
from paretune.model import checkpoint
from paretune.model.config import ModelConfig
from paretune.recipe import Recipe
from paretune.records.bench import Cell

PROCESS_BYTES = 450 << 20  # an interpreter with PyTorch
FORKED_BYTES = 150 << 20  # of it that a forked trial has for itself, from above: 30 MB were seen
MEMORY_SHARE = 0.9
# Of the estimate only: the imports, the start of a process, what a slice takes beside its own time.
_IMPORT_GUESS_SEC, _START_GUESS_SEC, _SLICE_GUESS_SEC = 5.0, 1.0, 0.05


def cells_of(
    n_positions: int, input_lens: Sequence[int], output_lens: Sequence[int], batch_sizes: Sequence[int]
) -> list[Cell]:
    """The grid, smaller workloads first as given.

    Raises:
        UsageError: a workload that does not fit the model, or an empty list.
    """
    cells = [Cell(i, o, b) for b in batch_sizes for i in input_lens for o in output_lens]
    if not cells:
        raise UsageError("there is no workload to measure", "Give --input-len, --output-len and --batch-size")
    for cell in cells:
        Workload(cell.input_len, cell.output_len, cell.batch_size).check(n_positions)
    return list(dict.fromkeys(cells))


def n_parameters(config: ModelConfig) -> int:
    return sum(p.numel() for p in checkpoint.build(config).parameters())


def shared_and_own_bytes(recipes: Iterable[Recipe], device: str = "cpu", has_peers: bool = False) -> tuple[int, int]:
    """What the trials of these recipes share, which is there once, and what each has for itself beside its model.

    What compiles imports the compiler for itself; peers and trials on a GPU are not forked.
    """
    compiles = any(recipe.runner_class.compiled for recipe in recipes)
    if device != "cpu" or has_peers or compiles or not forkserver.is_possible():
        return 0, PROCESS_BYTES
    return PROCESS_BYTES, FORKED_BYTES


def trial_bytes(config: ModelConfig, n_params: int, cell: Cell, own_bytes: int = PROCESS_BYTES) -> int:
    """What one process takes at rest, from above: fp32 weights, cache, the largest activations.

    Args:
        own_bytes: beside these, without what it shares with others.
    """
    rows = cell.batch_size * cell.input_len
    kv = 2 * config.n_layer * config.n_kv_head * config.head_dim
    cache = 4 * kv * cell.batch_size * (cell.input_len + cell.output_len)
    scores = 4 * config.n_head * rows * cell.input_len
    logits = 4 * cell.batch_size * config.vocab_size
    return own_bytes + 4 * n_params + cache + 2 * scores + 2 * logits + 4 * rows * 3 * (config.n_inner + config.n_embd)


def groups_of(challengers: Sequence[str], each_bytes: int, extra_bytes: int, available: int) -> list[list[str]]:
    """Splits the challengers so that each group fits into memory beside the baseline and its twin.

    Args:
        extra_bytes: what is there once: shared pages, what one takes more while it loads and is checked.
        available: bytes that may be taken now.
    """
    room = int((MEMORY_SHARE * available - extra_bytes) // each_bytes) - 2
    size = max(1, room)  # a single one that does not fit fails with its cause
    return [list(challengers[i : i + size]) for i in range(0, len(challengers), size)] or [[]]


def estimate_sec(n_configs: int, n_cells: int, n_kinds: int, min_blocks: int, max_blocks: int) -> tuple[float, float]:
    """Seconds that a run takes at least and at most, for small models (a slice of a large one takes longer)."""
    n = n_configs + 1
    slices = n_kinds * n * (MIN_SLICE_SEC + _SLICE_GUESS_SEC)
    low, high = (n_cells * (n * _START_GUESS_SEC + blocks * slices) for blocks in (min_blocks, max_blocks))
    return _IMPORT_GUESS_SEC + low, _IMPORT_GUESS_SEC + high
