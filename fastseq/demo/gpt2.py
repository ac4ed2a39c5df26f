"""A small GPT-2, trained on real text (`python -m fastseq train-gpt2`)."""

from __future__ import annotations

import hashlib
import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq._files import write
from fastseq.demo.ngram import KneserNey
from fastseq.demo.report import axes_without_screen, png, smoothed
from fastseq.demo.text import TextError, read_files, spread, windows_of_step
from fastseq.models import GPT2, GPT2Config
from fastseq.models.tokenizer import Tokenizer

ORDER = 4  # of the n-gram that it is compared with
UNSCORED = ORDER - 1  # the first tokens of each validation piece, as the n-gram cannot predict them
PIECES = 128
WARMUP, LAST, CLIP = 100, 0.05, 1.0  # steps in which the learning rate rises, what is left of it at the end, gradients


@dataclass(frozen=True)
class Settings:
    """What is trained, and how."""

    steps: int = 1600
    batch: int = 8
    context: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    learning_rate: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class TokenText:
    """Token ids, split by files.

    train: (tokens,) int64. validation: (pieces, context) int64, spread evenly over the validation files.
    """

    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor
    train_bytes: bytes
    train_files: int
    validation_files: int

    @property
    def bytes_per_token(self) -> float:
        return len(self.train_bytes) / len(self.train)

    def scored(self) -> list[tuple[bytes, bytes]]:
        """Of each validation piece, the bytes that are only context, and those that are predicted."""
        decode = self.tokenizer.decode
        return [(decode(piece[:UNSCORED]), decode(piece[UNSCORED:])) for piece in self.validation.tolist()]

    def n_gram_bits(self) -> float:
        """Bits per byte of the n-gram over the bytes that the model is measured on."""
        n_gram, bits, count = KneserNey(np.frombuffer(self.train_bytes, np.uint8), 256, ORDER), 0.0, 0
        for context, scored in self.scored():
            piece = np.frombuffer(context[-UNSCORED:] + scored, np.uint8)
            bits -= np.log2(n_gram.probabilities(piece)).sum()
            count += len(scored)
        return float(bits / count)


def read_tokens(folder: Path, tokenizer: Tokenizer, settings: Settings) -> TokenText:
    """The folder's text as tokens. Raises TextError where there is too little of it."""
    train, validation = read_files(folder)
    ids = [np.array(tokenizer.encode("".join(texts)), dtype=np.int64) for texts in (train, validation)]
    if len(ids[0]) < settings.batch * settings.context or len(ids[1]) <= UNSCORED:
        raise TextError(
            f"{folder} has {len(ids[0])} tokens to train on and {len(ids[1])} for validation, and a batch of "
            f"{settings.batch} needs {settings.batch * settings.context}: take a smaller --batch or --context, or more "
            f"text."
        )
    pieces = spread(ids[1], PIECES, settings.context)
    sizes = {"train_files": len(train), "validation_files": len(validation)}
    return TokenText(tokenizer, *map(torch.from_numpy, (ids[0], pieces)), "".join(train).encode(), **sizes)


class Training:
    """A model in training, whose state a checkpoint holds whole: the rest of it is the same to the last bit.

    Attributes:
        losses: of each step so far, in bits per byte. validation: the steps after which it was measured, and bits per
            byte. seconds: that the steps took.
    """

    def __init__(self, text: TokenText, settings: Settings) -> None:
        self.text, self.settings = text, settings
        torch.manual_seed(settings.seed)
        self.model = GPT2(
            GPT2Config(
                vocab_size=text.tokenizer.vocab_size,
                n_positions=settings.context,
                n_embd=settings.width,
                n_layer=settings.layers,
                n_head=settings.heads,
                initializer_range=0.7 / math.sqrt(settings.width),  # for 768 of them nearly GPT-2's 0.02
                resid_pdrop=0.0,  # the text is seen about once
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
                self_trained=True,
            )
        )
        with torch.no_grad():
            # A few minutes do not teach what positions are: they begin as the sinusoids of Vaswani et al., 2017.
            positions = _sinusoids(settings.context, settings.width)
            self.model.transformer.wpe.weight.copy_(positions * math.sqrt(2) * self.model.config.initializer_range)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.seconds = 0.0

    def step(self) -> None:
        begin, step = time.perf_counter(), len(self.losses)
        rise, fall = min(1.0, (step + 1) / WARMUP), 0.5 * (1.0 + math.cos(math.pi * step / self.settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rise * (LAST + (1 - LAST) * fall)
        ids = self._batch(step)
        _, loss = self.model(ids, labels=ids)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.losses.append(loss.item() / math.log(2) / self.text.bytes_per_token)
        self.seconds += time.perf_counter() - begin

    def _batch(self, step: int) -> Tensor:
        context = self.settings.context
        chosen = windows_of_step(len(self.text.train) // context, self.settings.batch, step, self.settings.seed)
        return self.text.train[(chosen * context)[:, None] + torch.arange(context)]

    @torch.no_grad()
    def validate(self) -> float:
        """Bits per byte over the validation pieces, kept in `validation`."""
        nats = 0.0
        for pieces in self.text.validation.split(16):
            logits = self.model(pieces)[:, UNSCORED - 1 : -1]
            nats += F.cross_entropy(logits.flatten(0, 1), pieces[:, UNSCORED:].flatten(), reduction="sum").item()
        bits = nats / math.log(2) / sum(len(scored) for _, scored in self.text.scored())
        self.validation.append((len(self.losses), bits))
        return bits

    def tokens_per_second(self) -> float:
        return len(self.losses) * self.settings.batch * self.settings.context / self.seconds

    def save(self, path: Path) -> None:
        """A checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(
            {
                "made for": self._made_for(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "losses": self.losses,
                "validation": self.validation,
                "seconds": self.seconds,
            },
            buffer,
        )
        write(path, buffer.getvalue())

    def load(self, path: Path) -> None:
        """Goes on where the checkpoint was saved. Raises ValueError where it is damaged, or of another training."""
        try:
            saved = torch.load(path, weights_only=True)
            made_for = saved["made for"]
            changed = [name for name, value in self._made_for().items() if made_for[name] != value]
        except Exception as error:  # of many types, as the file may be anything
            raise ValueError(f"cannot be read as a checkpoint: {str(error).splitlines()[0]:.200}") from None
        if changed:
            raise ValueError(f"is of a training with another {', another '.join(changed)}")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.losses, self.validation, self.seconds = saved["losses"], saved["validation"], saved["seconds"]

    def _made_for(self) -> dict[str, object]:
        text = hashlib.sha256(self.text.train.numpy().tobytes() + self.text.validation.numpy().tobytes())
        return {**asdict(self.settings), "text": text.hexdigest()}

    def curve(self, n_gram_bits: float) -> bytes:
        """A PNG: bits per byte in training and validation, and the n-gram's."""
        figure, [[axis]] = axes_without_screen(1, (6.4, 4.4))
        axis.plot(*smoothed(np.array(self.losses)), color="#d1495b", linewidth=1.3, label="training")
        axis.plot(*zip(*self.validation, strict=True), "o-", color="#30638e", label="validation")
        axis.axhline(n_gram_bits, color="#30638e", linestyle="--", linewidth=1, label=f"{ORDER}-gram, validation")
        axis.set_xlabel("step")
        axis.set_ylabel("bits per byte")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
        return png(figure)


def _sinusoids(positions: int, width: int) -> Tensor:
    """sin and cos of position / 10000^(2i / width), (positions, width)."""
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
