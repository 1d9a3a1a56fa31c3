"""Text to token ids and back, through the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paretune.errors import CheckpointError, UsageError


class Tokenizer:
    """A model's tokenizer.

    Args:
        folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt` (GPT-2's byte-level BPE).

    Raises:
        CheckpointError: no tokenizer there, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        self.settings = _read_json(folder / "tokenizer_config.json")
        self._chat_file = folder / "chat_template.jinja"
        whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
        try:
            if whole.is_file():
                self._tokenizer = tokenizers.Tokenizer.from_file(str(whole))
            elif vocab.is_file() and merges.is_file():
                self._tokenizer = _byte_level_bpe(vocab, merges)
            else:
                raise CheckpointError(
                    f"{folder} has no tokenizer.json (nor vocab.json and merges.txt)",
                    "Copy the tokenizer files of the model into the folder",
                )
            if not self._tokenizer.get_vocab_size():
                raise ValueError("the vocabulary is empty")
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"the tokenizer in {folder} is damaged ({error})", "Download the model again"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `special_tokens` as the model's own post-processor adds them (Llama's BOS)."""
        return self._tokenizer.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        # Skipped by id: the library compares texts, and misses special tokens that the normalizer changes.
        kept = [i for i in ids if i not in self._special] if skip_special_tokens else list(ids)
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    @property
    def chat_template(self) -> str | None:
        """The model's template in Jinja, the default one where it has several; None where it has none."""
        template = self.settings.get("chat_template")
        if self._chat_file.is_file():
            template = self._chat_file.read_text("utf-8")
        if isinstance(template, list):  # several named ones
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template or None

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the model's chat template makes of `[{"role", "content"}, ...]`.

        Raises:
            UsageError: the model has no chat template, or the template refuses these messages.
        """
        template = self.chat_template
        if not template:
            raise UsageError("this model has no chat template", "Leave out --chat: it is a plain language model")
        specials = {k: _token_text(v) for k, v in self.settings.items() if k.endswith("_token") and v}
        try:
            environment = _chat_environment()
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **specials)
        except Exception as error:  # a template is a foreign program: it can raise anything
            raise UsageError(f"the chat template refuses this prompt: {error}", "Leave out --chat") from None


def _chat_environment() -> Any:
    """Jinja as `transformers` sets it up for chat templates, which are written against it.

    Sandboxed: a downloaded template reaches no Python attribute and changes nothing that it is given.
    """
    import datetime

    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's text for training: here just its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja's protocol

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson  # jinja's own escapes < > & ' for HTML
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


class TextStream:
    """Token ids in, text out, never half a character.

    Byte-level tokens can end inside a UTF-8 character; what is not whole yet is held back. Decoding restarts at the
    last settled token, so a long stream costs the same per token as a short one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of the window that is decoded
        self._settled = 0  # ids whose text has been given out

    def push(self, *tokens: int) -> str:
        """Returns the text that became certain with these tokens."""
        self._ids += tokens
        before = self._tokenizer.decode(self._ids[self._start : self._settled])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd") or len(text) == len(before):  # half a character, or a token without text
            return ""
        self._start, self._settled = self._settled, len(self._ids)
        return text[len(before) :]

    def flush(self) -> str:
        """What was held back, as it is."""
        if self._settled == len(self._ids):
            return ""
        before = self._tokenizer.decode(self._ids[self._start : self._settled])
        text = self._tokenizer.decode(self._ids[self._start :])
        self._start = self._settled = len(self._ids)
        return text[len(before) :]


def _byte_level_bpe(vocab: Path, merges: Path) -> Any:
    """GPT-2's tokenizer from its two original files (Radford et al. 2019)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    if tokenizer.token_to_id(end) is not None:
        tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})", "Download the model again") from None
    return value if isinstance(value, dict) else {}


def _token_text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
