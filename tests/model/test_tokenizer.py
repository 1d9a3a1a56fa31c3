# ruff: noqa: RUF001 - ambiguous characters are what is tested
"""Text to ids and back: GPT-2's published counts, streaming that never cuts a character, chat templates."""

from __future__ import annotations

import json
import shutil
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from paretune.errors import EXIT_FAILURE, EXIT_USAGE, CheckpointError, UsageError
from paretune.model import checkpoint
from paretune.model.tokenizer import TextStream, Tokenizer

POCKET = Tokenizer(checkpoint.resolve("pocket"))
WEIRD = [
    "",
    " ",
    "\n\n\n   \t x  ",
    "naïve café, ﬁne; Ω≈ç√∫˜µ≤",
    unicodedata.normalize("NFD", "naïve café Ångström"),
    "日本語のテキスト、한국어 텍스트，中文文本",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭",
    "עברית العربية हिन्दी ไทย",
    "\u202eright to left\u202c zero\u200bwidth\ufeff",
    "\x00\x01\x7f\x80\x9f control",
    "a\u0301\u0301\u0301\u0301 z\u0489",
    "\ufffd replacement \ufffd\ufffd",
    "don't they'll we've I'm it's you'd we're DON'T",
    "1234567890 3.14159 1,000,000 ½ ²",
    "𝕬𝖇𝖈 𐍈 \U0010ffff",
    "<|endoftext|> in the text <|endoftext|>",
]


def stream(tokenizer, ids):
    s = TextStream(tokenizer)
    return [s.push(i) for i in ids] + [s.flush()]


# ---- GPT-2's vocabulary ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def gpt2(data_dir):
    return Tokenizer(data_dir / "gpt2_tokenizer")


@pytest.fixture(scope="session")
def gpt2_hf(data_dir):
    return GPT2Tokenizer.from_pretrained(data_dir / "gpt2_tokenizer")


@pytest.mark.realdata
def test_wikitext_round_trips(data_dir, gpt2):
    raw = (data_dir / "wikitext2" / "wiki.test.raw").read_bytes().decode("utf-8")
    assert len(raw) > 1_200_000
    assert gpt2.decode(gpt2.encode(raw)) == raw


@pytest.mark.realdata
def test_wikitext_joined_has_the_published_count(data_dir, gpt2):
    raw = (data_dir / "wikitext2" / "wiki.test.raw").read_bytes().decode("utf-8")
    rows = ["" if not line.strip() else line + "\n" for line in raw.split("\n")[:-1]]
    assert len(gpt2.encode("\n\n".join(rows))) == 287_644


@pytest.mark.realdata
def test_equals_transformers(data_dir, gpt2, gpt2_hf):
    raw = (data_dir / "wikitext2" / "wiki.test.raw").read_bytes().decode("utf-8")
    for text in [raw[:5000], raw[600_000:603_000], *WEIRD]:
        ids = gpt2.encode(text)
        assert ids == gpt2_hf(text).input_ids
        assert gpt2.decode(ids, skip_special_tokens=False) == text
        assert text.endswith("\ufffd") or stream(gpt2, ids)[-1] == ""  # whole text: nothing is held back
        assert "".join(stream(gpt2, ids)) == gpt2.decode(ids)


@pytest.mark.realdata
def test_gpt2_special_token(gpt2):
    assert gpt2.vocab_size == 50257
    assert gpt2.token_id("<|endoftext|>") == 50256
    assert gpt2.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert gpt2.decode([64, 50256, 65]) == "ab"
    assert gpt2.decode([64, 50256, 65], skip_special_tokens=False) == "a<|endoftext|>b"
    assert gpt2.token_id("no such token") is None


# ---- a Llama tokenizer ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def story(data_dir):
    return Tokenizer(data_dir / "tinystories_656k")


@pytest.mark.realdata
def test_llama_adds_its_first_token_when_asked(data_dir, story):
    text = "Once upon a time"
    assert story.encode(text)[0] == 1
    assert story.encode(text, special_tokens=False) == story.encode(text)[1:]
    assert story.encode(text) == AutoTokenizer.from_pretrained(data_dir / "tinystories_656k")(text).input_ids


