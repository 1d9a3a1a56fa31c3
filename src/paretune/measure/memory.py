"""Memory in parts: what the weights, the cache and the activations take, and what the process and the GPU
hold.

All figures are bytes. `None` says that a figure was not measured or does not exist here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paretune.process import peak_rss_bytes, rss_bytes, shared_bytes
from paretune.records.trial import MemoryParts

if TYPE_CHECKING:
    import torch


def _leaves(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that really hold data: a wrapper subclass has none of its own."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    names, _ = flatten()
    return [leaf for name in names for leaf in _leaves(getattr(tensor, name))]


def _storage(tensor: torch.Tensor) -> tuple[Any, int]:
    """A key that two views of the same memory share, and the bytes of that memory."""
    try:
        storage = tensor.untyped_storage()
        return storage._cdata, storage.nbytes()
    except (NotImplementedError, RuntimeError):  # opaque layouts (MKL-DNN, sparse) have no storage to ask
        return id(tensor), tensor.numel() * tensor.element_size()


def storage_bytes(module: torch.nn.Module) -> dict[str, int]:
    """Bytes of a module's `parameters`, `buffers` and `total`, and its `n_storages`: memory that several
    tensors share (tied layers, views) counts once, and whole. A storage of both kinds counts as a parameter.
    """
    seen: dict[Any, int] = {}
    sums: dict[str, int] = {}
    kept = []  # a wrapper may make its leaves anew at each look: while they live, no key comes twice
    for kind, tensors in (("parameters", module.parameters()), ("buffers", module.buffers())):
        before = sum(seen.values())
        for tensor in tensors:
            for leaf in _leaves(tensor):
                key, n_bytes = _storage(leaf)
                kept.append(leaf)
                seen[key] = n_bytes
        sums[kind] = sum(seen.values()) - before
    return {**sums, "total": sum(sums.values()), "n_storages": len(seen)}


def take(
    weights_bytes: int,
    kv_cache_bytes: int | None = None,
    activation_peak_bytes: int | None = None,
    device: str = "cpu",
) -> MemoryParts:
    """The parts that the caller knows beside what the process and the GPU hold now."""
    process = (rss_bytes(), peak_rss_bytes())
    parts = (weights_bytes, kv_cache_bytes, activation_peak_bytes)
    return MemoryParts(*parts, *process, **device_memory(device), shared_bytes=shared_bytes())


def device_memory(device: str = "cpu") -> dict[str, int]:
    """What a GPU holds, under the names of `MemoryParts`; empty for the CPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {
        "device_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "device_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "device_used_bytes": total - free,
    }
