"""Generating: transformers' tokens, a cache that changes nothing, text in pieces."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.nn import functional as F

from fastseq import _C
from fastseq.models import GPT2, BPETokenizer, ByteTokenizer, GPT2Config, generate_text, load_tokenizer, process_logits

pytestmark = pytest.mark.usefixtures("one_thread")

# Weights so large that distributions are peaked and varied, and no two tokens nearly as probable.
CONFIG = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
                    bos_token_id=None, eos_token_id=7)  # fmt: skip


@pytest.fixture
def model():
    return GPT2(CONFIG).double().eval()


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


@pytest.fixture
def theirs(transformers, model):
    """The same weights as a GPT2LMHeadModel, and its `generate` with everything spelt out."""
    other = model.to_transformers()

    def generate(ids, mask=None, **options):
        mask = torch.ones_like(ids) if mask is None else mask
        eos = options.get("eos_token_id", 7)
        options = {
            "do_sample": False,
            "pad_token_id": eos if isinstance(eos, int) else eos[0],
            "top_k": None,
            **options,
        }
        return other.generate(ids, attention_mask=mask, max_new_tokens=24, **options)

    return generate


def prompts(B=3, L=10):
    return torch.randint(50, (B, L))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}], ids=str)
def test_greedy_tokens_are_those_of_transformers(model, theirs, options):
    for ids in (prompts(), prompts(), prompts(1)):
        assert torch.equal(model.generate(ids, 24, **options), theirs(ids, **options))


def test_rows_end_as_those_of_transformers(model, theirs):
    for ids in (prompts(), prompts(), prompts(1)):
        # Tokens of the first row's own continuation: there it ends, whatever the weights are.
        ends = model.generate(ids, 24, eos_token_id=())[0, 15:18].tolist()
        got = model.generate(ids, 24, eos_token_id=ends)
        assert torch.equal(got, theirs(ids, eos_token_id=ends))
        assert (got[0, 16:] == ends[0]).all()


@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beam_search_is_that_of_transformers(model, theirs, num_beams, early_stopping):
    ids = prompts()
    for length_penalty in (1.0, 0.0, 2.5, -1.0):
        for eos, penalty in ((7, 1.0), (list(range(9)), 1.0), ((), 1.5)):
            options = {"num_beams": num_beams, "early_stopping": early_stopping, "length_penalty": length_penalty}
            options["repetition_penalty"] = penalty
            got = model.generate(ids, 24, eos_token_id=eos, **options)
            want = theirs(ids, eos_token_id=eos or 99, **options)
            assert torch.equal(got, want), options


def test_beam_search_finds_what_greedy_does_not(model):
    ids = prompts(8)

    def log_p(out):
        return model(out)[:, 9:-1].log_softmax(-1).gather(2, out[:, 10:, None]).sum((1, 2))

    beams = model.generate(ids, 24, num_beams=6, eos_token_id=())
    greedy = model.generate(ids, 24, eos_token_id=())
    assert (log_p(beams) > log_p(greedy) + 1e-6).sum() >= 4


def test_sampled_tokens_are_those_of_transformers(model, theirs):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2}
    ids, runs = prompts(), set()
    for seed in range(5):
        torch.manual_seed(seed)
        got = model.generate(ids, 24, **options)
        torch.manual_seed(seed)
        assert torch.equal(got, theirs(ids, **options))
        runs.add(str(got.tolist()))
    assert len(runs) > 1


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("top_k", [None, 1, 6, 200])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 0.95, 1.0])
def test_processed_logits_are_those_of_transformers(transformers, penalty, temperature, top_k, top_p):
    logits, ids = 3 * torch.randn(4, 50), torch.randint(50, (4, 12))
    want = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    want = transformers.TemperatureLogitsWarper(temperature)(ids, want)
    if top_k:
        want = transformers.TopKLogitsWarper(top_k)(ids, want)
    if top_p:
        want = transformers.TopPLogitsWarper(top_p)(ids, want)
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    before = logits.clone()
    options = {"repetition_penalty": penalty, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert torch.equal(process_logits(logits, seen, **options), want)
    assert torch.equal(logits, before)


def test_the_cache_changes_nothing_and_the_kernels_run(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torch's scaled_dot_product_attention was called")

    ids = prompts()
    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    _C.reset_counters()
    got = model.generate(ids, 30, eos_token_id=())
    assert _C.counters() == {"attention_forward/float64": 2 * 30}
    for L in range(10, 40):
        assert torch.equal(model(got[:, :L])[:, -1].argmax(-1), got[:, L])

    caches, whole = model.new_caches(3, 4), model(got)
    for at, n in ((0, 10), (10, 1), (11, 5), (16, 1)):
        with torch.no_grad():
            step = model.decode(got[:, at : at + n], caches)
        torch.testing.assert_close(step, whole[:, at + n - 1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}, {"num_beams": 3, "repetition_penalty": 1.5}],
    ids=str,
)
def test_prompts_of_different_lengths_are_each_as_alone(model, theirs, options):
    lengths = torch.tensor([4, 12, 1, 9])
    ids = prompts(4, 12)
    got = model.generate(ids, 24, lengths=lengths, **options)
    left, mask = torch.full((4, 12), 7), torch.zeros(4, 12, dtype=torch.int64)
    for b, n in enumerate(lengths.tolist()):
        alone = model.generate(ids[b : b + 1, :n], 24, **options)
        assert torch.equal(got[b, : alone.shape[1]], alone[0])
        assert bool((got[b, alone.shape[1] :] == 7).all())
        left[b, 12 - n :], mask[b, 12 - n :] = ids[b, :n], 1
    if not options:  # padded on the left, as transformers has it
        want = theirs(left, mask)
        for b, n in enumerate(lengths.tolist()):
            assert torch.equal(got[b, n : n + want.shape[1] - 12], want[b, 12:])


def test_a_stream_is_generate_step_by_step(model):
    ids = prompts()
    for options in ({}, {"do_sample": True, "top_k": 5}, {"eos_token_id": list(range(15))}):
        torch.manual_seed(0)
        want = model.generate(ids, 24, **options)
        torch.manual_seed(0)
        steps = list(model.stream(ids, 24, **options))
        assert torch.equal(torch.stack(steps, 1), want[:, 10:])
    steps = model.stream(ids, 24)
    _C.reset_counters()
    next(steps)
    assert _C.counters() == {"attention_forward/float64": 2}  # no step more than what was asked for
    assert torch.is_grad_enabled()


def test_a_seed_repeats_and_leaves_torchs_alone(model):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, 24, do_sample=True, generator=generator).tolist()

    ids, state = prompts(), torch.get_rng_state()
    assert run(1) == run(1) != run(2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_stop_sequence_ends_a_row(model, num_beams):
    ids = prompts(1)
    free = model.generate(ids, 24, eos_token_id=(), num_beams=num_beams)
    stop = free[0, 15:17].tolist()
    if num_beams == 1:
        first = next(i for i in range(10, 34) if free[0, i : i + 2].tolist() == stop)
        got = model.generate(ids, 24, eos_token_id=(), stop_sequences=[[51], stop])
        assert torch.equal(got, free[:, : first + 2])
    else:
        got = model.generate(ids, 24, eos_token_id=(), stop_sequences=[stop], num_beams=num_beams)[0].tolist()
        assert got[-2:] == stop or len(got) == 34
        assert all(got[i : i + 2] != stop for i in range(10, len(got) - 2))


# ---- Text ------------------------------------------------------------------------------------------------------------


class Parrot:
    """A model that says what it is told, to see what becomes of its tokens."""

    def __init__(self, tokens, eos=None):
        self.tokens, self.config, self.lm_head = tokens, GPT2Config(eos_token_id=eos), torch.nn.Linear(1, 1)
        self.said = 0

    def stream(self, input_ids, max_new_tokens, **options):
        for token in self.tokens[:max_new_tokens]:
            self.said += 1
            yield torch.tensor([token])


def pieces(text, n=1000, **options):
    return list(generate_text(Parrot(list(text.encode())), ByteTokenizer(), "p", n, **options))


def test_pieces_have_whole_characters():
    text = "naïve 😀 €uro"
    assert pieces(text) == list(text)
    assert pieces("a€", n=2) == ["a", "\N{REPLACEMENT CHARACTER}"]
    broken = Parrot([65, 0xFF, 66])
    assert "".join(generate_text(broken, ByteTokenizer(), "p", 9)) == "A\N{REPLACEMENT CHARACTER}B"


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("ababac", ["abac"], "ab"),
        ("xx€y", ["€y"], "xx"),
        ("the end", ["d", "en"], "the "),
        ("the en", ["end"], "the en"),
        ("at once", ["at"], ""),
        ("aaa", ["b"], "aaa"),
    ],
)
def test_text_ends_before_a_stop_string_wherever_tokens_end(text, stop, want):
    got = pieces(text, stop=stop)
    assert "".join(got) == want and "" not in got[:-1]


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
    assert pieces("a<b<|c", stop=["<|end"]) == ["a", "<b", "<|c"]
    parrot = Parrot(list(b"one. two. three."))
    assert "".join(generate_text(parrot, ByteTokenizer(), "p", 99, stop=[". t"])) == "one" and parrot.said == 6


def test_text_ends_before_the_token_that_ends_it():
    assert "".join(generate_text(Parrot(list(b"ab\0cd"), eos=0), ByteTokenizer(), "p", 99)) == "ab"
    assert "".join(generate_text(Parrot(list(b"abc")), ByteTokenizer(), "p", 99, eos_token_id=[98])) == "a"


def test_text_of_a_model_by_stream_and_by_beams():
    config = GPT2Config(**asdict(CONFIG) | {"vocab_size": 256, "eos_token_id": None})
    model, ids = GPT2(config).eval(), torch.tensor([list("né".encode())])
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        torch.manual_seed(0)
        want = bytes(model.generate(ids, 30, **options)[0, 3:].tolist()).decode(errors="replace")
        torch.manual_seed(0)
        assert "".join(generate_text(model, ByteTokenizer(), "né", 30, **options)) == want


@pytest.fixture
def bpe(tmp_path):
    """A small byte-level BPE, as a folder of OpenAI's two files."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat and the hat, naïve 😀 " * 5], vocab_size=300, show_progress=False)
    made.save_model(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    return tmp_path


def test_bpe_from_each_of_its_files(bpe, transformers):
    tokenizer, text = load_tokenizer(bpe), "the hat 😀\n  naïve\t€"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text.encode()) and tokenizer.decode(ids) == text.encode()
    assert tokenizer.vocab_size == len(json.loads((bpe / "encoder.json").read_text()))
    assert b"".join(tokenizer.decode([i]) for i in ids) == text.encode()

    (bpe / "encoder.json").rename(bpe / "vocab.json")
    (bpe / "vocab.bpe").rename(bpe / "merges.txt")
    assert load_tokenizer(bpe).encode(text) == ids
    assert transformers.GPT2Tokenizer.from_pretrained(bpe).encode(text) == ids
    tokenizer.tokenizer.save(str(bpe / "tokenizer.json"))
    (bpe / "vocab.json").unlink()
    assert load_tokenizer(bpe).encode(text) == ids
    assert load_tokenizer(bpe / "elsewhere") is None