@pytest.mark.realdata
def test_llama_special_tokens_are_not_text(data_dir, story):
    """This file marks its special tokens `normalized`, and they must vanish all the same."""
    hf = AutoTokenizer.from_pretrained(data_dir / "tinystories_656k")
    ids = [*story.encode("Once upon a time"), 2]
    assert story.decode(ids) == "Once upon a time" == hf.decode(ids, skip_special_tokens=True)
    assert "<|start_story|>" in story.decode(ids, skip_special_tokens=False)
    assert "<|end_story|>" in story.decode(ids, skip_special_tokens=False)
    assert "".join(stream(story, ids)) == "Once upon a time"


@pytest.mark.realdata
def test_llama_stream_keeps_the_space_after_a_special_token(story):
    ids = [*story.encode("A red cat", False), 2, *story.encode("big dogs run", False)]
    assert "".join(stream(story, ids)) == story.decode(ids)
    assert " big dogs run" in story.decode(ids)


@pytest.mark.realdata
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_llama_stream_equals_decode(story, text):
    ids = story.encode(text)
    assert "".join(stream(story, ids)) == story.decode(ids)
    assert "".join(in_groups(story, ids, [1, 3, 2, 5])) == story.decode(ids)


# ---- the embedded tokenizer -----------------------------------------------------------------------


@pytest.mark.parametrize("text", WEIRD)
def test_pocket_round_trips(text):
    ids = POCKET.encode(text)
    assert POCKET.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < POCKET.vocab_size == 8192 for i in ids)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
@example("👩‍👩‍👧‍👦" * 5)
@example("\ufffd")
@example("a\ufffdb\ufffd")
@example("日本語" * 10)
def test_stream_equals_decode(text):
    ids = POCKET.encode(text)
    pieces = stream(POCKET, ids)
    assert "".join(pieces) == POCKET.decode(ids)
    if "<|endoftext|>" not in text:
        assert POCKET.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)  # never half a character


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 8191) | st.integers(0, 260), max_size=40))
def test_stream_equals_decode_of_any_ids(ids):
    """A model may emit bytes that are no text."""
    assert "".join(stream(POCKET, ids)) == POCKET.decode(ids)


def in_groups(tokenizer, ids, sizes):
    """What a stream gives of tokens that come several at a time."""
    s, out, at = TextStream(tokenizer), [], 0
    for size in sizes:
        out.append(s.push(*ids[at : at + size]))
        at += size
    return [*out, s.push(*ids[at:]), s.flush()]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60).map(POCKET.encode) | st.lists(st.integers(0, 8191), max_size=40), st.data())
def test_groups_of_tokens_give_the_same_text(ids, data):
    sizes = data.draw(st.lists(st.integers(0, 7), max_size=12))
    assert "".join(in_groups(POCKET, ids, sizes)) == POCKET.decode(ids)


def test_stream_holds_back_half_a_character():
    ids = POCKET.encode("x日")
    pieces = stream(POCKET, ids)
    assert len(ids) >= 3 and pieces[0] == "x"
    assert [p for p in pieces[1:] if p] == ["日"]
    cut = stream(POCKET, ids[:-1])  # the stream ends inside it: given out at last as what it is
    assert cut[-1] == "\ufffd" and "".join(cut) == POCKET.decode(ids[:-1])


def test_stream_costs_the_same_at_any_length(monkeypatch):
    """Each push decodes a short window, not the text so far."""
    longest = 0
    whole = POCKET.decode

    def watched(ids, *rest):
        nonlocal longest
        longest = max(longest, len(ids))
        return whole(ids, *rest)

    ids = POCKET.encode("The quick brown fox jumps over the lazy dog. " * 50)
    monkeypatch.setattr(POCKET, "decode", watched)
    stream(POCKET, ids)
    assert len(ids) > 400 and 1 <= longest <= 4


# ---- damaged --------------------------------------------------------------------------------------


def refused(folder, *words):
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(folder)
    error = caught.value
    text = str(error)
    assert error.exit_code == EXIT_FAILURE and error.cure and "\n" not in text
    for word in (str(folder), *words):
        assert word in text


def test_no_tokenizer(tmp_path):
    refused(tmp_path, "tokenizer.json", "vocab.json")


def test_vocabulary_without_merges(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    refused(tmp_path, "merges.txt")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "Magic"}}', "\udcff"])
def test_damaged_tokenizer_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(tmp_path, "damaged")


