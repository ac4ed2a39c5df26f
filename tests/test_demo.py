"""What the demo concludes from its numbers."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fastseq.demo import gpt2
from fastseq.demo.ngram import KneserNey
from fastseq.demo.race import Race, Settings
from fastseq.demo.report import CellReport
from fastseq.models import ByteTokenizer

FOLDER = Path(__file__).parent  # of real text: these tests


def test_the_demo_allows_what_rounding_alone_does_and_no_more():
    report = CellReport("LSTM", {"fastseq": [1.0]}, {"fastseq": 1.0, "torch.nn": 1.0}, 4e-3, 0.0, 50)
    assert [passed for _, passed in report.verdicts()] == [True, False]
    report.float32_drift = 1e-3
    sentence, passed = report.verdicts()[1]
    assert passed and "5 times how far torch.nn drifts" in sentence
    report.float32_difference = 6e-3
    assert not report.verdicts()[1][1]
    report.float32_drift, report.float32_difference = 1e-7, 0.9e-3  # the bound is never below what it was
    assert report.verdicts()[1][1]


def test_drift_is_a_rounding_error_after_a_few_steps():
    text = np.random.default_rng(0).integers(1, 20, 4000)
    race = Race("GRU", text, 20, Settings(hidden=16, steps=8, batch=4, seq=16))
    for _ in race.run():
        pass
    assert 0 < race.drift() < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_is_its_formula_by_plain_counting(order):
    train = np.random.default_rng(0).zipf(1.5, 3000) % 5  # few symbols, so that unseen contexts are tried, too
    model = KneserNey(train, 6, order)

    def counts(length):
        grams = [tuple(train[i : i + order]) for i in range(len(train) - order + 1)]
        for _ in range(order - length):
            grams = [gram[1:] for gram in set(grams)]  # continuation counts, from here on
        return Counter(grams)

    def probability(gram):
        if not gram:
            return 1 / 6
        c = counts(len(gram))
        once, twice = (sum(n == k for n in c.values()) for k in (1, 2))
        D = once / (once + 2 * twice) if once and twice else 0.5
        followers = [n for g, n in c.items() if g[:-1] == gram[:-1]]
        lower = probability(gram[1:])
        if not followers:
            return lower
        return (max(c[gram] - D, 0) + D * len(followers) * lower) / sum(followers)

    for context in ([0] * 3, [1, 5, 1], [4, 3, 2], [5, 5, 5]):
        text = np.array([[*context[: order - 1], last] for last in range(6)])
        want = [probability(tuple(row.tolist())) for row in text]
        np.testing.assert_allclose(model.probabilities(text)[:, 0], want, rtol=1e-12)
        assert sum(want) == pytest.approx(1)
    assert model.bits(text) == pytest.approx(-np.log2(want).mean())


def gpt2_training(tokenizer=None, **settings):
    settings = gpt2.Settings(
        **{"steps": 12, "batch": 2, "context": 16, "width": 16, "layers": 1, "heads": 2, **settings}
    )
    return gpt2.Training(gpt2.read_tokens(FOLDER, tokenizer or ByteTokenizer(), settings), settings)


def test_a_gpt2_in_training_goes_on_to_the_same_bits(tmp_path, one_thread):
    whole, parts = gpt2_training(), gpt2_training()
    for step in range(12):
        whole.step()
        parts.step()
        if step % 5 == 2:
            whole.validate()
            parts.validate()
            parts.save(tmp_path / "checkpoint.pt")
            parts = gpt2_training()
            parts.load(tmp_path / "checkpoint.pt")
    assert parts.losses == whole.losses and parts.validation == whole.validation
    assert all(map(torch.equal, parts.model.state_dict().values(), whole.model.state_dict().values()))
    assert len(whole.validation) == 2


def test_a_gpt2_in_training_learns(one_thread):
    training = gpt2_training(steps=60)
    before = training.validate()
    for _ in range(60):
        training.step()
    assert training.validate() < before - 0.1  # bits per byte


def test_gpt2_and_n_gram_are_measured_on_the_same_bytes(one_thread):
    training = gpt2_training()
    text, n_gram = training.text, KneserNey(np.frombuffer(training.text.train_bytes, np.uint8), 256, 4)
    assert text.n_gram_bits() == pytest.approx(n_gram.bits(text.validation.numpy()), rel=1e-12)
    with torch.no_grad():
        log_p = training.model(text.validation).log_softmax(-1)[:, :-1].gather(2, text.validation[:, 1:, None])
    assert training.validate() == pytest.approx(-log_p[:, 2:].mean().item() / np.log(2), rel=1e-5)


def test_bits_per_byte_do_not_depend_on_what_a_token_is(one_thread):
    class Pairs:
        """Two tokens for each byte: its upper and its lower half."""

        vocab_size = 256

        def encode(self, text):
            return [half for byte in text.encode() for half in (byte // 16, byte % 16)]

        def decode(self, ids):
            return bytes(16 * a + b for a, b in zip(ids[::2], ids[1::2], strict=False))

    training = gpt2_training(Pairs())
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.zero_()  # every token is as probable as any other: 8 bits each, 2 tokens a byte
    text = training.text
    tokens = text.validation[:, gpt2.UNSCORED :].numel()
    assert text.bytes_per_token == 0.5
    assert training.validate() == pytest.approx(8 * tokens / sum(len(b) for _, b in text.scored()), rel=1e-6)
