"""Generation: the naive oracle's tokens, text that never leaks, impossible requests, times that add up."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paretune import clock
from paretune.engine.cache import KVCache
from paretune.engine.exact import TIE_MARGIN
from paretune.engine.generate import check_request, generate, naive_generate
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.sampling import Sampler, SamplingOptions
from paretune.engine.scheduler import FRAME_SEC
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.model.tokenizer import Tokenizer
from paretune.transforms.attention import Attention
from paretune.transforms.base import Context

FAMILIES = ("gpt2", "llama", "mistral")
LENGTHS = (3, 17, 9, 1)


def assert_same_tokens(got, expected, margins):
    """Equal, or first different where the oracle's two best logits are a tie."""
    assert len(got) == len(expected)
    for a, b, margin in zip(got, expected, margins, strict=True):
        if a != b:
            assert margin < TIE_MARGIN, f"{got} against {expected}, margin {margin}"
            return


def prompts_of(lengths=LENGTHS, vocab=131):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(2, vocab, (n,), generator=g).tolist() for n in lengths]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads of one tiny product wait for each other on a busy machine: seconds become a minute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runners(tiny_gpt2_folder, tiny_llama_folder, tiny_mistral_folder):
    folders = (tiny_gpt2_folder, tiny_llama_folder, tiny_mistral_folder)
    return {f: EagerRunner(checkpoint.load(folder)) for f, folder in zip(FAMILIES, folders, strict=True)}


@pytest.fixture(params=[(f, a) for f in FAMILIES for a in ("eager", "sdpa")], ids="-".join)
def runner(request, runners):
    family, form = request.param
    Attention(form).apply(runners[family].model, Context())
    return runners[family]


@pytest.fixture
def gpt2(runners):
    Attention("sdpa").apply(runners["gpt2"].model, Context())
    runner = EagerRunner(runners["gpt2"].model)
    runner.config = dataclasses.replace(runner.config, eos_token_ids=())
    return runner


def test_the_oracle_is_greedy_on_the_whole_sequence(tiny):
    """Against transformers: the oracle itself has to be right."""
    model, hf, _ = tiny("llama")
    prompt, n = prompts_of((9,))[0], 12
    tokens, margins = naive_generate(model, prompt, n)
    whole = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        top = hf(whole).logits[0, len(prompt) - 1 : -1].topk(2)
    assert tokens == top.indices[:, 0].tolist() and len(set(tokens)) > 1
    gaps = (top.values[:, 0] - top.values[:, 1]).tolist()
    assert margins == pytest.approx(gaps, abs=1e-4) and min(margins) >= 0
    # A guess changes no answer: right, wrong from the third token on, wrong at once, too long.
    for guess in (tokens, tokens[:2] + [t + 1 for t in tokens[2:]], [tokens[0] + 1], [*tokens, 5]):
        again, margins_again = naive_generate(model, prompt, n, guess)
        assert again == tokens and margins_again == pytest.approx(margins, abs=1e-4)


def test_alone_equals_the_oracle(runner):
    seen = set()
    for prompt in prompts_of():
        result = generate(runner, [prompt], 20, ignore_eos=True)
        seen |= set(result.generations[0].tokens)
        assert_same_tokens(result.generations[0].tokens, *naive_generate(runner.model, prompt, 20))
        assert result.generations[0].prompt == prompt
        assert result.generations[0].finish_reason == "length" and result.generations[0].text == ""
    assert len(seen) >= 5  # a model that always says the same would prove little


def test_a_batch_of_unequal_prompts_equals_the_oracle(runner):
    prompts = prompts_of()
    result = generate(runner, prompts, 20, ignore_eos=True)
    for generation, prompt in zip(result.generations, prompts, strict=True):
        assert_same_tokens(generation.tokens, *naive_generate(runner.model, prompt, 20))


def test_up_to_the_last_position(gpt2):
    prompt = prompts_of((60,))[0]
    tokens = generate(gpt2, [prompt], 4).generations[0].tokens
    assert_same_tokens(tokens, *naive_generate(gpt2.model, prompt, 4))


