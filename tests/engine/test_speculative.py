"""Speculation: whatever proposes, the text is that of plain decoding, token for token, greedy and sampled."""

from __future__ import annotations

import random

import pytest
import torch

from paretune import native_build
from paretune.engine.decode.control import StepCosts, Survival
from paretune.engine.decode.drafts.base import Draft, Proposal
from paretune.engine.decode.speculative import Counts, Speculative
from paretune.engine.generate import generate
from paretune.engine.request import Request
from paretune.engine.runners.compiled import CompileRunner
from paretune.engine.runners.eager import EagerRunner
from paretune.engine.runners.native import NativeRunner
from paretune.engine.sampling import SamplingOptions
from paretune.engine.scheduler import Scheduler
from paretune.engine.speculation import Speculator
from paretune.errors import UsageError
from paretune.model import checkpoint
from paretune.recipe import preset
from paretune.transforms.base import Context
from paretune.transforms.mechanism import Mechanism

needs_compiler = pytest.mark.skipif(native_build.unavailable_reason() is not None, reason="no C++ compiler")
FREE = StepCosts({1: 1.0, 16: 1.0})  # a step of 16 tokens costs one of 1: always worth it
NEW = 24
SAMPLED = SamplingOptions(1.0, seed=7)
WAYS = {
    "greedy": SamplingOptions(),
    "sampled": SAMPLED,
    "top_k": SamplingOptions(0.8, top_k=20, top_p=0.9, seed=3),
    "penalty": SamplingOptions(1.0, min_p=0.01, repetition_penalty=1.3, seed=4),
    "greedy_penalty": SamplingOptions(repetition_penalty=1.2),
}


class Knowing(Draft):
    """Knows the text that comes, and says something else with a chance of its own for each row."""

    name = "knowing"
    is_free = True

    def __init__(self, texts, wrong):
        self.texts, self.wrong = texts, wrong
        self.random, self.rows, self.sizes = random.Random(0), {}, []

    def enter(self, row, request):
        self.rows[row] = request

    def leave(self, row, request):
        assert self.rows.pop(row) is request

    def propose(self, most):
        found = {}
        for row, n in most.items():
            request = self.rows[row]
            come = self.texts[tuple(request.prompt)][len(request.tokens) :][: self.random.randint(0, n)]
            wrong = self.wrong[row % len(self.wrong)]
            found[row] = Proposal([t + 1 if self.random.random() < wrong else t for t in come])
            self.sizes.append(len(come))
        return found


class Fixed:
    """In the place of a speculator: a draft that is given."""

    def __init__(self, draft, most=6):
        self.draft, self.most, self.counts = draft, most, Counts()

    def ready(self, n_rows): ...

    def decode(self, runner, cache):
        return Speculative(runner, cache, self.draft, FREE, Survival(), self.counts, most=self.most, adapts=False)


def prompts_of(lengths, top=131):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(2, top, (n,), generator=g).tolist() for n in lengths]


def run(runner, prompts, sampling, n_rows, capacity, speculator=None, **options):
    loop = Scheduler(runner, n_rows, capacity, speculator=speculator, chunk=options.pop("chunk", None))
    requests = [Request(p, NEW, sampling, **options) for p in prompts]
    for request in requests:
        loop.add(request)
    loop.run()
    return [r.tokens for r in requests], loop


@pytest.fixture(scope="module", params=["eager", pytest.param("native", marks=needs_compiler)])
def runner(request, tiny_gpt2_folder):
    kind = {"eager": EagerRunner, "native": NativeRunner}[request.param]
    return kind(checkpoint.load(tiny_gpt2_folder))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_rows", [1, 3])
def test_the_text_is_that_of_plain_decoding(runner, way, n_rows):
    """Never, always and sometimes right, side by side; more requests than rows, prompts in pieces."""
    prompts = prompts_of((5, 20, 9, 14, 3))
    expected, _ = run(runner, prompts, WAYS[way], n_rows, 48, chunk=7)
    draft = Knowing(dict(zip(map(tuple, prompts), expected, strict=True)), wrong=(0.0, 1.0, 0.3))
    fixed = Fixed(draft)
    got, loop = run(runner, prompts, WAYS[way], n_rows, 48, fixed, chunk=7)
    assert got == expected
    assert loop.decode.off_reason is None and draft.rows == {}
    counts = fixed.counts
    assert counts.n_tokens == 5 * (NEW - 1)  # the first comes with the prompt
    assert 0 < counts.n_accepted < counts.n_proposed or n_rows == 1
    assert counts.n_row_steps == counts.n_tokens - counts.n_accepted


