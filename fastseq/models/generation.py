"""Generating tokens with a KV cache: greedy, by sampling, by beam search; and text, piece by piece.

The numbers that decide are those of transformers' `generate`, so that the same weights give the same tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastseq.models.gpt2 import GPT2
    from fastseq.models.tokenizer import Tokenizer

__all__ = ["generate", "generate_text", "process_logits", "stream"]

NEVER = -1e9  # the score of a beam that is not to be chosen, as in transformers


def generate(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    **options: Any,
) -> Tensor:
    """The prompts with what follows them: (B, L + new), new the most tokens that a row has got, int64.

    With the same options the same tokens as transformers' `generate`, rounding aside: greedy; by sampling, from the
    same distributions; by beam search (Graves, "Sequence transduction with recurrent neural networks", 2012), whose
    finished beams are ranked by log p / (new tokens)^length_penalty.

    Args:
        input_ids: (B, L) int64, the prompts.
        max_new_tokens: at most so many; L and they must fit the model's n_positions.
        lengths: (B,), 1..L: prompts that are padded on the right. New tokens follow a row's own prompt.
        num_beams: more than 1: beam search.
        length_penalty: of beam search; above 0 favours long ones.
        early_stopping: when beam search ends: True, as soon as num_beams are finished; False, when the best running
            beam is not better than the worst of those at its length; "never", when it cannot become better.
        options: of `stream`.

    A row that has ended is filled with the first eos_token_id, or 0.

    Raises:
        ValueError: an option or prompt that makes no sense, or does not fit the model.
    """
    if num_beams != 1:
        most = model.config.vocab_size
        _check("num_beams", num_beams, 1 < num_beams <= most, f"positive, and at most the vocabulary's {most}")
        if options.get("do_sample"):
            raise ValueError("num_beams > 1 searches for the most probable text: it goes without do_sample")
    elif length_penalty != 1.0 or early_stopping:
        raise ValueError("length_penalty and early_stopping are beam search's: give num_beams > 1, or neither")
    decoding = _Decoding(model, input_ids, max_new_tokens, lengths, **options)
    if num_beams > 1:
        new = _beam_search(decoding, num_beams, length_penalty, early_stopping)
    else:
        new = torch.stack(list(_steps(decoding)), 1)
    B, L = input_ids.shape
    out = torch.full((B, L + new.shape[1]), decoding.filler, device=input_ids.device)
    out[:, :L] = input_ids
    if lengths is None:
        out[:, L:] = new
        return out
    for b, length in enumerate(lengths.tolist()):
        out[b, length:] = decoding.filler
        out[b, length : length + new.shape[1]] = new[b]
    return out


def stream(
    model: GPT2,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    lengths: Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Each row's next token, (B,) int64, step by step, as soon as it is there: `generate` without beams.

    Args:
        input_ids, max_new_tokens, lengths: as in `generate`.
        do_sample: draw from the distribution that is left, in the place of the most probable token.
        temperature, top_k, top_p: of `process_logits`; with do_sample alone.
        repetition_penalty: of `process_logits`, for the tokens of the prompt and those that came.
        eos_token_id: one or several that end a row; None means the config's, and () none.
        stop_sequences: sequences of tokens that end a row, too; they are part of the result.
        generator: what to draw from; None means torch's own, which `torch.manual_seed` sets.

    A row that has ended gives the first eos_token_id, or 0; the iterator ends with the last row.

    Raises:
        ValueError: as `generate`, before the first token.
    """
    return _steps(_Decoding(**locals()))


