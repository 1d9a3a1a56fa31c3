"""Mistral (Jiang et al. 2023): Llama with a sliding window of attention."""

from __future__ import annotations

from paretune.model.families.llama.family import Gguf, LlamaFamily


class MistralGguf(Gguf):
    is_read = False  # llama.cpp calls both Llama


class MistralFamily(LlamaFamily):
    name = "mistral"
    architecture = "MistralForCausalLM"
    has_window = True
    writes_biases = False
    gguf = MistralGguf()