def test_truncated_tokenizer_json(tmp_path, pocket_folder):
    text = (pocket_folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(text[: len(text) // 2])
    refused(tmp_path, "damaged")


@pytest.mark.parametrize(
    ("vocab", "merges"), [("{", "a b\n"), ('{"a": 0}', "a b\n"), ('["a"]', ""), ('{"a": "x"}', "")]
)
def test_damaged_vocabulary(tmp_path, vocab, merges):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    refused(tmp_path, "damaged")


def test_damaged_tokenizer_config(tmp_path, pocket_folder):
    shutil.copy(pocket_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused(tmp_path, "tokenizer_config.json", "not valid JSON")


# ---- chat -----------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}\n    {% if loop.first and m['role'] != 'system' %}\n"
    "{{ bos_token }}<|im_start|>system\nYou help.<|im_end|>\n    {% endif %}\n"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NAMESPACE = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}:{{ m.content }}|{% endfor %}{{ unk_token }}"
)
BREAK = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }};{% endfor %}"
TOJSON = "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}"
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
DATE = "{% if strftime_now is defined %}{{ strftime_now('%Y') | length }}{% else %}none{% endif %}"
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "namespace": NAMESPACE, "break": BREAK}
TEMPLATES |= {"tojson": TOJSON, "generation": GENERATION, "date": DATE}
CONVERSATION = [
    {"role": "user", "content": " Who's <there> & why? \n"},
    {"role": "assistant", "content": "Caf\u00e9 \U0001f44d"},
    {"role": "user", "content": "日本"},
]


@pytest.fixture
def chatty(tmp_path, pocket_folder):
    """`chatty(template, **settings)`: a folder with pocket's tokenizer and that chat template."""

    def make(template, **settings):
        shutil.copy(pocket_folder / "tokenizer.json", tmp_path)
        config = json.loads((pocket_folder / "tokenizer_config.json").read_text()) | settings
        if template is not None:
            config["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def expected_chat(folder, messages=CONVERSATION):
    hf = AutoTokenizer.from_pretrained(folder)
    return hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, NAMESPACE, BREAK, TOJSON, GENERATION, DATE], ids=range(7))
def test_chat_equals_transformers(chatty, template):
    folder = chatty(template)
    got = Tokenizer(folder).chat(CONVERSATION)
    assert got and got == expected_chat(folder)


def test_chat_template_in_its_own_file_wins(chatty):
    folder = chatty("wrong")
    (folder / "chat_template.jinja").write_text(CHATML)
    got = Tokenizer(folder).chat(CONVERSATION)
    assert "im_start" in got and got == expected_chat(folder)


def test_default_of_several_named_templates(chatty):
    folder = chatty([{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": LLAMA2}])
    assert Tokenizer(folder).chat(CONVERSATION) == expected_chat(folder)


def test_special_token_as_an_object(chatty):
    token = {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "special": True}
    folder = chatty("{{ bos_token }}{{ messages[0].content }}", bos_token=token)
    assert Tokenizer(folder).chat([{"role": "user", "content": "hi"}]) == "<|endoftext|>hi"


def chat_refused(folder, messages=CONVERSATION):
    with pytest.raises(UsageError) as caught:
        Tokenizer(folder).chat(messages)
    text = str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE and "--chat" in caught.value.cure and "\n" not in text
    return text


@pytest.mark.parametrize("template", [None, "", [], [{"name": "tool_use", "template": "x"}]], ids=repr)
def test_no_chat_template(chatty, template):
    assert "no chat template" in chat_refused(chatty(template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__init__.__globals__['__builtins__'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ ''['__class__'].__mro__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_sandbox(chatty, template):
    """A downloaded template may not reach Python through attributes, nor change what it is given."""
    messages = [{"role": "user", "content": "hi"}]
    text = chat_refused(chatty(template), messages)
    assert "template" in text
    assert messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ messages.__class__ }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}",
    ],
)
def test_sandbox_shows_nothing(chatty, template):
    """Printing one forbidden attribute and going no further gives no text, as in transformers."""
    assert Tokenizer(chatty(template)).chat(CONVERSATION) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages[0].content",
        "{{ raise_exception('only system') }}",
        "{{ messages[99].content.x }}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include 'other' %}",
        "{{ nothing | no_such_filter }}",
        "{{ no_such_function() }}",
    ],
)
def test_template_that_fails(chatty, template):
    chat_refused(chatty(template))


def test_refusal_gives_the_templates_own_reason(chatty):
    text = chat_refused(chatty(LLAMA2), [{"role": "assistant", "content": "me first"}])
    assert "roles must alternate" in text


@pytest.mark.parametrize("template", [3, {"a": "b"}, [{"name": "default"}], [3]], ids=repr)
def test_chat_template_of_the_wrong_type(chatty, template):
    chat_refused(chatty(template))