def test_eos_ends_a_row_and_not_the_others(gpt2):
    prompts = prompts_of()
    expected = [naive_generate(gpt2.model, p, 20)[0] for p in prompts]
    # A token that some rows say and others do not; which one depends on the processor's rounding.
    eos = next(t for row in expected for t in reversed(row) if not all(t in other for other in expected))
    gpt2.config = dataclasses.replace(gpt2.config, eos_token_ids=(eos, 10**6))
    result = generate(gpt2, prompts, 20)
    reasons = [g.finish_reason for g in result.generations]
    for generation, tokens in zip(result.generations, expected, strict=True):
        wanted = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        assert generation.tokens == wanted  # the end token is among them
        assert generation.finish_reason == ("eos" if eos in tokens else "length")
    assert set(reasons) == {"eos", "length"}
    ignored = generate(gpt2, prompts, 20, ignore_eos=True)
    assert [g.tokens for g in ignored.generations] == expected


def test_no_step_after_all_rows_are_done(gpt2):
    # What a random model says depends on the processor's rounding: look for a prompt with a token that comes late.
    for prompt in prompts_of((5,) * 100):
        tokens = naive_generate(gpt2.model, prompt, 20)[0]
        at = max(tokens.index(t) for t in tokens)
        if at >= 2:
            break
    assert at >= 2
    gpt2.config = dataclasses.replace(gpt2.config, eos_token_ids=(tokens[at],))
    assert generate(gpt2, [prompt], 20).timing.n_steps == at


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_a_row_draws_what_it_draws_alone(gpt2, options):
    prompts, s = prompts_of(), 40
    batch = generate(gpt2, prompts, 15, SamplingOptions(**options, seed=s)).generations
    alone = [generate(gpt2, [p], 15, SamplingOptions(**options, seed=s)).generations[0] for p in prompts]
    assert [g.tokens for g in batch] == [g.tokens for g in alone]
    turned = generate(gpt2, prompts[::-1], 15, SamplingOptions(**options, seed=s)).generations
    assert [g.tokens for g in turned] == [g.tokens for g in batch[::-1]]
    other = generate(gpt2, prompts[:1], 15, SamplingOptions(**options, seed=s + 9)).generations[0]
    assert other.tokens != batch[0].tokens


def test_rows_of_one_prompt_are_samples_of_it(gpt2):
    prompt, other = prompts_of((5, 7))[:2]
    rows = generate(gpt2, [prompt] * 4, 12, SamplingOptions(1.0, seed=0)).generations
    assert len({tuple(g.tokens) for g in rows}) == 4
    mixed = generate(gpt2, [other, prompt, other, prompt], 12, SamplingOptions(1.0, seed=0)).generations
    assert [g.tokens for g in mixed[1::2]] == [g.tokens for g in rows[:2]]


def test_repetition_penalty_reaches_greedy(gpt2):
    prompt = prompts_of((5,))[0]
    tokens = generate(gpt2, [prompt], 30, SamplingOptions(repetition_penalty=1e6)).generations[0].tokens
    assert len(set(tokens)) == 30 and not set(tokens) & set(prompt)


@pytest.mark.parametrize(
    ("prompts", "n", "said"),
    [
        ([[1, 2]], 0, "--max-new-tokens is 0"),
        ([[1, 2]], -3, "--max-new-tokens is -3"),
        ([], 5, "no prompt"),
        ([[]], 5, "empty"),
        ([[1], []], 5, "empty"),
        ([[1] * 65], 1, "65 tokens, the model's context is 64"),
        ([[1] * 64], 1, "64 prompt tokens and 1 new"),
        ([[1], [1] * 60], 5, "60 prompt tokens and 5 new"),
        ([[1, 131]], 5, "token 131, the model knows 131"),
        ([[-1, 1]], 5, "token -1"),
    ],
)
def test_impossible_requests(gpt2, prompts, n, said):
    with pytest.raises(UsageError, match=said) as failure:
        generate(gpt2, prompts, n)
    assert "\n" not in str(failure.value) and failure.value.cure
    with pytest.raises(UsageError, match=said):
        check_request(prompts, n, 64, 131)


