"""Tokenizers in and out of a GGUF file.

`tokenizer.ggml.*` is what llama.cpp reads: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`). Beside it stands
`tokenizer.huggingface.json`, an entry of the format, from which the very same tokenizer comes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from paretune.errors import CheckpointError
from paretune.files import write_json, write_text
from paretune.model.config import ModelConfig
from paretune.model.gguf.container import F32
from paretune.model.tokenizer import Tokenizer

# Kinds of tokenizer in `tokenizer.ggml.model`, which llama.cpp names after the first models that had them.
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WHOLE = "tokenizer.huggingface.json"
SPACE = "\u2581"  # SentencePiece's mark of a space
# Splitting rules of byte-level tokenizers that llama.cpp knows by name, told by a part of their pattern.
_PRE = {"(?i:'s|'t|'re|'ve|'m|'ll|'d)": "llama-bpe", "'s|'t|'re|'ve|'m|'ll|'d": "gpt-2"}
_DIGITS = {"type": "Digits", "individual_digits": True}
_PLAIN_SPLIT = ("gpt-2", "gpt2", "default")  # names of GPT-2's splitting rule
_SPLIT_DIGITS = "smollm"  # digits one by one, the rest as GPT-2
_PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def to_metadata(folder: Path, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The entries of a folder's tokenizer, and what the user should know."""
    out: dict[str, Any] = {}
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return {"tokenizer.ggml.model": "no_vocab"}, ["the folder has no tokenizer, so the file has none"]
    tokenizer = Tokenizer(folder)
    text = tokenizer.to_json()
    whole = json.loads(text)
    model, pre = whole["model"], whole.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE":
        note = f"llama.cpp has no form of a {model['type']} tokenizer: the file has only ours"
        return {"tokenizer.ggml.model": "no_vocab", WHOLE: text}, [note]
    notes: list[str] = []
    byte_level = "ByteLevel" in json.dumps(pre)
    n_merges = {"".join(_pair(merge)): i for i, merge in reversed(list(enumerate(model["merges"])))}
    tokens, kinds, scores = [], [], []
    added = {t["id"]: t for t in whole.get("added_tokens", ())}
    by_id = {i: token for token, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    for i in range(config.vocab_size):
        token = by_id.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        kinds.append(_kind(token, added.get(i), model, byte_level))
        scores.append(F32(-float(n_merges.get(token or "", 0)) if kinds[-1] == NORMAL else 0.0))
    out |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if byte_level:
        name = _pre_tokenizer(pre)
        if name is None:
            name = "default"
            notes.append("llama.cpp has no name for the tokenizer's splitting rule: its tokens may differ")
        out |= {
            "tokenizer.ggml.model": _BYTE_LEVEL,
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in model["merges"]],
        }
    else:
        prefix = "Prepend" in json.dumps(whole.get("normalizer")) or '"always"' in json.dumps(pre)
        out |= {
            "tokenizer.ggml.model": _SENTENCEPIECE,
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    first = tokenizer.encode("a")[:1]
    out["tokenizer.ggml.add_bos_token"] = config.bos_token_id is not None and first == [config.bos_token_id]
    out["tokenizer.ggml.add_eos_token"] = False
    if model.get("unk_token") is not None and model["unk_token"] in model["vocab"]:
        out["tokenizer.ggml.unknown_token_id"] = model["vocab"][model["unk_token"]]
    template = tokenizer.chat_template
    if template:
        out["tokenizer.chat_template"] = template
    return out | {WHOLE: text}, notes


def ids_of(config: ModelConfig) -> dict[str, Any]:
    """Begin and end of a text, which a model has even without a tokenizer."""
    out: dict[str, Any] = {}
    if config.bos_token_id is not None:
        out["tokenizer.ggml.bos_token_id"] = config.bos_token_id
    if config.eos_token_ids:
        out["tokenizer.ggml.eos_token_id"] = config.eos_token_ids[0]
    return out


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _kind(token: str | None, added: Mapping[str, Any] | None, model: Mapping[str, Any], byte_level: bool) -> int:
    if token is None:
        return UNUSED
    if not byte_level and token == model.get("unk_token"):
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER
    is_byte = not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else NORMAL


def _pre_tokenizer(pre: Mapping[str, Any]) -> str | None:
    if pre.get("type") == "ByteLevel":
        return "gpt-2" if pre.get("use_regex", True) and not pre.get("add_prefix_space") else None
    parts = pre.get("pretokenizers")
    if isinstance(parts, list) and len(parts) == 2 and parts[0] == _DIGITS and _pre_tokenizer(parts[1]) == "gpt-2":
        return _SPLIT_DIGITS
    text = json.dumps(pre, ensure_ascii=False)
    return next((name for pattern, name in _PRE.items() if pattern in text), None)


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> str | None:
    """Writes `tokenizer.json` and `tokenizer_config.json`; gives the reason where there is none to write.

    Args:
        metadata: entries that `check` has passed.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    kind = metadata.get("tokenizer.ggml.model")
    if isinstance(metadata.get(WHOLE), str):
        write_text(folder / "tokenizer.json", metadata[WHOLE])
    elif kind == _BYTE_LEVEL and tokens and metadata.get("tokenizer.ggml.merges"):
        pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
        if pre not in (*_PLAIN_SPLIT, _SPLIT_DIGITS, *_PATTERNS):
            return f"its tokenizer splits text by the rule {pre!r}, which is not known here"
        write_text(folder / "tokenizer.json", json.dumps(_byte_level(metadata, pre), ensure_ascii=False))
    elif kind == _SENTENCEPIECE and tokens and metadata.get("tokenizer.ggml.scores"):
        write_text(folder / "tokenizer.json", json.dumps(_sentence_piece(metadata), ensure_ascii=False))
    else:
        return "it has no tokenizer" if kind in (None, "no_vocab") else f"its tokenizer {kind!r} is not read here"
    settings: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if tokens and isinstance(i, int) and 0 <= i < len(tokens):
            settings[f"{name}_token"] = tokens[i]
    if metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", settings)
    return None


def check(metadata: Mapping[str, Any], where: str) -> None:
    """Raises `CheckpointError` where an entry of the tokenizer has a wrong type, length or range."""

    def refuse(key: str, what: str) -> NoReturn:
        raise CheckpointError(f"{where}: the entry {key} {what}", "Download the file again")

    tokens = metadata.get("tokenizer.ggml.tokens")
    n = len(tokens) if isinstance(tokens, list) else 0
    lists: tuple[tuple[str, type, bool], ...] = (
        ("tokenizer.ggml.tokens", str, False),
        ("tokenizer.ggml.merges", str, False),
        ("tokenizer.ggml.scores", float, True),
        ("tokenizer.ggml.token_type", int, True),
    )
    for key, kind, is_one_a_token in lists:
        value = metadata.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            refuse(key, f"is not a list of {kind.__name__}")
        if is_one_a_token and len(value) != n:
            refuse(key, f"has {len(value):,} elements for {n:,} tokens")
    if any(merge.count(" ") != 1 for merge in metadata.get("tokenizer.ggml.merges") or ()):
        refuse("tokenizer.ggml.merges", "has a line that is not two tokens with a space between them")
    for key in ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        i = metadata.get(key, 0)
        if isinstance(i, bool) or not isinstance(i, int) or i < 0 or (n and i >= n):
            refuse(key, f"is {i!r}, not one of {n:,} tokens")
    for key in ("tokenizer.chat_template", "tokenizer.ggml.pre", "tokenizer.ggml.model"):
        if not isinstance(metadata.get(key, ""), str):
            refuse(key, "is not text")


def _added(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, "special": kind != USER, **plain}
        for i, (token, kind) in enumerate(zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False))
        if kind in (UNKNOWN, CONTROL, USER)
    ]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Tokens to ids, those that only fill up left out."""
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    return {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind != UNUSED}


def _begin(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-processor that puts the first token before a text."""
    i = metadata.get("tokenizer.ggml.bos_token_id")
    default = metadata.get("tokenizer.ggml.model") == _SENTENCEPIECE
    if i is None or not metadata.get("tokenizer.ggml.add_bos_token", default):
        return None
    token = metadata["tokenizer.ggml.tokens"][i]
    begin, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [begin, text, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [i], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [begin, text], "pair": pair, "special_tokens": special}


def _whole(metadata: Mapping[str, Any], model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    base = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(metadata),
        "normalizer": None,
        "post_processor": _begin(metadata),
        **parts,
        "model": {"type": "BPE", **base, **model},
    }


def _byte_level(metadata: Mapping[str, Any], pre: str) -> dict[str, Any]:
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    before: dict[str, Any] = level
    if pre == _SPLIT_DIGITS:
        before = {"type": "Sequence", "pretokenizers": [_DIGITS, level]}
    if pre in _PATTERNS:
        pattern = {"Regex": _PATTERNS[pre]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        before = {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    model: dict[str, Any] = {"vocab": _vocabulary(metadata), "merges": merges, "unk_token": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe"}
    return _whole(metadata, model, pre_tokenizer=before, decoder=level)


def _sentence_piece(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """BPE whose merges follow from the scores: a piece is made of any two pieces, the best score first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = _vocabulary(metadata)
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    found = []
    for token, i in vocab.items():
        if kinds[i] == NORMAL:
            splits = [(token[:k], token[k:]) for k in range(1, len(token))]
            here = [(vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab]
            found += [(-scores[i], i, *both) for both in sorted(here)]
    merges = [[a, b] for *_, a, b in sorted(found, key=lambda f: f[:4])]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unk = (
        tokens[unknown]
        if unknown is not None
        else next((t for t, k in zip(tokens, kinds, strict=False) if k == 2), None)
    )
    has_bytes = any(kind == BYTE for kind in kinds)
    model = {"vocab": vocab, "merges": merges, "unk_token": unk, "fuse_unk": True, "byte_fallback": has_bytes}
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
    return _whole(
        metadata,
        model,
        pre_tokenizer=None,
        normalizer={"type": "Sequence", "normalizers": [*before, space]},
        decoder={"type": "Sequence", "decoders": decoders},
    )