def process_logits(
    logits: Tensor,
    seen: Tensor | None = None,
    *,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The logits (B, vocab_size) of the distribution to draw from: -∞ for what is excluded; in this order.

    Args:
        seen: (B, vocab_size) bool, the tokens that repetition_penalty is for.
        repetition_penalty: logits of tokens that were seen are divided by it where positive and multiplied where
            negative (Keskar et al., "CTRL", 2019).
        temperature: logits are divided by it.
        top_k: the k most probable tokens stay (Fan et al., "Hierarchical neural story generation", 2018).
        top_p: the fewest most probable tokens whose probabilities sum to at least top_p stay (Holtzman et al., "The
            curious case of neural text degeneration", 2020).
    """
    if seen is not None and repetition_penalty != 1.0:
        penalized = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if temperature != 1.0:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, token = logits.sort(descending=False)
        excluded = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        excluded[:, -1] = False
        logits = logits.masked_fill(excluded.scatter(1, token, excluded), -torch.inf)
    return logits


def generate_text(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    num_beams: int = 1,
    **options: Any,
) -> Iterator[str]:
    """What follows the prompt, in pieces of text as they come; beam search gives one piece.

    A piece never has half of a character: bytes that begin one wait for the others. The text ends before the first of
    the `stop` strings, wherever tokens begin and end, before the token that ended it, or after max_new_tokens.

    Args:
        model: a `GPT2` in eval mode. tokenizer: its `ByteTokenizer` or `BPETokenizer`.
        options: of `generate` or `stream`.

    Raises:
        ValueError: as `generate`; an empty stop string.
    """
    if "" in stop:
        raise ValueError("a stop string must not be empty")
    input_ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64, device=model.lm_head.weight.device)
    if num_beams == 1:
        steps = model.stream(input_ids, max_new_tokens, **options)
    else:
        steps = model.generate(input_ids, max_new_tokens, num_beams=num_beams, **options)[:, input_ids.shape[1] :].T
    ends = _eos(model, options.get("eos_token_id"))
    return _pieces((tokenizer.decode([token]) for token in _until(steps, ends)), stop)


def _until(steps: Iterator[Tensor] | Tensor, ends: Sequence[int]) -> Iterator[int]:
    for token in map(int, steps):
        if token in ends:
            return
        yield token


def _pieces(tokens: Iterator[bytes], stop: Sequence[str]) -> Iterator[str]:
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for token in tokens:
        text += decoder.decode(token)
        if found := [at for at in map(text.find, stop) if at >= 0]:
            yield text[: min(found)]
            return
        held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        if len(text) > held:
            yield text[: len(text) - held]
            text = text[len(text) - held :]
    if text := text + decoder.decode(b"", final=True):
        yield text


class _Decoding:
    """The arguments of one call, checked, and the state that all ways of decoding share."""

    def __init__(
        self,
        model: GPT2,
        input_ids: Tensor,
        max_new_tokens: int,
        lengths: Tensor | None = None,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        stop_sequences: Sequence[Sequence[int]] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        config = model.config
        if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise ValueError(
                f"input_ids must be (B, L) int64, of a token or more; got {tuple(input_ids.shape)} {input_ids.dtype}"
            )
        if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < config.vocab_size:
            raise ValueError(f"input_ids must be below the model's vocab_size={config.vocab_size}, and not negative")
        B, L = input_ids.shape
        if lengths is not None and (lengths.shape != (B,) or not 1 <= int(lengths.min()) <= int(lengths.max()) <= L):
            raise ValueError(f"lengths must be ({B},) with values in 1..{L}; got {lengths.tolist()}")
        _check("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "positive")
        if L + max_new_tokens > config.n_positions:
            raise ValueError(
                f"the prompt's {L} tokens and {max_new_tokens} new ones are more than the model's "
                f"n_positions={config.n_positions}: take a shorter prompt or a smaller max_new_tokens"
            )
        _check("temperature", temperature, temperature > 0, "positive; do_sample=False takes the most probable token")
        _check("top_k", top_k, top_k is None or top_k >= 1, "positive, or None for all")
        _check("top_p", top_p, top_p is None or 0 < top_p <= 1, "within (0, 1], or None for all")
        _check("repetition_penalty", repetition_penalty, repetition_penalty > 0, "positive; 1 is none")
        if not do_sample and (temperature != 1.0 or top_k is not None or top_p is not None):
            raise ValueError("temperature, top_k and top_p are of sampling: set do_sample=True, or leave them out")
        if model.training:
            raise ValueError("the model is in training mode, with dropout: call model.eval() first")
        self.model, self.input_ids, self.lengths, self.max_new_tokens = model, input_ids, lengths, max_new_tokens
        self.options = {
            "repetition_penalty": repetition_penalty,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
        }
        self.do_sample, self.generator = do_sample, generator
        self.eos = torch.tensor(_eos(model, eos_token_id), dtype=torch.int64, device=input_ids.device)
        self.filler = int(self.eos[0]) if len(self.eos) else 0
        self.stop_sequences = [torch.tensor(s, device=input_ids.device) for s in stop_sequences]
        if not all(len(s) for s in self.stop_sequences):
            raise ValueError("a stop sequence must have a token or more")
        self.seen = None
        if repetition_penalty != 1.0:
            padding = torch.zeros_like(input_ids, dtype=torch.bool)
            if lengths is not None:
                padding = torch.arange(L) >= lengths[:, None]
            self.seen = torch.zeros(B, config.vocab_size + 1, dtype=torch.bool, device=input_ids.device)
            self.seen.scatter_(1, input_ids.masked_fill(padding, config.vocab_size), True)
            self.seen = self.seen[:, :-1]

    def prompt(self) -> Tensor:
        """The logits (B, vocab_size) after the prompts, from new caches."""
        B, L = self.input_ids.shape
        self.caches = self.model.new_caches(B, L + self.max_new_tokens)
        return self.model.decode(self.input_ids, self.caches, self.lengths)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (B, vocab_size) after one token (B,) more of each row."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return self.model.decode(tokens[:, None], self.caches)

    def process(self, logits: Tensor) -> Tensor:
        return process_logits(logits, self.seen, **self.options)

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row rows[b] was."""
        for cache in self.caches:
            cache.reorder(rows)
        if self.seen is not None:
            self.seen = self.seen[rows]

    def ends(self, tokens: Tensor, step: int) -> Tensor:
        """Of rows with new tokens (..., max_new_tokens), step + 1 of them so far: which ones the last one ends."""
        end = torch.isin(tokens[..., step], self.eos)
        for sequence in self.stop_sequences:
            begin = step + 1 - len(sequence)
            if begin >= 0:
                end |= (tokens[..., begin : step + 1] == sequence).all(-1)
        return end


@torch.no_grad()
def _steps(decoding: _Decoding) -> Iterator[Tensor]:
    rows, device = len(decoding.input_ids), decoding.input_ids.device
    tokens = torch.empty(rows, decoding.max_new_tokens, dtype=torch.int64, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    logits = decoding.prompt()
    for step in range(decoding.max_new_tokens):
        logits = decoding.process(logits.float())
        if decoding.do_sample:
            chosen = torch.multinomial(logits.softmax(-1), 1, generator=decoding.generator).squeeze(1)
        else:
            chosen = logits.argmax(-1)
        tokens[:, step] = chosen = chosen.masked_fill(ended, decoding.filler)
        yield chosen
        ended |= decoding.ends(tokens, step)
        if step + 1 == decoding.max_new_tokens or bool(ended.all()):
            return
        logits = decoding.step(chosen)


@torch.no_grad()
def _beam_search(
    decoding: _Decoding, num_beams: int, length_penalty: float, early_stopping: bool | Literal["never"]
) -> Tensor:
    """The best beam's new tokens (B, new) of each row.

    At each step the best continuations of all of a row's beams are its candidates, at least as many as leave num_beams
    to go on with if some end.
    """
    B, K, n = len(decoding.input_ids), num_beams, decoding.max_new_tokens
    device, V = decoding.input_ids.device, decoding.model.config.vocab_size
    candidates = K * max(2, 1 + len(decoding.eos))
    if candidates > K * V:
        raise ValueError(f"beam search needs more tokens than the {len(decoding.eos)} of eos_token_id; there are {V}")
    among_best = torch.arange(candidates, device=device) < K
    first_row = torch.arange(B, device=device)[:, None] * K

    running = torch.full((B, K, n), decoding.filler, device=device)
    scores = torch.full((B, K), NEVER, device=device)
    scores[:, 0] = 0.0  # the beams of a row begin alike: only one of them counts
    finished, finished_scores = running.clone(), torch.full((B, K), NEVER, device=device)
    finished_lengths = torch.zeros(B, K, dtype=torch.int64, device=device)
    is_finished = torch.zeros(B, K, dtype=torch.bool, device=device)
    improvable = torch.ones(B, 1, dtype=torch.bool, device=device)

    logits = decoding.prompt().repeat_interleave(K, 0)
    decoding.reorder(torch.arange(B, device=device).repeat_interleave(K))
    for step in range(n):
        log_p = decoding.process(logits.float().log_softmax(-1))
        best, at = (log_p.view(B, K, V) + scores[:, :, None]).flatten(1).topk(candidates)
        beam = at // V
        tokens = _rows(running, beam)
        tokens[:, :, step] = at % V
        ends = decoding.ends(tokens, step) if step + 1 < n else torch.ones_like(beam, dtype=torch.bool)

        new_scores = best / (step + 1) ** length_penalty
        closed = ~improvable | (is_finished.all(1, keepdim=True) if early_stopping is True else False)
        new_scores = new_scores + NEVER * closed + NEVER * ~(ends & among_best)
        finished_scores, kept = torch.cat([finished_scores, new_scores], 1).topk(K)
        finished = _rows(torch.cat([finished, tokens], 1), kept)
        finished_lengths = torch.cat([finished_lengths, torch.full_like(beam, step + 1)], 1).gather(1, kept)
        is_finished = torch.cat([is_finished, ends & among_best], 1).gather(1, kept)

        scores, kept = (best + NEVER * ends).topk(K)
        running, beam = _rows(tokens, kept), beam.gather(1, kept)
        best_length = n if early_stopping == "never" and length_penalty > 0 else step + 1
        worst = torch.where(is_finished, finished_scores.min(1, keepdim=True).values, NEVER)
        improvable = improvable & (scores[:, :1] / best_length**length_penalty > worst).any(1, keepdim=True)
        full = early_stopping is True and bool(is_finished.all())
        if full or bool(ends.all()) or not bool(improvable.any()):
            break
        decoding.reorder((first_row + beam).flatten())
        logits = decoding.step(running[:, :, step].flatten())
    return finished[:, 0, : int(finished_lengths[:, 0].max())]


def _rows(tokens: Tensor, at: Tensor) -> Tensor:
    return tokens.take_along_dim(at[:, :, None], 1)


def _eos(model: GPT2, eos_token_id: int | Sequence[int] | None) -> Sequence[int]:
    given = model.config.eos_token_id if eos_token_id is None else eos_token_id
    return [given] if isinstance(given, int) else list(given or ())


def _check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {expected}; got {value}")