def test_all_that_is_right_is_taken(runner):
    """Seven tokens a step: the target adds its own to the six that it accepts."""
    prompts = prompts_of((5,))
    expected, _ = run(runner, prompts, SAMPLED, 1, 48)

    class Whole(Knowing):
        def propose(self, most):
            return {
                row: Proposal(self.texts[tuple(self.rows[row].prompt)][len(self.rows[row].tokens) :][:n])
                for row, n in most.items()
            }

    fixed = Fixed(Whole({tuple(prompts[0]): expected[0]}, ()))
    got, _ = run(runner, prompts, SAMPLED, 1, 48, fixed)
    assert got == expected
    assert (fixed.counts.n_steps, fixed.counts.tokens_per_step) == (4, 23 / 4)


CACHES = [
    "native",
    "native+bf16",
    "native+int8+kv8",
    "native+int4+kv4",
    "native+kv(bf16)",
    "eager+kv8",
    "eager+kv4",
]


@needs_compiler
@pytest.mark.parametrize("config", CACHES)
@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_caches_are_rolled_back(config, kind, tiny_factory):
    """Rings and caches of few bits; what is rolled back leaves nothing behind."""
    _, _, folder = tiny_factory("gpt2", n_embd=64, n_positions=704)
    model = checkpoint.load(folder)
    lengths, capacity = (9, 31), 64
    if kind == "ring":
        model, lengths, capacity = Mechanism(pattern="prefix:3+window:40").apply(model, Context()), (530, 500), 600
    recipe = preset(config)
    made = recipe.runner(recipe.apply(model, Context()))
    prompts = prompts_of(lengths)
    expected, plain = run(made, prompts, SAMPLED, 2, capacity)
    assert bool(plain.cache.ring) == (kind == "ring")
    fixed = Fixed(Knowing(dict(zip(map(tuple, prompts), expected, strict=True)), wrong=(0.2, 0.6)))
    got, _ = run(made, prompts, SAMPLED, 2, capacity, fixed)
    assert got == expected and 0 < fixed.counts.n_accepted < fixed.counts.n_proposed


@needs_compiler
@pytest.mark.parametrize("config", CACHES[:4])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_wide_steps_have_the_bits_of_single_ones(config, family, tiny_factory):
    """Native logits of K tokens at once and one by one, alone and beside other rows, after a rollback too."""
    _, _, folder = tiny_factory(family)
    recipe = preset(config)
    made = recipe.runner(recipe.apply(checkpoint.load(folder), Context()))
    text = torch.tensor(prompts_of((40, 40)))
    cache = made.new_cache(2, 64)
    made.forward(text[:, :20], cache, "last")
    single = torch.cat([made.forward(text[:, i : i + 1], cache, "all") for i in range(20, 40)], dim=1)
    for width in (2, 3, 5, 8, 16):
        cache.truncate_([20, 20])
        assert torch.equal(made.forward(text[:, 20 : 20 + width], cache, "all"), single[:, :width])
        cache.truncate_([21, 20])
        cache.stage_([width, 1])
        wide = made.forward(torch.cat([text[:1, 21 : 21 + width], text[1:, 20 : 20 + width]]), cache, "all")
        assert torch.equal(wide[0], single[0, 1 : 1 + width]) and torch.equal(wide[1, 0], single[1, 0])


@pytest.mark.parametrize("eos_run", [1, 2])
def test_an_end_token_in_an_accepted_run(runner, eos_run):
    prompts = prompts_of((5, 9))
    free, _ = run(runner, prompts, SAMPLED, 2, 48)
    eos = tuple({text[8] for text in free})
    expected, _ = run(runner, prompts, SAMPLED, 2, 48, eos=eos, eos_run=eos_run)
    texts = dict(zip(map(tuple, prompts), free, strict=True))  # it proposes beyond the end
    got, _ = run(runner, prompts, SAMPLED, 2, 48, Fixed(Knowing(texts, (0.0, 0.2))), eos=eos, eos_run=eos_run)
    assert got == expected and (eos_run == 2 or all(len(text) <= 9 for text in got))