def test_text_needs_a_tokenizer(gpt2):
    for options in ({"stop": ["x"]}, {"on_text": lambda i, piece: None}):
        with pytest.raises(UsageError, match="tokenizer"):
            generate(gpt2, [[1]], 2, **options)


class Scripted:
    """A runner that "predicts" given tokens, row by row, and costs a known time."""

    device = torch.device("cpu")

    def __init__(self, *rows, vocab_size=8192, eos=(), prefill_sec=0.0, decode_sec=0.0, fake=None):
        self.rows, self.vocab_size, self.costs, self.fake = rows, vocab_size, (prefill_sec, decode_sec), fake
        self.config = SimpleNamespace(longest=10**6, vocab_size=vocab_size, eos_token_ids=eos)
        self.step = 0

    chooses, same_bits_at_any_width = False, True

    def new_cache(self, batch_size, capacity):
        shape = {"n_layer": 0, "n_kv_head": 1, "head_dim": 1, "dtype": torch.float32}
        return KVCache(batch_size=batch_size, capacity=capacity, **shape)

    def forward(self, tokens, cache, logits):
        out = torch.zeros(len(self.rows), 1, self.vocab_size)
        for i, row in enumerate(self.rows):
            out[i, 0, row[min(self.step, len(row) - 1)]] = 1.0
        if self.fake is not None:
            self.fake.sleep(self.costs[0 if self.step == 0 else 1])
        self.step += 1
        return out


@pytest.fixture(scope="module")
def pocket(pocket_folder):
    return Tokenizer(pocket_folder)


def stream(tokenizer, ids, stop=(), eos=(), n=None, step_sec=FRAME_SEC):
    """The finished generation, and the pieces that were streamed; by default each token is late enough to be shown."""
    pieces = []
    with clock.use(clock.FakeClock()) as fake:
        result = generate(
            Scripted(ids, eos=eos, decode_sec=step_sec, fake=fake),
            [[1]],
            n or len(ids),
            tokenizer=tokenizer,
            stop=stop,
            on_text=lambda row, piece: pieces.append(piece),
        )
    return result.generations[0], pieces


STORY = "The cat sat on the mat, and the dog said: naïve café 東京 🙂🙃! Then it was over.\n\nThe end"


def test_streamed_text_is_the_text(pocket):
    ids = pocket.encode(STORY)
    generation, pieces = stream(pocket, ids)
    assert "".join(pieces) == generation.text == STORY == pocket.decode(ids)
    assert len(pieces) > 10 and all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert any(len(pocket.encode(c)) > 1 for c in "東🙂")  # some characters did span tokens


def test_fast_tokens_are_shown_together(pocket):
    """Five tokens a frame: the first at once, then five at a time, nothing lost."""
    text = "one two three four five six seven eight nine ten eleven twelve"
    ids = pocket.encode(text)
    generation, pieces = stream(pocket, ids, step_sec=FRAME_SEC / 4.5)  # no sum of steps is a frame to the bit
    assert "".join(pieces) == generation.text == text and generation.tokens == ids
    groups = [ids[:1], *(ids[i : i + 5] for i in range(1, len(ids), 5))]
    assert len(groups) >= 4 and pieces == [pocket.decode(group) for group in groups]


def test_text_alone_is_made_at_the_end(pocket, monkeypatch):
    """Nobody reads along and nothing can stop it: the tokens are decoded once."""
    calls = []
    whole = pocket.decode
    monkeypatch.setattr(pocket, "decode", lambda ids, *rest: calls.append(list(ids)) or whole(ids, *rest))
    ids = pocket.encode(STORY)
    result = generate(Scripted(ids), [[1]], len(ids), tokenizer=pocket)
    assert result.generations[0].text == STORY and calls.count(ids) == 1


