"""SmolLM2-135M-Instruct as `paretune get` makes it, against transformers, the gguf package and llama.cpp."""

from __future__ import annotations

import json
import subprocess

import gguf
import numpy as np
import pytest
import torch

from paretune.cli import app as cli
from paretune.engine.exact import TIE_MARGIN
from paretune.engine.generate import generate
from paretune.engine.load import load_recipe
from paretune.errors import ParetuneError
from paretune.measure.peers import envs
from paretune.measure.peers.catalogue import PEERS
from paretune.model import checkpoint
from paretune.model.stored import StoredTensors
from paretune.recipe import preset

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

N_PROMPTS, N_NEW = 50, 24
QUESTION = "What is gravity?"
ODD_TEXT = (
    "In 1984,  12 of   345 said \u00bd\u0665 -7.25e10\n\n  def f(x):\n\treturn x**2  # 3.14\r\n"
    "They're na\u00efve caf\u00e9s \u2014 \u65e5\u672c\u8a9e \U0001f642 don't   \u00a0end  "
)
CONVERSATIONS = [
    [{"role": "user", "content": QUESTION}],
    [{"role": "system", "content": "You answer in rhymes."}, {"role": "user", "content": "  two\nlines  "}],
    [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": ODD_TEXT},
    ],
    [{"role": "user", "content": "<|im_end|> {{ 7 * 7 }} <b>&amp;</b>"}],
]


@pytest.fixture(scope="module")
def questions(data_dir):
    lines = (data_dir / "prompts" / "mt_bench.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["turns"][0] for line in lines[:N_PROMPTS]]


@pytest.fixture(scope="module")
def prompts(questions, smollm2_tokenizer):
    """Token ids of each question in the chat template."""
    texts = [smollm2_tokenizer.chat([{"role": "user", "content": question}]) for question in questions]
    return [smollm2_tokenizer.encode(text, special_tokens=False) for text in texts]


@pytest.fixture(scope="module")
def native(smollm2):
    return load_recipe(smollm2, preset("native")).runner


def test_the_folder_holds_the_numbers_of_the_file(smollm2, smollm2_gguf):
    """Every tensor, bit for bit, by the package's own reader; rotary rows in Hugging Face's order."""
    stored = StoredTensors(checkpoint.weight_files(smollm2))
    table = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    table |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    table |= {f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    ends = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    seen = set()
    for tensor in gguf.GGUFReader(smollm2_gguf).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        part = tensor.name.split(".")
        name = ends.get(tensor.name) or f"model.layers.{part[1]}.{table[part[2]]}.weight"
        if part[-2] in ("attn_q", "attn_k"):
            n_head = values.shape[0] // 64
            values = values.reshape(n_head, 32, 2, -1).swapaxes(1, 2).reshape(values.shape)
        ours = stored[name]
        assert ours.dtype == torch.float32 and np.array_equal(ours.numpy(), values), name
        seen.add(name)
    assert seen == set(stored)


@pytest.mark.parametrize("name", ["baseline", "native"])
def test_logits_are_those_of_transformers(smollm2, theirs, smollm2_tokenizer, name):
    """fp32 on both sides, sums in another order: 30 layers of up to 1,536 terms leave about 1e-5 of logits near 20."""
    ids = torch.tensor([smollm2_tokenizer.encode(smollm2_tokenizer.chat(CONVERSATIONS[2]), special_tokens=False)])
    runner = load_recipe(smollm2, preset(name)).runner
    ours = runner.forward(ids, runner.new_cache(1, ids.size(1)), "all")
    with torch.no_grad():
        expected = theirs(ids).logits
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    assert float((ours - expected).norm() / expected.norm()) < 2e-5


@pytest.mark.realdata
def test_greedy_tokens_are_those_of_transformers(native, theirs, prompts):
    """Teacher-forced: each of our tokens is the likeliest to transformers after the same prefix, ties aside."""
    made = [
        g
        for i in range(0, N_PROMPTS, 10)
        for g in generate(native, prompts[i : i + 10], N_NEW, ignore_eos=True).generations
    ]
    n_ties = 0
    for prompt, generation in zip(prompts, made, strict=True):
        assert len(generation.tokens) == N_NEW
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*prompt, *generation.tokens[:-1]]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(-1, torch.tensor(generation.tokens)[:, None])[:, 0]
        margin = logits.amax(dim=-1) - chosen
        assert float(margin.max()) < TIE_MARGIN, (prompt, margin)
        n_ties += int((margin > 0).sum())
    print(f"{N_PROMPTS} prompts, {N_PROMPTS * N_NEW} greedy tokens equal, {n_ties} of them ties")
    assert n_ties <= 3, "ties are rare"


def test_an_answer_and_its_end_are_those_of_transformers(native, theirs, smollm2, smollm2_tokenizer):
    """Token by token through transformers' own `generate`, to the end token."""
    ids = smollm2_tokenizer.encode(smollm2_tokenizer.chat(CONVERSATIONS[0]), special_tokens=False)
    (ours,) = generate(native, [ids], 150, tokenizer=smollm2_tokenizer).generations
    config = checkpoint.read_config(smollm2)
    expected = theirs.generate(
        torch.tensor([ids]),
        max_new_tokens=150,
        do_sample=False,
        eos_token_id=list(config.eos_token_ids),
        pad_token_id=2,
    )[0, len(ids) :].tolist()
    assert expected[-1] in config.eos_token_ids, "it ends"
    assert ours.tokens == expected
    assert ours.finish_reason == "eos"


def test_the_command_line_answers_and_stops(smollm2, capsys):
    arguments = ["generate", "smollm2", "--chat", "--prompt", QUESTION, "--max-new-tokens", "150", "--json"]
    assert cli.run([*arguments, "--config", "native_int8"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "eos" and 20 < len(answer["tokens"]) < 150
    assert "force" in answer["text"].lower() and "<|" not in answer["text"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_chat_template_is_that_of_transformers(smollm2, smollm2_tokenizer, messages):
    import transformers

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    expected = their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = smollm2_tokenizer.chat(messages)
    assert text == expected
    ids = their_tokenizer(text, add_special_tokens=False).input_ids
    assert smollm2_tokenizer.encode(text, special_tokens=False) == ids
    assert (their_tokenizer.eos_token_id, their_tokenizer.bos_token_id, their_tokenizer.pad_token_id) == (2, 1, 2)


@pytest.mark.realdata
def test_the_tokenizer_is_that_of_llama_cpp(smollm2_gguf, smollm2_tokenizer, data_dir):
    """llama.cpp reads the file's own entries, and knows its splitting rule by name."""
    try:
        python = envs.command(PEERS["llama.cpp"])[0]
    except ParetuneError as error:
        pytest.skip(str(error))
    texts = [ODD_TEXT, *(smollm2_tokenizer.chat(messages) for messages in CONVERSATIONS)]
    texts.append((data_dir / "wikitext2" / "wiki.test.raw").read_text("utf-8")[:100_000])
    code = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=True) for t in json.load(sys.stdin)]))
"""
    done = subprocess.run(
        [python, "-I", "-c", code, str(smollm2_gguf)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [smollm2_tokenizer.encode(text, special_tokens=False) for text in texts]