def test_stop_strings_and_streaming(pocket_folder):
    """A stop string inside an accepted run ends the text there; streamed pieces add up to it."""
    from paretune.model.tokenizer import Tokenizer

    tokenizer, made = Tokenizer(pocket_folder), EagerRunner(checkpoint.load(pocket_folder))
    prompts = [tokenizer.encode(t) for t in ("The old man and the old man and the", "One day the dog")]
    plain = generate(made, prompts, 30, tokenizer=tokenizer, ignore_eos=True).generations
    stop = [plain[0].text[20:24]]
    texts = dict(zip(map(tuple, prompts), [g.tokens for g in plain], strict=True))
    pieces = {0: "", 1: ""}

    def show(row, piece):
        pieces[row] += piece

    options = {"tokenizer": tokenizer, "stop": stop, "ignore_eos": True}
    expected = generate(made, prompts, 30, **options).generations
    got = generate(made, prompts, 30, on_text=show, speculator=Fixed(Knowing(texts, (0.0, 0.3))), **options).generations
    assert [(g.text, g.tokens, g.finish_reason) for g in got] == [(g.text, g.tokens, g.finish_reason) for g in expected]
    assert [pieces[0], pieces[1]] == [g.text for g in got] and got[0].finish_reason == "stop"


def test_a_text_up_to_the_end_of_the_context(runner):
    """No token is proposed for which there is no position."""
    prompts = prompts_of((40, 30))
    expected, _ = run(runner, prompts, SAMPLED, 2, 64)
    draft = Knowing(dict(zip(map(tuple, prompts), expected, strict=True)), (0.1,))
    got, _ = run(runner, prompts, SAMPLED, 2, 64, Fixed(draft))
    assert got == expected and max(draft.sizes) > 1


@pytest.mark.parametrize("where", ["enter", "propose", "settle"])
def test_a_draft_that_fails_costs_nothing_but_speed(runner, where):
    class Failing(Knowing):
        n = 0

        def fail(self, name):
            self.n += name == where
            if self.n == 3 - 2 * (where == "enter"):
                raise RuntimeError("it broke\nfor good")

        def enter(self, row, request):
            super().enter(row, request)
            self.fail("enter")

        def propose(self, most):
            self.fail("propose")
            return super().propose(most)

        def settle(self):
            self.fail("settle")

    prompts = prompts_of((5, 9))
    expected, _ = run(runner, prompts, SAMPLED, 2, 48)
    draft = Failing(dict(zip(map(tuple, prompts), expected, strict=True)), (0.3,))
    got, loop = run(runner, prompts, SAMPLED, 2, 48, Fixed(draft))
    assert got == expected
    assert loop.decode.off_reason == "the draft failed (RuntimeError: it broke)"


def test_going_back_forgets_what_came(runner):
    """A measured slice that is taken again may not be proposed from what was read the first time."""
    fixed = Speculator("lookup", runner, adapts=False, given=FREE)
    loop, request = Scheduler(runner, 1, 48, keeps_done=True, speculator=fixed), Request([3, 4, 5], 20)
    loop.add(request)
    loop.run()
    first, counts = list(request.tokens), fixed.counts.n_accepted
    loop.rewind(1)
    loop.run()
    assert request.tokens == first and fixed.counts.n_accepted == 2 * counts


# --- drafts as they are


DRAFTS = ["lookup", "suffix", "suffix=earlier", "auto", "exit=1"]


@pytest.mark.parametrize("text", DRAFTS)
@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_every_draft_keeps_the_text(runner, text, way):
    prompts = prompts_of((5, 20, 9))
    prompts[1] = prompts[1][:5] * 4
    expected = [g.tokens for g in generate(runner, prompts, NEW, WAYS[way], ignore_eos=True).generations]
    speculator = Speculator(text, runner, adapts=False, given=FREE)
    for _ in range(2):  # again, with what was learned
        got = generate(runner, prompts, NEW, WAYS[way], ignore_eos=True, speculator=speculator)
        assert [g.tokens for g in got.generations] == expected
    report = speculator.report()
    assert report["n_proposed"] > 0 and report["off"] is None
    assert 0 <= report["acceptance"] <= 1 <= report["tokens_per_step"]
    if text == "suffix=earlier":  # the second time the whole text is known
        assert report["tokens_per_step"] > 1.5 and report["ran"]["earlier_nodes"] > 100