@pytest.mark.parametrize("step_sec", [0.0, FRAME_SEC / 3, FRAME_SEC])
def test_a_stop_string_ends_generation_at_once(pocket, step_sec):
    """However fast tokens come: no step is run after the one that completes the stop string."""
    ids = pocket.encode(STORY)
    with clock.use(clock.FakeClock()) as fake:
        runner = Scripted(ids, decode_sec=step_sec, fake=fake)
        result = generate(runner, [[1]], len(ids), tokenizer=pocket, stop=["the dog"], on_text=lambda row, piece: None)
    tokens = result.generations[0].tokens
    assert runner.step == len(tokens) < len(ids)
    assert "the dog" in pocket.decode(tokens) and "the dog" not in pocket.decode(tokens[:-1])


@pytest.mark.parametrize(
    "stop",
    [
        "dog said: n",
        " mat, and the dog",
        "🙂🙃",
        "東京 🙂",
        ".\n\nThe",
        "e",
        "T",
        "The end",
        "naïve café 東京",
    ],
)
def test_stop_strings_over_several_tokens(pocket, stop):
    ids = pocket.encode(STORY)
    generation, pieces = stream(pocket, ids, [stop])
    assert generation.text == STORY[: STORY.index(stop)] == "".join(pieces)
    assert generation.finish_reason == "stop"
    # Generation ends with the token that completes the stop string.
    assert stop in pocket.decode(generation.tokens) and stop not in pocket.decode(generation.tokens[:-1])


def test_what_only_begins_like_a_stop_string_is_given_out(pocket):
    generation, pieces = stream(pocket, pocket.encode(STORY), ["The endless", "over?", "", "🙂🙃!!"])
    assert generation.text == "".join(pieces) == STORY and generation.finish_reason == "length"


words = st.lists(st.sampled_from(["a", "b", "ab", " ", "é", "🙂", "aab", "\n"]), min_size=1, max_size=25).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    words,
    st.lists(st.text("ab é🙂", min_size=1, max_size=5), max_size=3),
    st.sampled_from([0.0, FRAME_SEC / 3, FRAME_SEC]),
)
def test_no_part_of_a_stop_string_leaks(pocket, text, stops, step_sec):
    ids = pocket.encode(text)
    generation, shown = stream(pocket, ids, stops, step_sec=step_sec)
    assert "".join(shown) == generation.text
    assert text.startswith(generation.text)
    assert not any(s in generation.text for s in stops)
    if not any(s in text for s in stops):
        assert generation.text == text and generation.finish_reason == "length"
    else:
        assert generation.finish_reason == "stop"
        assert any(text[len(generation.text) :].startswith(s) for s in stops)
    if len(stops) == 1:
        assert generation.text == text.split(stops[0])[0]


def test_each_row_streams_its_own_text(pocket):
    texts = ["One two three four.", "A quite different and rather longer sentence.", "No"]
    rows = [[*pocket.encode(t), 0] for t in texts]
    shown = dict.fromkeys(range(3), "")

    def on_text(row, piece):
        shown[row] += piece

    result = generate(Scripted(*rows, eos=(0,)), [[1]] * 3, 40, tokenizer=pocket, stop=["rather"], on_text=on_text)
    assert [g.text for g in result.generations] == [texts[0], "A quite different and ", "No"]
    assert [g.finish_reason for g in result.generations] == ["eos", "stop", "eos"]
    assert list(shown.values()) == [g.text for g in result.generations]


def test_a_stop_string_before_half_a_character(pocket):
    """The text ends inside a character, so it all is held back; the stop string in it still counts."""
    smile = pocket.encode("🙂")
    ids = [*pocket.encode("so it goes"), smile[0]]
    assert len(smile) > 1 and pocket.decode(smile[:1]).endswith("\ufffd")
    generation, pieces = stream(pocket, ids)
    assert generation.text == "so it goes" + pocket.decode(smile[:1]) == "".join(pieces)
    # A token whose text is a stop string and the first byte of the next character: merges can make one.
    odd = SimpleNamespace(decode=lambda ids: "".join({5: "END\ufffd", 6: "go "}[i] for i in ids))
    generation, pieces = stream(odd, [6, 5], ["END"])
    assert generation.text == "go " == "".join(pieces) and generation.finish_reason == "stop"