def test_other_tokenizers_are_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"日本": 0}, "日本"))
    with pytest.raises(ValueError, match="not byte-level, as GPT-2's is: its token 0 is '日本'"):
        BPETokenizer(words)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "merges.txt").write_text("a b c d\n")
    with pytest.raises(ValueError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)


# ---- Bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "too long": ({"max_new_tokens": 55}, "10 tokens and 55 new ones are more than the model's n_positions=64"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be positive; got 0"),
    "no prompt": ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "of a token or more; got .1, 0."),
    "one dimension": ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids must be .B, L. int64"),
    "dtype": ({"input_ids": torch.zeros(1, 3)}, "int64, .*; got .1, 3. torch.float32"),
    "unknown token": ({"input_ids": torch.tensor([[50]])}, "below the model's vocab_size=50"),
    "negative token": ({"input_ids": torch.tensor([[-1]])}, "not negative"),
    "lengths": ({"lengths": torch.tensor([0, 1, 2])}, r"lengths must be \(3,\) with values in 1..10; got \[0, 1, 2\]"),
    "lengths' shape": ({"lengths": torch.tensor([1])}, r"lengths must be \(3,\)"),
    "temperature": ({"do_sample": True, "temperature": 0.0}, "temperature must be positive; .*; got 0.0"),
    "temperature nan": ({"do_sample": True, "temperature": float("nan")}, "temperature must be positive"),
    "top_k": ({"do_sample": True, "top_k": 0}, "top_k must be positive, or None for all; got 0"),
    "top_p": ({"do_sample": True, "top_p": 1.5}, "top_p must be within .0, 1., or None for all; got 1.5"),
    "penalty": ({"repetition_penalty": -1.0}, "repetition_penalty must be positive; 1 is none; got -1.0"),
    "greedy": ({"top_k": 3}, "top_k and top_p are of sampling: set do_sample=True"),
    "stop": ({"stop_sequences": [[]]}, "a stop sequence must have a token or more"),
}
BAD_BEAMS = {
    "beams": ({"num_beams": 0}, "num_beams must be positive, and at most the vocabulary's 50; got 0"),
    "many beams": ({"num_beams": 51}, "at most the vocabulary's 50; got 51"),
    "beams by chance": ({"num_beams": 2, "do_sample": True}, "without do_sample"),
    "length_penalty": ({"length_penalty": 2.0}, "beam search's: give num_beams > 1"),
}


@pytest.mark.parametrize(("options", "message"), (BAD | BAD_BEAMS).values(), ids=BAD | BAD_BEAMS)
def test_bad_input_is_a_sentence_before_the_first_token(model, options, message):
    arguments = {"input_ids": prompts(), "max_new_tokens": 5, **options}
    _C.reset_counters()
    with pytest.raises(ValueError, match=message):
        model.generate(**arguments)
    if not options.keys() & {"num_beams", "length_penalty"}:
        with pytest.raises(ValueError, match=message):
            model.stream(**arguments)
    assert not _C.counters()


def test_a_model_in_training_mode_is_refused(model):
    with pytest.raises(ValueError, match="model is in training mode"):
        model.train().generate(prompts(), 5)


def test_an_empty_stop_string_is_refused(model):
    with pytest.raises(ValueError, match="must not be empty"):
        next(generate_text(model, ByteTokenizer(), "p", 5, stop=[""]))