@needs_compiler
@pytest.mark.parametrize("text", ["self=int4", "self=int8", "draft={folder}"])
def test_drafts_with_weights_of_their_own(tiny_gpt2_folder, text):
    made = NativeRunner(checkpoint.load(tiny_gpt2_folder))
    prompts = prompts_of((5, 20, 9))
    expected = [g.tokens for g in generate(made, prompts, NEW, SAMPLED, ignore_eos=True).generations]
    speculator = Speculator(
        text.format(folder=tiny_gpt2_folder), made, tiny_gpt2_folder, adapts=False, given=FREE, most=4
    )
    got = generate(made, prompts, NEW, SAMPLED, ignore_eos=True, speculator=speculator)
    assert [g.tokens for g in got.generations] == expected and speculator.report()["off"] is None
    greedy = generate(made, prompts, NEW, ignore_eos=True, speculator=speculator)
    assert [g.tokens for g in greedy.generations] == [
        g.tokens for g in generate(made, prompts, NEW, ignore_eos=True).generations
    ]


def test_the_model_itself_as_its_draft_is_always_right(tiny_gpt2_folder):
    """The caches of draft and target are rolled back together: one wrong position, and it would not be."""
    made = EagerRunner(checkpoint.load(tiny_gpt2_folder))
    speculator = Speculator(f"draft={tiny_gpt2_folder}", made, tiny_gpt2_folder, adapts=False, given=FREE, most=3)
    generate(made, prompts_of((5,)), NEW, ignore_eos=True, speculator=speculator)
    assert speculator.counts.acceptance == 1.0 and speculator.counts.n_steps == 6
    generate(made, prompts_of((5,)), NEW, SamplingOptions(0.7, seed=1), ignore_eos=True, speculator=speculator)
    assert speculator.counts.acceptance < 1.0


def test_a_draft_with_a_smaller_context_stops_there(tiny_factory, tiny_gpt2_folder):
    _, _, small = tiny_factory("gpt2", n_positions=24)
    made = EagerRunner(checkpoint.load(tiny_gpt2_folder))
    speculator = Speculator(f"draft={small}", made, adapts=False, given=FREE, most=3)
    prompts = prompts_of((10, 20, 30))
    expected = [g.tokens for g in generate(made, prompts, NEW, SAMPLED, ignore_eos=True).generations]
    got = generate(made, prompts, NEW, SAMPLED, ignore_eos=True, speculator=speculator)
    assert [g.tokens for g in got.generations] == expected
    assert speculator.counts.n_proposed > 0 and speculator.report()["off"] is None


# --- what is refused, and what is off


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lokup", "unknown draft 'lokup'. Did you mean 'lookup'"),
        ("lookup=3", "speculation by 'lookup' takes nothing after ="),
        ("suffix=later", "takes earlier, not 'later'"),
        ("draft", "speculation by 'draft' needs MODEL"),
        ("exit=2", "after 1 to 1 of 2 layers"),
        ("exit=x", "after 1 to 1 of 2 layers"),
        ("self=int4", "folder is not known"),
        ("draft=/nowhere", "/nowhere"),
        ("self=nonsense", "folder is not known"),
    ],
)
def test_what_cannot_propose_is_refused(tiny_gpt2_folder, text, said):
    with pytest.raises(UsageError, match=said) as failure:
        Speculator(text, EagerRunner(checkpoint.load(tiny_gpt2_folder)), given=FREE)
    assert "\n" not in str(failure.value)


def test_another_vocabulary_is_refused(tiny_gpt2_folder, tiny_llama_folder):
    with pytest.raises(UsageError, match="knows 137 tokens, the model 131"):
        Speculator(f"draft={tiny_llama_folder}", EagerRunner(checkpoint.load(tiny_gpt2_folder)), tiny_gpt2_folder)


@pytest.mark.parametrize(("most", "said"), [(0, "It has to be 1 or more"), (63, "has room for 62")])
def test_more_tokens_than_there_is_room_for(tiny_gpt2_folder, most, said):
    with pytest.raises(UsageError, match=said):
        Speculator("lookup", EagerRunner(checkpoint.load(tiny_gpt2_folder)), most=most)


def test_compiled_batches_are_decoded_plainly(tiny_gpt2_folder):
    """Nothing is compiled here: the reason is known before."""
    speculator = Speculator("lookup", CompileRunner(checkpoint.load(tiny_gpt2_folder)), given=FREE)
    assert speculator.why_off(1) is None
    assert "takes all 2 rows of a batch at one width" in speculator.why_off(2)
    assert not isinstance(speculator.decode(speculator.runner, speculator.runner.new_cache(2, 32)), Speculative)
    assert speculator.summary().startswith("speculation lookup: off, the compile runner")


def test_one_new_token_needs_no_proposal(runner):
    speculator = Speculator("lookup", runner, given=FREE)
    assert len(generate(runner, [[5, 6]], 1, speculator=speculator).generations[0].tokens) == 1
    assert speculator.summary() == "speculation lookup: no step was taken"