def test_times_add_up(pocket):
    with clock.use(clock.FakeClock(100.0)) as fake:
        runner = Scripted([5, 6, 7], prefill_sec=2.0, decode_sec=0.25, fake=fake)
        result = generate(runner, [[1, 2, 3]], 11)
    timing = result.timing
    assert (timing.ttft_sec, timing.total_sec, timing.model_sec, timing.n_steps) == (2.0, 4.5, 4.5, 10)
    assert result.tpot_sec == 0.25
    assert timing.ttft_sec + timing.n_steps * result.tpot_sec == timing.total_sec


def test_time_outside_the_model_is_not_model_time(pocket):
    """Streaming costs 1 s a call here: it is in the total and not in the model's time."""
    with clock.use(clock.FakeClock()) as fake:
        runner = Scripted(pocket.encode("one two three four"), prefill_sec=2.0, decode_sec=0.5, fake=fake)
        calls = []

        def slow(row, piece):
            calls.append(piece)
            fake.sleep(1.0)

        result = generate(runner, [[1]], 4, tokenizer=pocket, on_text=slow)
    assert result.timing.model_sec == 2.0 + 3 * 0.5
    assert result.timing.total_sec == result.timing.model_sec + len(calls) and calls


def test_sampling_is_not_model_time(gpt2, monkeypatch):
    def slow_choose(sampler, logits, position):
        fake.sleep(3.0)
        return 1

    monkeypatch.setattr(Sampler, "choose", slow_choose)
    with clock.use(clock.FakeClock()) as fake:
        runner = Scripted([1], prefill_sec=1.0, decode_sec=1.0, fake=fake)
        timing = generate(runner, [[1]], 5, SamplingOptions(temperature=1.0, seed=0)).timing
    assert (timing.model_sec, timing.total_sec) == (5.0, 20.0)


def test_one_token_has_no_time_per_output_token(gpt2):
    result = generate(gpt2, [[1, 2]], 1)
    assert result.tpot_sec is None and len(result.generations[0].tokens) == 1
    assert 0 < result.timing.model_sec <= result.timing.ttft_sec <= result.timing.total_sec


def test_real_times_are_ordered(gpt2):
    timing = generate(gpt2, [[1, 2]], 6).timing
    assert 0 < timing.ttft_sec < timing.total_sec and timing.model_sec < timing.total_sec and timing.n_steps == 5


@pytest.mark.realdata
@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_the_real_small_llama(data_dir, form):
    folder = data_dir / "tinystories_656k"
    runner = EagerRunner(Attention(form).apply(checkpoint.load(folder, torch.float32), Context()))
    check_stories(runner, Tokenizer(folder))


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_pocket(pocket_folder, pocket, form):
    runner = EagerRunner(Attention(form).apply(checkpoint.load(pocket_folder, torch.float32), Context()))
    check_stories(runner, pocket)


def check_stories(runner, tokenizer):
    """Alone, as a batch and streamed, a trained model writes the oracle's tokens and sensible text."""
    texts = ["Once upon a time there was a little girl named Lily. She", "The", "One day, a big dog went to"]
    prompts, n = [tokenizer.encode(t) for t in texts], 16
    assert len({len(p) for p in prompts}) == 3
    expected = [naive_generate(runner.model, p, n) for p in prompts]
    shown = ["", "", ""]

    def on_text(row, piece):
        shown[row] += piece

    batch = generate(runner, prompts, n, tokenizer=tokenizer, ignore_eos=True, on_text=on_text)
    for i, generation in enumerate(batch.generations):
        assert_same_tokens(generation.tokens, *expected[i])
        alone = generate(runner, [prompts[i]], n, tokenizer=tokenizer, ignore_eos=True).generations[0]
        assert_same_tokens(alone.tokens, *expected[i])
        assert shown[i] == generation.text == tokenizer.decode(generation.tokens)
        assert len(generation.text.split()) > 5
